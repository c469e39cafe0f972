# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Every recipe of examples/ is read by the commands it is for: stages dry-run at their real size, sections parsed."""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from hydra_mcore.config import HydraOptions
from hydra_mcore.convert.hf_config import read_config
from hydra_mcore.heads import HeadMap
from hydra_mcore.recipe import COMMAND_SECTIONS, STAGE_SECTIONS, Recipe, parse_with_recipe
from hydra_mcore.train.arguments import recipe_flags
from tests.support.launch import model_parallel, run_ranks
from tests.support.paths import ROOT
from tools import convert, evaluate, prepare_data, select_heads
from tools.plan.__main__ import main as plan

EXAMPLES = ROOT / "examples"
SCHEDULES = {"qwen3-1.7b": [(), ("paper-2.3b",), ("optimised-5.8b",), ("hypenet",)], "qwen3-8b": [()]}
REAL = "smollm2_135m"
LAYOUTS = {(): 8, ("64gpu",): 64, ("extend-64k",): 8, ("64gpu", "extend-64k"): 64}
CASES = [
    (model, schedule + layout, ranks)
    for model, schedules in SCHEDULES.items()
    for schedule, (layout, ranks) in itertools.product(schedules, LAYOUTS.items())
    if all((EXAMPLES / model / f"{name}.yaml").exists() for name in layout)
]
TOKENS = {  # in billions: align, distill, extend
    "": (0.8, 4.2, 10.0),
    "paper-2.3b": (0.3, 1.0, 1.0),
    "optimised-5.8b": (0.8, 4.0, 1.0),
}


def files(model: str, overlays: tuple[str, ...]) -> list[str]:
    return [str(EXAMPLES / model / f"{name}.yaml") for name in ("recipe", *overlays)]


Case = tuple[str, tuple[str, ...], int, str]  # model, overlays, ranks, stage
KEPT = ("world_size", "bf16", "data_parallel_size", "context_parallel_size", "tensor_model_parallel_size")
KEPT += ("train_iters", "global_batch_size", "seq_length")


@pytest.fixture(scope="module")
def resolved(tmp_path_factory: pytest.TempPathFactory) -> dict[Case, dict[str, Any]]:
    """What every stage of every combination of files would train with, in one process: it builds nothing."""
    folder = tmp_path_factory.mktemp("examples")
    run_ranks(_write_students, 1, folder)
    builder = IndexedDatasetBuilder(str(folder / "data.bin"), dtype=np.int32)  # enough tokens for one sequence
    builder.add_document(torch.zeros(70_000, dtype=torch.int32), [70_000])
    builder.finalize(str(folder / "data.idx"))
    return run_ranks(_dry_runs, 1, folder, timeout=300)[0]


def _write_students(rank: int, folder: Path) -> None:
    from hydra_mcore.model.checkpoints import write_checkpoint

    for model in SCHEDULES:
        teacher = read_config(EXAMPLES / model)
        shape = teacher.shape
        pairs = [(layer, head) for layer in range(shape.num_layers) for head in range(layer % 4, shape.num_heads, 4)]
        head_map = HeadMap.from_fa(pairs, shape.num_layers, shape.num_heads, shape.num_kv_groups)
        student = dataclasses.replace(teacher, head_map=head_map, options=HydraOptions(), stage="student")
        with model_parallel():
            write_checkpoint({}, student, folder / model)


def _dry_runs(rank: int, folder: Path) -> dict[Case, dict[str, Any]]:
    from hydra_mcore.train import dry_run
    from hydra_mcore.train import run as stage_run

    found: dict[Case, dict[str, Any]] = {}
    for (model, overlays, ranks), stage in itertools.product(CASES, STAGE_SECTIONS):
        os.environ.update(WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE="8")
        argv = ["--stage", stage, "--config", *files(model, overlays), "--dry-run", "--run-dir", str(folder / "run")]
        argv += [
            "--start-from",
            str(folder / model),
            "--data-path",
            str(folder / "data"),
            "--teacher",
            str(folder / model),
        ]
        argv += ["--needle-interval", "0"]  # its prompts need the tokenizer
        seen: dict[str, Any] = {}
        dry_run.check_data = lambda args, seen=seen: seen.update(vars(args))
        stage_run.run_stage(argv)
        found[model, overlays, ranks, stage] = {name: seen[name] for name in KEPT}
    return found


