# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Run one micro-batch of each stage for a random teacher and student, through the code that training runs."""

from __future__ import annotations

import dataclasses
import itertools

import torch
import torch.nn.functional as F

from hydra_mcore.config import HydraOptions, ModelCard, ModelShape, StageOptions, teacher_card
from hydra_mcore.heads import HeadMap
from hydra_mcore.model.build import build_model
from hydra_mcore.model.forward import hidden_and_weight
from hydra_mcore.stages import STAGES
from hydra_mcore.train.data import MicroBatch
from hydra_mcore.train.losses import token_loss
from hydra_mcore.train.step import forward_step
from tools.benchmarks.shapes import spread_heads

CHUNK_ELEMENTS = token_loss.__kwdefaults__["chunk_elements"]


def student_card(shape: ModelShape, fa_heads: int) -> ModelCard:
    """A student with so many FA heads in every layer, in as many kv groups as there are.

    Raises:
        InputError: more heads than a layer has.
    """
    pairs = itertools.product(range(shape.num_layers), spread_heads(fa_heads, shape))
    head_map = HeadMap.from_fa(pairs, shape.num_layers, shape.num_heads, shape.num_kv_groups)
    return dataclasses.replace(
        teacher_card(shape, "f" * 64), head_map=head_map, options=HydraOptions(), stage="student"
    )


class TeacherAndStudent:
    """A teacher, its student and one row of random tokens; needs Megatron's process groups
    (``runtime.process_groups``).

    Its methods run forward and backward of one micro-batch and add to gradients that are there before, as in Megatron's
    buffers.
    """

    def __init__(self, card: ModelCard, dtype: torch.dtype = torch.float32) -> None:
        self.teacher = build_model(teacher_card(card.shape, card.fingerprint), "distill", dtype).requires_grad_(False)
        self.student = build_model(card, "distill", dtype)
        self.vocab_size = card.shape.vocab_size
        for parameter in self.student.parameters():
            parameter.grad = torch.zeros_like(parameter)

    def batch(self, length: int) -> MicroBatch:
        """Random tokens [1, length], each of them counted."""
        tokens_bs = torch.randint(self.vocab_size, (1, length), device=torch.cuda.current_device())
        return MicroBatch(
            tokens_bs,
            tokens_bs,
            torch.ones_like(tokens_bs).float(),
            torch.arange(length, device=tokens_bs.device)[None],
            None,
        )

    def step(self, stage: str, batch: MicroBatch) -> None:
        """A stage as the training loop runs it."""
        row = STAGES[stage]
        for name, parameter in self.student.named_parameters():
            parameter.requires_grad_(row.trains in name)
        self.teacher.post_process = row.needs_teacher_logits  # else training builds no output layer for it
        step = forward_step(StageOptions(stage=stage, head_statistics_interval=0), lambda *_: batch, lambda: 1)
        step.prepare([self.student], [self.teacher] if row.needs_teacher else [])
        output, to_loss = step(None, self.student)
        to_loss(output)[0].backward()

    @torch.no_grad()
    def teacher_forward(self, batch: MicroBatch) -> None:
        """The teacher's logits, made for as many tokens at a time as the loss does."""
        self.teacher.post_process = True
        inputs = (batch.tokens_bs, batch.position_ids_bs, None)
        hidden_sbm, weight_wm = self.teacher(*inputs, output_processor=hidden_and_weight)
        for hidden_cm in hidden_sbm.flatten(0, 1).split(max(1, CHUNK_ELEMENTS // len(weight_wm))):
            hidden_cm @ weight_wm.t()

    def distill_whole_logits(self, batch: MicroBatch) -> None:
        """The loss of distill from the logits of all tokens at once, as one would write it first."""
        self.teacher.post_process = True
        self.student.requires_grad_(True)
        inputs, options = (batch.tokens_bs, batch.position_ids_bs, None), StageOptions(stage="distill")
        with torch.no_grad():
            teacher_bsw = self.teacher(*inputs).float().log_softmax(-1)
        student_bsw = self.student(*inputs).float().log_softmax(-1)
        kl = F.kl_div(student_bsw, teacher_bsw, log_target=True, reduction="sum")
        ce = F.nll_loss(student_bsw.flatten(0, 1), batch.labels_bs.flatten(), reduction="sum")
        (options.kl_weight * kl + options.ce_weight * ce).backward()
