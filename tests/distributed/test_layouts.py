# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The law: the same weights and data give the same losses and gradient norms on every layout."""

from pathlib import Path

import pytest

from tests.support.stages import make_run, run_stage

TP2 = ("--tensor-model-parallel-size", "2")
TP4 = ("--tensor-model-parallel-size", "4")
PP2 = ("--pipeline-model-parallel-size", "2")
SP = ("--sequence-parallel",)

LAYOUTS = {"tp2": (2, TP2), "tp2-sp": (2, TP2 + SP), "tp4": (4, TP4), "tp4-sp": (4, TP4 + SP), "dp2": (2, ()), "tp2-sp-dp2": (4, TP2 + SP)}
PIPELINES = {"pp2": (2, PP2), "tp2-pp2-dp2": (8, TP2 + PP2), "tp2-sp-pp2-dp2": (8, TP2 + PP2 + SP)}
CASES = [(stage, name) for stage in ("align", "distill", "extend") for name in LAYOUTS] + [("extend", name) for name in PIPELINES]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("layouts"))


@pytest.fixture(scope="module")
def single(folder: Path) -> dict[str, dict]:
    return {stage: run_stage(folder, stage, 1, run=f"{stage}-single") for stage in ("align", "distill", "extend")}


@pytest.mark.parametrize(("stage", "layout"), CASES, ids=lambda value: value)
def test_losses_and_gradient_norms_equal_one_process(folder: Path, single: dict[str, dict], stage: str, layout: str) -> None:
    ranks, flags = (LAYOUTS | PIPELINES)[layout]
    found = run_stage(folder, stage, ranks, *flags, run=f"{stage}-{layout}")
    for tag in (f"{stage} loss", "grad-norm"):
        assert list(found[tag]) == list(range(1, 11))
        for step, value in single[stage][tag].items():
            assert found[tag][step] == pytest.approx(value, rel=1e-5), f"{tag} at step {step}"
