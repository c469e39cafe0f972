# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The stages with Transformer Engine's layers against the local ones: losses, gradients, checkpoints, FP8."""

import dataclasses
from functools import cache
from pathlib import Path

import pytest
import torch

from tests.distributed.test_layouts import LAYOUTS, PACKED, STEPS, assert_same_gradients
from tests.support.stages import SHAPE, gradients, make_run, run_stage

LOCAL, TE = (("--transformer-impl", name) for name in ("local", "transformer_engine"))
FP8 = ("--fp8-format", "hybrid", "--fp8-recipe", "tensorwise")
# FP8 takes multiples of 16.
WIDE = dataclasses.replace(SHAPE, head_dim=16, ffn_hidden_size=64)
QUICK = [("tp2-cp2-pp2-dp1", "distill"), ("tp2-cp1-pp1-dp2", "align"), ("cp2-dp2-overlap", "extend")]
CASES = [
    pytest.param(name, stage, marks=() if (name, stage) in QUICK else pytest.mark.slow)
    for name in LAYOUTS
    for stage in ("align", "distill", "extend")
    if (name, stage) != ("cp2-per-token-loss", "align")
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("te"), shape=WIDE)


@cache
def local(folder: Path, stage: str, *flags: str) -> tuple[dict[str, dict[int, float]], dict[str, torch.Tensor]]:
    """Losses of two steps with local layers on one process, and the gradients of the first."""
    run = "-".join(("local", *(flag.strip("-") for flag in flags)))
    return run_stage(folder, stage, 1, *STEPS, *LOCAL, *flags, run=run), gradients(
        folder / run / stage / "iter_0000001"
    )


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
