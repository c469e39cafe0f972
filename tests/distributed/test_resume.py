# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Save, stop and go on: exactly as if never stopped, and on another layout with the same losses."""

import shutil
from pathlib import Path

import pytest

from tests.support.stages import make_run, run_stage

STEPS, STOP = 8, 4
SCHEDULE = ("--train-iters", str(STEPS), "--save-interval", str(STOP))
TP2 = ("--tensor-model-parallel-size", "2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("resume"))


@pytest.mark.parametrize("stage", ["align", "distill", "extend"])
def test_resumed_run_equals_uninterrupted_run(folder: Path, stage: str) -> None:
    whole = run_stage(folder, stage, 2, *SCHEDULE, run="whole")
    first = run_stage(folder, stage, 2, *SCHEDULE, "--exit-interval", str(STOP), run="parts")
    assert max(first["grad-norm"]) == STOP
    resumed = run_stage(folder, stage, 2, *SCHEDULE, run="parts")
    for tag in (f"{stage} loss", "grad-norm", "learning-rate"):
        assert resumed[tag] == whole[tag]


@pytest.fixture(scope="module")
def stopped_at_tp2(folder: Path) -> Path:
    run_stage(folder, "distill", 2, *SCHEDULE, *TP2, "--exit-interval", str(STOP), run="tp2")
    return folder / "tp2"


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_checkpoint_of_two_ranks_goes_on_at_other_sizes(folder: Path, stopped_at_tp2: Path, tp_size: int) -> None:
    reference = run_stage(folder, "distill", 1, *SCHEDULE, run="one")
    shutil.copytree(stopped_at_tp2, folder / f"from-tp2-{tp_size}")
    found = run_stage(folder, "distill", tp_size, *SCHEDULE, "--tensor-model-parallel-size", str(tp_size), run=f"from-tp2-{tp_size}")
    for tag in ("distill loss", "grad-norm"):
        for step in range(STOP + 1, STEPS + 1):
            assert found[tag][step] == pytest.approx(reference[tag][step], rel=1e-5), f"{tag} at step {step}"


def test_finished_stage_is_not_run_again(folder: Path) -> None:
    before = run_stage(folder, "extend", 1, *SCHEDULE, run="finished")
    events = len(list((folder / "finished" / "extend" / "tensorboard").iterdir()))
    assert run_stage(folder, "extend", 1, *SCHEDULE, run="finished") == before
    assert len(list((folder / "finished" / "extend" / "tensorboard").iterdir())) == events
