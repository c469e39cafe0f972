# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Check the flags of all variants before a study runs: a typo in the last variant would stop it after hours."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import yaml

from hydra_mcore.config import ConfigError, HydraOptions
from hydra_mcore.recipe import COMMAND_SECTIONS, parse_with_recipe
from hydra_mcore.train.arguments import recipe_flags
from tools import convert, evaluate, prepare_data, select_heads
from tools.studies.file import Study
from tools.studies.steps import Job, shared_jobs, variant_jobs


def check_flags(study: Study) -> None:
    """Parse the flags of every command of the first seed: seeds differ in numbers and folders alone.

    Raises:
        ConfigError: a command would refuse a flag, its value, or the options of the layer together. It names the
            variant.
    """
    first = dataclasses.replace(study, seeds=study.seeds[:1])
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "recipe.yaml"
        for job in (*shared_jobs(first), *variant_jobs(first)):
            recipe.write_text(yaml.safe_dump(job.overlay()))
            config = ["--config", *map(str, (*study.recipes, recipe))]
            for section, parse in _parsers(job).items():
                if refused := _refusal(parse, config):
                    said = refused.replace(f" + {recipe}", "")
                    raise ConfigError(f"study {study.path}: {job.name}, {section}: {said}")


def _parsers(job: Job) -> dict[str, Callable[[Sequence[str]], object]]:
    """What reads each section that the job's commands read; stages of the base, and of variants that change them."""
    evaluated = {"evaluate": lambda config: parse_with_recipe(evaluate.parser(), "evaluate", config)}
    selected = {"select": lambda config: parse_with_recipe(select_heads.parser(), "select", config)}
    if job.variant is None:
        prepared = {"prepare": lambda config: parse_with_recipe(prepare_data.parser(), "prepare", config)}
        imported = {"import": lambda config: convert.parse_args(["import", *config])}
        return (prepared if job.section("prepare") else {}) | imported | (selected if job.scored else {}) | evaluated
    trains = job.variant.name == job.study.base or job.variant.over.keys() - set(COMMAND_SECTIONS)
    stages = {stage: _parse_stage(stage) for stage in job.study.stages} if trains else {}
    return selected | {"hybridize": _parse_layer} | stages | evaluated


def _parse_layer(config: Sequence[str]) -> object:
    flags = vars(convert.parse_args(["hybridize", *config]))
    return HydraOptions(**{field.name: flags[field.name] for field in dataclasses.fields(HydraOptions)})


def _parse_stage(stage: str) -> Callable[[Sequence[str]], object]:
    return lambda config: recipe_flags(["--stage", stage, *config], with_gpu=True)


def _refusal(parse: Callable[[Sequence[str]], object], config: Sequence[str]) -> str | None:
    """The last line of what a command says, without its own name, where it refuses its flags."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            parse(config)
    except ConfigError as error:
        return str(error)
    except SystemExit:
        return said.getvalue().strip().splitlines()[-1].partition(": ")[2].removeprefix("error: ")
    return None
