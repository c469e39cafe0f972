# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Save, stop and go on: exactly as if never stopped, and on another layout with the same losses."""

import shutil
from pathlib import Path

import pytest

from tests.support.stages import make_run, run_stage

STEPS, STOP = 6, 3
SCHEDULE = ("--train-iters", str(STEPS), "--save-interval", str(STOP), "--micro-batch-size", "1")


def sizes(tp: int = 1, cp: int = 1, pp: int = 1) -> tuple[str, ...]:
    return (
        f"--tensor-model-parallel-size={tp}",
        f"--context-parallel-size={cp}",
        f"--pipeline-model-parallel-size={pp}",
    )


VIRTUAL = ("--num-layers-per-virtual-pipeline-stage", "1")
QUERIES = ("--fa-balance", "queries")
LAYOUTS = {
    "one": (1, ()),
    "tp2": (2, sizes(tp=2)),
    "cp2-dp2": (4, sizes(cp=2)),
    "tp4-queries": (4, (*sizes(tp=4), *QUERIES)),
    "pp2-virtual": (2, (*sizes(pp=2), *VIRTUAL)),
    "tp2-cp2-pp2": (8, (*sizes(tp=2, cp=2, pp=2), *QUERIES, "--sequence-parallel")),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("resume"))


@pytest.mark.parametrize(
    ("stage", "ranks", "flags"),
    [
        ("align", 2, ()),
        ("distill", 2, ()),
        ("extend", 2, ()),
        ("distill", 4, (*sizes(cp=2, pp=2), "--packed-documents")),
    ],
    ids=["align-dp2", "distill-dp2", "extend-dp2", "distill-cp2-pp2-packed"],
)
def test_resumed_run_equals_uninterrupted_run(folder: Path, stage: str, ranks: int, flags: tuple[str, ...]) -> None:
    name = f"{ranks}-{len(flags)}"
    whole = run_stage(folder, stage, ranks, *SCHEDULE, *flags, run=f"whole-{name}")
    first = run_stage(folder, stage, ranks, *SCHEDULE, *flags, "--exit-interval", str(STOP), run=f"parts-{name}")
    assert max(first["grad-norm"]) == STOP
    resumed = run_stage(folder, stage, ranks, *SCHEDULE, *flags, run=f"parts-{name}")
    for tag in (f"{stage} loss", "grad-norm", "learning-rate"):
        assert resumed[tag] == whole[tag]


@pytest.fixture(scope="module")
def stopped(folder: Path) -> dict[str, Path]:
    """Runs by the layout that they were stopped on, filled as tests ask."""
    return {}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("tp2", "one"),
        pytest.param("tp2", "tp4-queries", marks=pytest.mark.slow),
        pytest.param("tp4-queries", "pp2-virtual", marks=pytest.mark.slow),
        pytest.param("cp2-dp2", "tp2", marks=pytest.mark.slow),
        ("pp2-virtual", "cp2-dp2"),
        pytest.param("tp2-cp2-pp2", "one", marks=pytest.mark.slow),
        pytest.param("tp2-cp2-pp2", "tp4-queries", marks=pytest.mark.slow),
        pytest.param("one", "tp2-cp2-pp2", marks=pytest.mark.slow),
        pytest.param("cp2-dp2", "pp2-virtual", marks=pytest.mark.slow),
    ],
)
def test_checkpoint_goes_on_with_another_layout(
    folder: Path, stopped: dict[str, Path], before: str, after: str
) -> None:
    if before not in stopped:
        ranks, flags = LAYOUTS[before]
        run_stage(folder, "distill", ranks, *SCHEDULE, *flags, "--exit-interval", str(STOP), run=before)
        stopped[before] = folder / before
    reference = run_stage(folder, "distill", 1, *SCHEDULE, run="reference")  # a second call only reads its log
    run, (ranks, flags) = f"{before}-to-{after}", LAYOUTS[after]
    shutil.copytree(stopped[before], folder / run)
    found = run_stage(folder, "distill", ranks, *SCHEDULE, *flags, run=run)
    for tag in ("distill loss", "grad-norm"):
        for step in range(STOP + 1, STEPS + 1):
            assert found[tag][step] == pytest.approx(reference[tag][step], rel=1e-5), f"{tag} at step {step}"


def test_finished_stage_is_not_run_again(folder: Path) -> None:
    before = run_stage(folder, "extend", 1, *SCHEDULE, run="finished")
    events = len(list((folder / "finished" / "extend" / "tensorboard").iterdir()))
    assert run_stage(folder, "extend", 1, *SCHEDULE, run="finished") == before
    assert len(list((folder / "finished" / "extend" / "tensorboard").iterdir())) == events
