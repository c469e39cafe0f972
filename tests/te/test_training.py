# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The stages with Transformer Engine's layers against the local ones: losses, gradients, checkpoints, FP8."""

import dataclasses
from functools import cache
from pathlib import Path

import pytest
import torch

from hydra_mcore.model.build import load_model
from hydra_mcore.model.checkpoints import save_weights
from tests.distributed.test_layouts import LAYOUTS, PACKED, STEPS, assert_same_gradients
from tests.support.commands import printed
from tests.support.launch import model_parallel, run_ranks
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


@pytest.mark.parametrize("stage", ["align", pytest.param("distill", marks=pytest.mark.slow), "extend"])
def test_fp8_in_every_stage(folder: Path, rounded_student: Path, stage: str) -> None:
    """Emulated. A product rounds inputs, weights and output gradients, each about as much: together they may move the
    model's gradients three times as far as rounded weights alone, which needs no FP8 to see.
    """
    losses, expected = local(folder, stage)
    run_stage(folder, stage, 1, *STEPS, *LOCAL, run="rounded", start_from=rounded_student)
    ranks, flags = LAYOUTS["tp2-cp1-pp2-dp1"]
    found = run_stage(folder, stage, ranks, *STEPS, *TE, *FP8, *flags, run="fp8")
    assert found[f"{stage} loss"] == pytest.approx(losses[f"{stage} loss"], rel=1e-2)
    bound, error = (distance(gradients(folder / run / stage / "iter_0000001"), expected) for run in ("rounded", "fp8"))
    assert 0.5 * bound < error < 3 * bound


def test_the_teacher_computes_in_fp8_when_asked(folder: Path) -> None:
    teacher = [
        run_stage(folder, "distill", 1, *STEPS, *TE, *FP8, *words, run=run)["distill loss"]
        for run, words in (("fp8-student", ()), ("fp8-both", ("--teacher-fp8",)))
    ]
    losses, _ = local(folder, "distill")
    assert teacher[0] != teacher[1] and teacher[1] == pytest.approx(losses["distill loss"], rel=1e-2)


def test_what_fp8_trained_is_exported(folder: Path) -> None:
    """By a process without Transformer Engine; the export then computes what the checkpoint does."""
    run_stage(folder, "extend", 1, *STEPS, *TE, *FP8, run="fp8-export")
    trained, export = folder / "fp8-export" / "extend", folder / "hf"
    printed("tools/convert.py", "export", "--checkpoint", trained, "--out", export)
    assert ", 0 failed," in printed("tools/verify.py", trained, "--export", export, "--only", "export")


@pytest.fixture(scope="module")
def rounded_student(folder: Path) -> Path:
    run_ranks(_round_weights, 1, folder / "student", folder / "rounded-student")
    return folder / "rounded-student"


def _round_weights(rank: int, source: Path, target: Path) -> None:
    """Copy a student, the weights of Transformer Engine's products rounded to E4M3 as its recipe "tensorwise" does."""
    in_fp8 = ("linear_q.", "linear_kv.", "linear_proj.", "gate.linear.", "mlp.")
    with model_parallel(), torch.no_grad():
        card, model = load_model(source)
        for name, weight in model.named_parameters():
            if weight.dim() == 2 and any(part in name for part in in_fp8):
                scale = torch.finfo(torch.float8_e4m3fn).max / weight.abs().max()
                weight.copy_((weight * scale).to(torch.float8_e4m3fn).float() / scale)
        save_weights([model], card, target)


def distance(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Of two sets of gradients, in lengths of the second."""
    assert found.keys() == expected.keys()
    difference = torch.stack([(found[name] - value).norm() for name, value in expected.items()]).norm()
    return (difference / torch.stack([value.norm() for value in expected.values()]).norm()).item()
