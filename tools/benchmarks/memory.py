# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Measure the peak memory a token of align and distill, beside end-to-end backpropagation of the same model."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from unittest.mock import patch

import torch

from hydra_mcore.config import ModelShape
from hydra_mcore.model.runtime import process_groups
from hydra_mcore.train import align
from hydra_mcore.train.data import MicroBatch
from tools.benchmarks.measure import peak_bytes
from tools.benchmarks.micro_batch import TeacherAndStudent, student_card
from tools.benchmarks.report import Report

SHAPE = ModelShape(
    num_layers=8, hidden_size=256, num_heads=8, num_kv_groups=4, head_dim=32, ffn_hidden_size=768, vocab_size=65_536,
    native_length=2048
)  # fmt: skip
FA_HEADS = 2
ROWS = {
    "align": "align, each layer fitted on the spot",
    "align, graphs kept": "align, all layers' graphs kept until one backward",
    "distill": "distill, loss fused with the output layer in chunks",
    "distill, full logits": "distill, full logits of both models",
    "end to end": "end-to-end backpropagation (student alone, next-token loss on full logits)",
}


def run(args: argparse.Namespace) -> Report:
    found = bytes_per_token(tuple(args.lengths))
    whole = found["end to end"]
    rows = [[title, f"{found[name] / 1024:.1f}", f"{found[name] / whole:.2f}"] for name, title in ROWS.items()]
    notes = f"Growth from {args.lengths[0]} to {args.lengths[1]} tokens, float32; what the weights take cancels."
    return Report("Peak memory of one micro-batch", notes, ("one micro-batch", "KiB a token", "of end to end"), rows)


def bytes_per_token(lengths: tuple[int, int], shape: ModelShape = SHAPE) -> dict[str, float]:
    """Growth of each row's peak from the first length to the second, in float32 bytes a token (weights' part
    cancels).
    """
    with process_groups():
        peaks = [_peaks(length, shape) for length in lengths]
    return {name: (peaks[1][name] - peaks[0][name]) / (lengths[1] - lengths[0]) for name in ROWS}


def _peaks(length: int, shape: ModelShape) -> dict[str, int]:
    pair = TeacherAndStudent(student_card(shape, FA_HEADS))
    batch = pair.batch(length)
    runs = {
        "align": lambda: pair.step("align", batch),
        "align, graphs kept": lambda: _with_graphs_kept(pair, batch),
        "distill": lambda: pair.step("distill", batch),
        "distill, full logits": lambda: pair.distill_whole_logits(batch),
        "end to end": lambda: (
            pair.student(batch.tokens_bs, batch.position_ids_bs, None, labels=batch.labels_bs).mean().backward()
        ),
    }
    return {name: peak_bytes(run, "cpu") for name, run in runs.items()}


def _with_graphs_kept(pair: TeacherAndStudent, batch: MicroBatch) -> None:
    def keep(loss: Callable[[], torch.Tensor], *parameters: torch.Tensor) -> torch.Tensor:
        return loss()

    with patch.object(align.GradientAtOnce, "apply", keep):
        pair.step("align", batch)
