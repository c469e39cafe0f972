# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The law: the same weights and data give the same losses and gradient norms on every layout."""

from pathlib import Path

import pytest

from hydra_mcore.config import HydraOptions
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


# Every option away from its default, in two sets, because shared K/V exclude per-head ones.
ABLATIONS = {
    "shared-kv": HydraOptions(
        qkv="shared", gdn_kv="per_group", fusion="competition", fa_gate="headwise", gdn_gate="headwise", gate_order="after_norm",
        fa_position="rope", gdn_position="nope", gdn_conv_kernel=0, gdn_qk_norm="none", fusion_norm_weight="none",
    ),
    "per-group": HydraOptions(
        gdn_kv="per_group", fusion="norm", fa_gate="none", gdn_gate="elementwise", gate_activation="silu", fa_log_scale="always",
        gdn_conv_activation="silu", gdn_write_max=2.0, gdn_half_life=10.0, fa_log_scale_base=20.0,
    ),
    "bare": HydraOptions(fusion="none", fa_gate="none", fa_log_scale="never", gdn_conv_kernel=2),
}  # fmt: skip


@pytest.mark.parametrize("options", ABLATIONS.values(), ids=ABLATIONS.keys())
def test_every_option_is_the_same_on_four_ranks(tmp_path: Path, options: HydraOptions) -> None:
    folder = make_run(tmp_path, options=options)
    one = run_stage(folder, "extend", 1, run="one")
    four = run_stage(folder, "extend", 4, *TP4, *SP, run="four")
    for tag in ("extend loss", "grad-norm"):
        for step, value in one[tag].items():
            assert four[tag][step] == pytest.approx(value, rel=1e-5), f"{tag} at step {step}"
