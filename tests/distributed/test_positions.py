# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""FA heads keep rotary positions for a while: a stage that takes them away trains what never had them."""

from pathlib import Path

import pytest

from hydra_mcore.config import HydraOptions, ModelCard
from tests.support.stages import make_run, run_stage

STEPS = ("--train-iters", "4", "--save-interval", "2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two students with the same weights: rotary has none of its own."""
    folder = tmp_path_factory.mktemp("positions")
    for position in ("rope", "nope"):
        make_run(folder / position, options=HydraOptions(fa_position=position))
    return folder


def losses(folder: Path, *flags: str, run: str = "run") -> dict[int, float]:
    return run_stage(folder, "extend", 1, *STEPS, *flags, run=run)["extend loss"]


def test_a_stage_that_drops_rotary_trains_a_student_without(folder: Path) -> None:
    expected, rotary = losses(folder / "nope"), losses(folder / "rope")
    dropped = losses(folder / "rope", "--fa-position", "nope", run="dropped")
    assert dropped == expected
    assert all(abs(rotary[step] - expected[step]) > 1e-4 for step in expected)  # so it matters here
    cards = [ModelCard.load(folder / "rope" / run / "extend") for run in ("run", "dropped")]
    assert [card.options.fa_position for card in cards] == ["rope", "nope"]


def test_it_goes_on_where_it_stopped_and_not_with_other_positions(folder: Path) -> None:
    whole = losses(folder / "rope", "--fa-position", "nope", run="whole")
    losses(folder / "rope", "--fa-position", "nope", "--exit-interval", "2", run="stopped")
    with pytest.raises(AssertionError, match=r"already holds another run \(fa_position is 'nope' there, 'rope' here"):
        losses(folder / "rope", run="stopped")
    assert losses(folder / "rope", "--fa-position", "nope", run="stopped") == whole
