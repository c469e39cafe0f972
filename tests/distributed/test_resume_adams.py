# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""A stage that stopped with one Adam goes on with another, as where Transformer Engine or Apex came or went.

Compared are losses, norms of gradients and the weights at the end with a run that was not stopped.
"""

import shutil
from pathlib import Path

import pytest
import torch

from tests.support.accelerators import needs_te
from tests.support.adams import use_adam
from tests.support.launch import run_ranks
from tests.support.stages import FLAGS, logged, make_run, optimizer_state

pytestmark = pytest.mark.slow  # tests/unit/compat/test_adams.py has the quick part
STEPS, STOP = 4, 2
SCHEDULE = ("--train-iters", str(STEPS), "--save-interval", str(STOP), "--micro-batch-size", "1", "--lr", "1e-2")
# Two data-parallel ranks; and two stages of which the first, whose count of steps is saved, has nothing to train.
LAYOUTS = {
    "extend": (),
    "align": ("--pipeline-model-parallel-size", "2", "--pipeline-model-parallel-layout", "E|ttttL"),
}
MOVES = [("torch", "apex"), ("apex", "torch")]
MOVES += [pytest.param(*move, marks=needs_te) for move in (("torch", "te"), ("te", "torch"), ("te", "apex"))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("adams"))


def train(folder: Path, stage: str, adam: str, run: str, *flags: str) -> Path:
    """Run a stage on two ranks; returns its folder."""
    argv = ["--stage", stage, "--run-dir", str(folder / run), "--teacher", str(folder / "teacher")]
    argv += ["--start-from", str(folder / "student"), "--data-path", str(folder / "data")]
    argv += ["--data-cache-path", str(folder / "cache"), *FLAGS, *SCHEDULE, *LAYOUTS[stage], *flags]
    run_ranks(_train, 2, adam, argv, timeout=300)
    return folder / run / stage


def _train(_rank: int, adam: str, argv: list[str]) -> None:
    from hydra_mcore.train.__main__ import main

    use_adam(adam)
    main(argv)


def once(folder: Path, stage: str, adam: str, run: str, *flags: str) -> Path:
    """The same, kept for the next test."""
    name = f"{stage}-{adam}-{run}"
    return folder / name / stage if (folder / name).exists() else train(folder, stage, adam, name, *flags)


@pytest.mark.parametrize(("before", "after"), MOVES)
@pytest.mark.parametrize("stage", LAYOUTS)
def test_a_stage_goes_on_with_another_adam(stage: str, before: str, after: str, folder: Path) -> None:
    whole = once(folder, stage, before, "whole")
    stopped = once(folder, stage, before, "stopped", "--exit-interval", str(STOP))
    run = f"{stage}-{before}-{after}"
    shutil.copytree(stopped.parent, folder / run)
    resumed = train(folder, stage, after, run)
    found, expected = logged(resumed / "tensorboard"), logged(whole / "tensorboard")
    for tag in (f"{stage} loss", "grad-norm", "learning-rate"):
        assert found[tag] == pytest.approx(expected[tag], rel=2e-5)
    for key in ("param", "exp_avg", "exp_avg_sq"):
        states = [optimizer_state(path / f"iter_{STEPS:07d}", key) for path in (resumed, whole)]
        assert states[0] and states[0].keys() == states[1].keys()
        for name, value in states[1].items():
            torch.testing.assert_close(states[0][name], value, rtol=1e-5, atol=2e-6 * value.abs().max().item())
