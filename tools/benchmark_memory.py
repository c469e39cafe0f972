# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Peak memory of one training micro-batch of align and distill, beside end-to-end backpropagation of the same model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from unittest.mock import patch

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel

from hydra_mcore.config import HydraOptions, ModelCard, ModelShape, StageOptions
from hydra_mcore.heads import HeadMap
from hydra_mcore.model.build import build_model, teacher_card
from hydra_mcore.model.runtime import process_groups
from hydra_mcore.train import align, pair
from hydra_mcore.train.data import Batch
from tools.tracked_memory import tracked_peak

SHAPE = ModelShape(
    num_layers=8, hidden_size=256, num_heads=8, num_kv_groups=4, head_dim=32, ffn_hidden_size=768, vocab_size=65_536, native_length=2048
)  # fmt: skip
ROWS = {
    "align": "align, each layer fitted on the spot",
    "align, graphs kept": "align, all layers' graphs kept until one backward",
    "distill": "distill, loss fused with the output layer in chunks",
    "distill, full logits": "distill, full logits of both models",
    "end to end": "end-to-end backpropagation (student alone, next-token loss on full logits)",
}


def cards(shape: ModelShape = SHAPE) -> tuple[ModelCard, ModelCard]:
    """A teacher, and its 3:1 student with two FA heads in every layer."""
    teacher = teacher_card(shape, fingerprint="f" * 64)
    pairs = [(layer_idx, head_idx) for layer_idx in range(shape.num_layers) for head_idx in range(0, shape.num_heads, 4)]
    head_map = HeadMap.from_fa(pairs, shape.num_layers, shape.num_heads, shape.num_kv_groups)
    return teacher, dataclasses.replace(teacher, head_map=head_map, options=HydraOptions(), stage="student")


def bytes_per_token(lengths: tuple[int, int], shape: ModelShape = SHAPE) -> dict[str, float]:
    """Growth of each row's peak from the first length to the second, in float32 bytes a token (weights' part cancels)."""
    with process_groups():
        peaks = [_peaks(length, shape) for length in lengths]
    return {name: (peaks[1][name] - peaks[0][name]) / (lengths[1] - lengths[0]) for name in ROWS}


def table(lengths: tuple[int, int]) -> str:
    """A markdown table of ``bytes_per_token``."""
    found = bytes_per_token(lengths)
    lines = [f"| one micro-batch, {lengths[0]} to {lengths[1]} tokens, float32 | KiB a token | of end to end |", "|---|---|---|"]
    lines += [f"| {title} | {found[name] / 1024:.1f} | {found[name] / found['end to end']:.2f} |" for name, title in ROWS.items()]
    return "\n".join(lines)


def _peaks(length: int, shape: ModelShape) -> dict[str, int]:
    teacher_card_, student_card = cards(shape)
    teacher, student = build_model(teacher_card_, "align").requires_grad_(False), build_model(student_card, "align")
    tokens = torch.randint(shape.vocab_size, (1, length))
    batch = Batch(tokens, tokens, torch.ones(1, length), torch.arange(length)[None], None)
    runs = {
        "align": lambda: _transfer("align", teacher, student, batch),
        "align, graphs kept": lambda: _with_graphs_kept(teacher, student, batch),
        "distill": lambda: _transfer("distill", teacher, student, batch),
        "distill, full logits": lambda: _full_logits(teacher, student, batch),
        "end to end": lambda: student(tokens, batch.position_ids_bs, None, labels=tokens).mean().backward(),
    }
    return {name: _peak(student, run) for name, run in runs.items()}


def _peak(student: GPTModel, run: Callable[[], None]) -> int:
    for parameter in student.parameters():
        parameter.grad = torch.zeros_like(parameter)  # as Megatron's buffers: there before the micro-batch
    with tracked_peak() as memory:
        run()
    return memory.peak_bytes


def _transfer(stage: str, teacher: GPTModel, student: GPTModel, batch: Batch) -> None:
    """Forward and backward of a stage, as the training loop runs them."""
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(stage != "align" or "self_attention." in name)
    teacher.post_process = stage != "align"  # training builds no output layer for the align teacher
    step = pair.TransferStep(StageOptions(stage=stage, head_statistics_interval=0), lambda *_: batch, lambda: 1)
    step.prepare([student], [teacher])
    output, to_loss = step(None, student)
    to_loss(output)[0].backward()


def _with_graphs_kept(teacher: GPTModel, student: GPTModel, batch: Batch) -> None:
    def keep(loss: Callable[[], torch.Tensor], *parameters: torch.Tensor) -> torch.Tensor:
        return loss()

    with patch.object(align.GradientAtOnce, "apply", keep):
        _transfer("align", teacher, student, batch)


def _full_logits(teacher: GPTModel, student: GPTModel, batch: Batch) -> None:
    inputs = (batch.tokens_bs, batch.position_ids_bs, None)
    with torch.no_grad():
        teacher_bsw = teacher(*inputs).log_softmax(-1)
    student_bsw = student(*inputs)
    kl = F.kl_div(student_bsw.log_softmax(-1), teacher_bsw, log_target=True, reduction="none").sum(-1).mean()
    (kl + 0.1 * F.cross_entropy(student_bsw.flatten(0, 1), batch.labels_bs.flatten())).backward()
