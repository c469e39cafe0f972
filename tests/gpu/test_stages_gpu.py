# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The three stages on one GPU in bfloat16, each a process of its own as a user starts it. Not yet run on a GPU."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU (not yet run on one)"),
]
STAGES = ("align", "distill", "extend")
STEPS = 6


@pytest.mark.timeout(400)
def test_all_stages_in_turn(run_folder: Path, train: Callable[..., dict[int, float]]) -> None:
    (run_folder / "run").mkdir()
    (run_folder / "run" / "student").symlink_to(run_folder / "student")
    for stage in STAGES:
        packed = () if stage == "distill" else ("--packed-documents", "--micro-batch-size", "1")
        losses = train(stage, "--train-iters", str(STEPS), *packed)
        assert len(losses) == STEPS and all(math.isfinite(loss) for loss in losses.values()), losses
        assert losses[STEPS] < losses[1], f"{stage}: {losses}"
