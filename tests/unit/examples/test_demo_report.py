# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The demo's report reads the losses of a stage."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from torch.utils.tensorboard import SummaryWriter

from examples.tiny.demo_report import read_losses


def test_losses_are_read_without_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with SummaryWriter(str(tmp_path / "align" / "tensorboard")) as writer:
        for step in (1, 2):
            writer.add_scalar("align loss", 3.0 / step, step)
    caplog.set_level(logging.INFO)  # as Megatron's import leaves it
    assert read_losses(tmp_path / "align") == ([1, 2], [3.0, 1.5])
    assert not caplog.records
