# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""What tests of stages share: the two implementations of layers, and a run with the local ones to compare with."""

from functools import cache
from pathlib import Path

import torch

from tests.distributed.test_layouts import STEPS
from tests.support.stages import gradients, run_stage

LOCAL, TE = (("--transformer-impl", name) for name in ("local", "transformer_engine"))


@cache
def local(folder: Path, stage: str, *flags: str) -> tuple[dict[str, dict[int, float]], dict[str, torch.Tensor]]:
    """Losses of two steps with local layers on one process, and the gradients of the first."""
    run = "-".join(("local", *(flag.strip("-") for flag in flags)))
    return run_stage(folder, stage, 1, *STEPS, *LOCAL, *flags, run=run), gradients(
        folder / run / stage / "iter_0000001"
    )
