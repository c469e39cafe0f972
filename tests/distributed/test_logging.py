# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""What a run logs, and that it runs in bf16 and without W&B."""

import importlib.util
import sys
from pathlib import Path

import pytest

from tests.support.launch import run_ranks
from tests.support.stages import FLAGS, SHAPE, logged, make_run, run_stage

WANDB = ("--wandb-project", "hydra", "--wandb-exp-name", "test")
BRANCHES = {"fa gate", "fa scale", "gdn scale", "gdn write gate", "gdn half-life"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("logging"))


def test_align_logs_layers_and_branches_to_tensorboard_and_offline_wandb(folder: Path) -> None:
    found = run_stage(folder, "align", 1, *WANDB, run="wandb")
    layers = [f"align layer {layer}" for layer in range(SHAPE.num_layers)]
    assert found.keys() >= {"align loss", *layers, *BRANCHES}
    assert found["align loss"][1] == pytest.approx(sum(found[layer][1] for layer in layers), rel=1e-6)
    (offline,) = (folder / "wandb" / "align" / "wandb").rglob("run-*.wandb")
    content = offline.read_bytes()
    assert all(name.encode() in content for name in ("align layer 0", "gdn half-life"))


def test_statistics_are_those_of_all_ranks(folder: Path) -> None:
    one = run_stage(folder, "distill", 1, "--exit-interval", "1", run="stats-1")
    two = run_stage(folder, "distill", 2, "--exit-interval", "1", "--tensor-model-parallel-size", "2", run="stats-2")
    for name in BRANCHES | {"kl", "ce"}:
        assert two[name][1] == pytest.approx(one[name][1], rel=1e-5), name


def test_training_goes_on_without_wandb(folder: Path) -> None:
    argv = ["--stage", "extend", "--run-dir", str(folder / "bare"), "--start-from", str(folder / "student")]
    run_ranks(_train_without_wandb, 1, [*argv, "--data-path", str(folder / "data"), *FLAGS, *WANDB])
    assert len(logged(folder / "bare" / "extend" / "tensorboard")["extend loss"]) == 10


def _train_without_wandb(rank: int, argv: list[str]) -> None:
    from hydra_mcore.train.__main__ import main

    find, importlib.util.find_spec = importlib.util.find_spec, lambda name, *a: None if name == "wandb" else find(name, *a)
    sys.modules["wandb"] = None  # importing it fails, as where it is not installed
    main(argv)


PIPELINED = ("--pipeline-model-parallel-size", "2", "--context-parallel-size", "2", "--micro-batch-size", "1")


@pytest.mark.parametrize("stage", ["align", "distill", "extend"])
def test_bf16_is_near_float32(folder: Path, stage: str) -> None:
    exact = run_stage(folder, stage, 1, "--micro-batch-size", "1", "--train-iters", "4", run=f"{stage}-fp32")
    sharded = run_stage(
        folder, stage, 2, "--tensor-model-parallel-size", "2", "--sequence-parallel", "--bf16", "--train-iters", "4", run=f"{stage}-bf16"
    )
    pipelined = run_stage(folder, stage, 4, *PIPELINED, "--bf16", "--train-iters", "4", run=f"{stage}-bf16-pipelined")
    for step, value in exact[f"{stage} loss"].items():
        for found in (sharded, pipelined):
            assert found[f"{stage} loss"][step] == pytest.approx(value, rel=0.02), step
