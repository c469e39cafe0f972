# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The commands that a study stands for: once for a seed, and once for a variant with a seed.

Every command can be given again. Finished results stay, and a stage of training continues.
"""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra_mcore.config import ConfigError
from hydra_mcore.recipe import Recipe, read_yaml, without_variables
from hydra_mcore.selection.choose import SCORED
from tools.studies.file import SECTIONS, Overlay, Study, Variant, laid_over

SHARED, TEACHER = "shared", "teacher"
# What a choice of heads says; another flag of selection changes the scores, and the variant makes its own.
CHOICE = frozenset({"strategy", "ratio", "budget", "every", "ranks", "kv-groups", "linear", "score", "roles", "weight"})
# Without these of a recipe's sections no job could be begun; a study says everything else itself, or leaves it open.
NEEDED = {"import": ("hf", "out"), "select": ("teacher",), "hybridize": ("teacher",), "evaluate": ("lengths",)}
FIRST_SEEDS = {"": 1234, "select": 0, "hybridize": 1234, "evaluate": 1_000_000}  # where the recipes name none


@dataclass(frozen=True)
class Step:
    """One command, without the Python that runs it; on as many ranks as there are, or on one."""

    name: str
    words: tuple[str, ...]
    on_ranks: bool = False


@dataclass(frozen=True)
class Job:
    """Steps one after the other, with a folder and a recipe of their own."""

    study: Study
    seed: int
    variant: Variant | None  # None: what all variants of the seed share

    @property
    def name(self) -> str:
        return f"{self.variant.name if self.variant else SHARED}, seed {self.seed}"

    @property
    def folder(self) -> Path:
        return self.seed_folder / (self.variant.slug if self.variant else SHARED)

    @property
    def seed_folder(self) -> Path:
        return self.study.out / f"seed{self.seed}"

    @property
    def evaluation(self) -> Path:
        """The evaluation folder, which all variants of a seed share, so that all answer one set of prompts."""
        return self.seed_folder / "evaluation"

    @property
    def recipe(self) -> Path:
        return self.folder / "recipe.yaml"

    @property
    def recipes(self) -> tuple[Path, ...]:
        return (*self.study.recipes, self.recipe)

    def section(self, name: str) -> dict[str, Any]:
        """A section of the study's recipes as this job changes it, before the job's own places."""
        own = self._own()
        return Recipe.load(self.study.recipes, name).values | own.get(name, {})

    def _own(self) -> dict[str, Any]:
        return laid_over(self.study.over, self.variant.over if self.variant else {})

    def overlay(self) -> dict[str, Any]:
        """What this job lays over the study's recipes: the variant's settings, its seeds, its places."""
        seeds: dict[str, Any] = {}
        for section, first in FIRST_SEEDS.items():
            given = self.section(section) if section else Recipe.load(self.study.recipes, "align").values | self._own()
            found = {"seed": given.get("seed", first) + self.seed}
            seeds |= {section: found} if section else found
        return with_seed(laid_over(self._of_the_seed(), self._own(), seeds, self._places()), self.seed)

    def _of_the_seed(self) -> dict[str, Any]:
        """What the recipes leave to the seed: texts that name it. Variables keep what the recipes make of them, as this
        job's own places would move what jobs share.
        """
        found: dict[str, Any] = {}
        for path in self.study.recipes:
            found = laid_over(found, read_yaml(path, "recipe"))
        settled = without_variables(laid_over(found, self._own()), " + ".join(map(str, self.study.recipes)))
        named = {key: value for key, value in found.items() if _is_open(value)}
        return {
            key: {flag: settled[key][flag] for flag, v in value.items() if _is_open(v)}
            if key in SECTIONS
            else settled[key]
            for key, value in named.items()
        }

    def _places(self) -> dict[str, Any]:
        scores = str(Job(self.study, self.seed, None).folder / "heads" / "scores.json")
        heads, teacher = self.folder / "heads", self.section("import")["out"]
        select: dict[str, Any] = {"out": str(heads)}
        hybridize: dict[str, Any] = {"head-map": str(heads / "head_map.json"), "out": str(self.folder / "student")}
        own_scores = self.variant is None or (self.scored and not self.shares_scores)
        if self.scored and not own_scores:
            select["scores"] = scores
        if "scores" in self.section("hybridize"):
            hybridize["scores"] = str(heads / "scores.json") if own_scores else scores
        name = self.variant.name if self.variant else TEACHER
        model = self.folder / self.study.stages[-1] if self.variant else teacher
        evaluate: dict[str, Any] = {"models": [f"{name}={model}"], "out": str(self.evaluation), "reference": TEACHER}
        if self.variant:
            evaluate["yarn"] = None  # a row of the teacher
        evaluate["cache"] = str(self.evaluation / "prompts")
        return {"run-dir": str(self.folder), "select": select, "hybridize": hybridize, "evaluate": evaluate}

    @property
    def scored(self) -> bool:
        """Whether heads are chosen by scores."""
        return self.section("select").get("strategy", SCORED[0]) in SCORED

    @property
    def shares_scores(self) -> bool:
        """Whether the variant chooses from the scores of its seed."""
        return not self.variant or set(self.variant.over.get("select", {})) <= CHOICE

    def steps(self) -> list[Step]:
        config = ("--config", *map(str, self.recipes))
        select = Step("head selection", ("tools/select_heads.py", *config, "--skip-existing"), on_ranks=True)
        evaluation = Step("evaluation", ("tools/evaluate.py", *config, "--skip-existing"), on_ranks=True)
        if self.variant:
            train = ("-m", "hydra_mcore.train", *config, "--stage")
            stages = (Step(stage, (*train, stage), on_ranks=True) for stage in self.study.stages)
            student = Step("student", ("tools/convert.py", "hybridize", *config, "--skip-existing"))
            return [select, student, *stages, evaluation]
        setup = (Step(text, tuple(shlex.split(with_seed(text, self.seed)))) for text in self.study.setup)
        data = [Step("tokens", ("tools/prepare_data.py", *config))] if self.section("prepare") else []
        teacher = Step("import", ("tools/convert.py", "import", *config, "--skip-existing"))
        scores = [select] if self.scored else []
        return [*setup, *data, teacher, *scores, evaluation]


def check_recipes(study: Study) -> None:
    """Raise ConfigError where the recipes leave out what every study needs: before a run, which would stop midway."""
    for job in (*shared_jobs(study), *variant_jobs(study)):
        for section, keys in NEEDED.items():
            if missing := [key for key in keys if job.section(section).get(key) is None]:
                names = " + ".join(map(str, study.recipes))
                raise ConfigError(
                    f"recipe {names}: section {section!r} needs {missing[0]!r}, {job.name}; docs/studies.md lists what"
                    " the recipe of a study holds"
                )


def shared_jobs(study: Study) -> list[Job]:
    """What comes before the variants, a job for each seed."""
    return [Job(study, seed, None) for seed in study.seeds]


def variant_jobs(study: Study, only: Iterable[str] = ()) -> list[Job]:
    """A job for each variant and seed, seed by seed; all variants, or ``only`` these."""
    names = set(only) or {variant.name for variant in study.variants}
    chosen = [variant for variant in study.variants if variant.name in names]
    return [Job(study, seed, variant) for seed, variant in itertools.product(study.seeds, chosen)]


def with_seed(value: Any, seed: int) -> Any:
    """A value whose texts name the seed as ``{seed}``."""
    if isinstance(value, dict):
        return {key: with_seed(inner, seed) for key, inner in value.items()}
    if isinstance(value, list):
        return [with_seed(inner, seed) for inner in value]
    return value.replace("{seed}", str(seed)) if isinstance(value, str) else value


def _is_open(value: Any) -> bool:
    """Whether a value of a recipe names the seed, or another value."""
    return with_seed(value, 0) != value or "${" in str(value)


def without_evaluation(over: Overlay) -> dict[str, Any]:
    """Settings that make a student what it is; it may be asked more later."""
    return {key: value for key, value in over.items() if key != "evaluate"}
