# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The table by part of GPU time.

Not yet run on a GPU; tests/unit/train/test_profile_table.py reads traces written by hand.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hydra_mcore.config import ModelShape
from hydra_mcore.model.fusion import Fusion
from hydra_mcore.model.runtime import process_groups
from hydra_mcore.train.profile import profiled
from tools.benchmarks.micro_batch import TeacherAndStudent, student_card

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU (not yet run on one)"),
]
SHAPE = ModelShape(
    num_layers=2, hidden_size=256, num_heads=4, num_kv_groups=2, head_dim=64, ffn_hidden_size=256, vocab_size=512,
    native_length=256
)  # fmt: skip
CYCLES = 20_000_000  # some 10 ms of a GPU, far more than any part here takes


class Slow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        torch.cuda._sleep(CYCLES)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        torch.cuda._sleep(2 * CYCLES)
        return gradient


@pytest.mark.parametrize("stage", ["align", "distill"])
def test_a_slow_kernel_stands_in_its_part(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stock = Fusion.forward
    with process_groups():
        pair = TeacherAndStudent(student_card(SHAPE, 1), torch.bfloat16)
        pair.teacher.to("cuda")
        pair.student.to("cuda")
        batch = pair.batch(128)
        pair.step(stage, batch)
        monkeypatch.setattr(Fusion, "forward", lambda *args, **keywords: Slow.apply(stock(*args, **keywords)))
        table = profiled(lambda: pair.step(stage, batch), [pair.student], [pair.teacher])
    assert table.device == "gpu" and table.total < 1.5 * table.wall_seconds
    forward, backward, teacher = (table.of("fusion", of_pass) for of_pass in ("forward", "backward", "teacher"))
    assert teacher == pytest.approx(forward, rel=0.2) and backward == pytest.approx(2 * forward, rel=0.2)
    assert forward + backward + teacher > 0.8 * table.total
    assert table.of("projections", "backward") > 0 < table.of("GDN delta rule", "backward")