@pytest.mark.parametrize("stage", STAGE_SECTIONS)
@pytest.mark.parametrize(("model", "overlays", "ranks"), CASES)
def test_stages_dry_run(resolved: dict, model: str, overlays: tuple[str, ...], ranks: int, stage: str) -> None:
    args = resolved[model, overlays, ranks, stage]
    assert args["world_size"] == ranks and args["bf16"]
    assert args["data_parallel_size"] * args["context_parallel_size"] * args["tensor_model_parallel_size"] == ranks
    schedule = next((name for name in overlays if name in TOKENS), "")
    tokens = args["train_iters"] * args["global_batch_size"] * args["seq_length"] / 1e9
    # the paper's numbers of steps are round
    assert tokens == pytest.approx(
        TOKENS[schedule][STAGE_SECTIONS.index(stage)], rel=0.1 if schedule == "paper-2.3b" else 0.05
    )
    if stage == "extend":
        assert args["seq_length"] == (65_536 if "extend-64k" in overlays else 16_384)
        assert args["context_parallel_size"] > 1


def test_every_recipe_file_is_tried() -> None:
    tried = {path for model, overlays, _ in CASES for path in files(model, overlays)}
    present = {str(path) for path in EXAMPLES.glob("*/*.yaml") if path.parent.name != "lm_eval"}
    tiny = {str(EXAMPLES / "tiny" / "recipe.yaml")}
    # The demo, the study of kinds and the pipeline's test run tiny's; the real one is read below.
    assert present - tried == tiny | {str(EXAMPLES / REAL / "recipe.yaml")}
    for path in present:
        assert set(yaml.safe_load(Path(path).read_text())) & {*STAGE_SECTIONS, *COMMAND_SECTIONS}, path


COMMANDS = {"prepare": prepare_data, "select": select_heads, "evaluate": evaluate}


@pytest.mark.parametrize("section", COMMAND_SECTIONS)
@pytest.mark.parametrize(
    ("model", "overlays"), [*((model, ()) for model in (*SCHEDULES, REAL)), ("qwen3-1.7b", ("hypenet",))]
)
def test_commands_know_the_keys_of_their_section(model: str, overlays: tuple[str, ...], section: str) -> None:
    config = ["--config", *files(model, overlays)]
    if section in COMMANDS:
        found = vars(parse_with_recipe(COMMANDS[section].parser(), section, config))
    else:
        found = vars(convert.parse_args([section, *config]))
    given = Recipe.load(files(model, overlays), section).values
    assert given and all(found[name.replace("-", "_")] not in (None, "") for name in given)


def test_the_real_models_stages_take_their_keys() -> None:
    parser, recipe, options = recipe_flags(["--stage", "align", "--config", *files(REAL, ())], with_gpu=False)
    found = parser.parse_args(recipe.to_flags(parser))
    assert options.dtype == "auto" and (found.train_iters, found.seq_length, found.lr) == (100, 512, 1e-3)


def test_hypenet_has_folders_of_its_own_but_for_the_teacher() -> None:
    """Beside the student of the recipe, which shares teacher and text with it."""
    paths = {
        (section, key): [path.split("=")[-1] for path in (value if isinstance(value, list) else [value])]
        for section in COMMAND_SECTIONS
        for key, value in Recipe.load(files("qwen3-1.7b", ("hypenet",)), section).values.items()
        if "runs/" in str(value)
    }
    folder, teacher = "runs/qwen3-1.7b-hypenet", "runs/qwen3-1.7b/teacher"
    assert Recipe.load(files("qwen3-1.7b", ("hypenet",)), "align").values["run-dir"] == folder
    assert {path for found in paths.values() for path in found} == {
        *(teacher, f"{folder}/heads", f"{folder}/heads/head_map.json", f"{folder}/student", f"{folder}/extend"),
        *(f"{folder}/evaluation", f"{folder}/evaluation/report.md", f"{folder}/hf"),
    }
    assert paths["hybridize", "head-map"] == [f"{paths['select', 'out'][0]}/head_map.json"]


def test_the_walk_through_shows_cost_and_jobs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (EXAMPLES / "qwen3-1.7b" / "README.md").read_text()
    stages, evaluation = re.findall(r"^python (tools/plan.py .*)$", text, re.MULTILINE)
    (jobs,) = re.findall(r"^bash (slurm/pipeline.sh --dry-run .*)$", text, re.MULTILINE)
    said = subprocess.run(
        [sys.executable, *stages.split()], cwd=ROOT, check=True, capture_output=True, text=True, timeout=120
    ).stdout
    assert said.count("Fits: ") == 3 and "| all |  | 15.00 |" in said
    monkeypatch.chdir(ROOT)
    plan(evaluation.split()[1:])
    said = capsys.readouterr().out
    assert said.count("Fits: ") == 1 and "| student, 524,288 |" in said
    said = subprocess.run(
        ["bash", *jobs.split()], cwd=ROOT, check=True, capture_output=True, text=True, timeout=60
    ).stdout
    assert said.count("sbatch ") == 6
