# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The stages with Transformer Engine's layers against the local ones: losses, gradients, checkpoints."""

from pathlib import Path

import pytest

from tests.distributed.test_layouts import LAYOUTS, PACKED, STEPS, assert_same_gradients
from tests.support.stages import gradients, run_stage
from tests.te.stages import LOCAL, TE, local

QUICK = [("tp2-cp2-pp2-dp1", "distill"), ("tp2-cp1-pp1-dp2", "align"), ("cp2-dp2-overlap", "extend")]
CASES = [
    pytest.param(name, stage, marks=() if (name, stage) in QUICK else pytest.mark.slow)
    for name in LAYOUTS
    for stage in ("align", "distill", "extend")
    if (name, stage) != ("cp2-per-token-loss", "align")
]


@pytest.mark.parametrize(("name", "stage"), CASES)
def test_stages_on_layouts_equal_local_layers_on_one_process(folder: Path, name: str, stage: str) -> None:
    ranks, flags = LAYOUTS[name]
    packed = PACKED if "cp2" in name else ()
    per_token = tuple(flag for flag in flags if flag == "--calculate-per-token-loss")
    losses, expected = local(folder, stage, *packed, *per_token)
    found = run_stage(folder, stage, ranks, *STEPS, *TE, *flags, *packed, run=f"te-{name}")
    for tag in (f"{stage} loss", "grad-norm"):
        assert list(found[tag]) == [1, 2]
        for step, value in losses[tag].items():
            assert found[tag][step] == pytest.approx(value, rel=1e-5), f"{tag} at step {step}"
    assert_same_gradients(gradients(folder / f"te-{name}" / stage / "iter_0000001"), expected)


# Two implementations and layouts that share nothing: tensor, sequence and pipeline parallelism, and one process.
ELSEWHERE = LAYOUTS["tp2-cp1-pp2-dp1"]


@pytest.mark.parametrize("first", ["transformer_engine", "local"])
def test_a_run_goes_on_with_the_other_layers_on_another_layout(folder: Path, first: str) -> None:
    """Four steps in one go against two, then two more: weights and moments serve both implementations."""
    length = ("--train-iters", "4", "--save-interval", "2", "--lr-warmup-iters", "1", "--micro-batch-size", "1")
    whole = run_stage(folder, "extend", 1, *length, *LOCAL, run="whole")
    before, after = (TE, LOCAL) if first == "transformer_engine" else (LOCAL, TE)
    parts = [(*ELSEWHERE, before), (1, (), after)]
    for (ranks, flags, layers), stop in zip(parts, (("--exit-interval", "2"), ()), strict=True):
        found = run_stage(folder, "extend", ranks, *length, *layers, *flags, *stop, run=f"first-{first}")
    for tag in ("extend loss", "grad-norm"):
        assert found[tag] == pytest.approx(whole[tag], rel=1e-5)
    states = [gradients(folder / run / "extend" / "iter_0000004") for run in (f"first-{first}", "whole")]
    assert_same_gradients(*states)


def test_weight_gradients_may_be_added_where_they_are_kept(folder: Path, tmp_path: Path) -> None:
    """Transformer Engine then returns numbers without meaning, here none at all, to be ignored."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("no-gradient-accumulation-fusion: false\n")
    for stage, name in (("distill", "tp2-cp1-pp1-dp1"), ("align", "tp1-cp1-pp1-dp2")):
        ranks, flags = LAYOUTS[name]
        losses, expected = local(folder, stage)
        found = run_stage(folder, stage, ranks, *STEPS, *TE, *flags, "--config", str(recipe), run="fused")
        assert found[f"{stage} loss"] == pytest.approx(losses[f"{stage} loss"], rel=1e-5)
        assert_same_gradients(gradients(folder / "fused" / stage / "iter_0000001"), expected)
