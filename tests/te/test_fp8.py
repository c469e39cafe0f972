# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""FP8 products of Transformer Engine, emulated: every stage, the teacher, and the export of what was trained."""

from pathlib import Path

import pytest
import torch

from hydra_mcore.model.build import load_model
from hydra_mcore.model.checkpoints import save_weights
from tests.distributed.test_layouts import LAYOUTS, STEPS
from tests.support.commands import printed
from tests.support.launch import model_parallel, run_ranks
from tests.support.stages import gradients, run_stage
from tests.te.stages import LOCAL, TE, local

FP8 = ("--fp8-format", "hybrid", "--fp8-recipe", "tensorwise")


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
