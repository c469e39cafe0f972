# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Teacher and student as one forward unit: what a micro-batch computes in each stage."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.utils import unwrap_model
from torch import Tensor

from hydra_mcore.config import StageOptions
from hydra_mcore.train.losses import align_loss, cross_entropy, kl_divergence
from hydra_mcore.train.monitor import BranchMonitor, first_nonfinite_layer, nonfinite

Batch = dict[str, Tensor | None]


class TransferStep:
    """The forward step of a stage, in the form that Megatron's schedules call.

    Args:
        fetch: (data_iterator, model chunk) -> tokens, labels, loss_mask, position_ids, each [b, s] or None.
        teacher: the frozen all-FA model, or None where the stage has none.
        step_number: the 1-based training step under way, for messages.
    """

    def __init__(
        self, options: StageOptions, fetch: Callable[[Any, GPTModel], Batch], teacher: GPTModel | None, step_number: Callable[[], int]
    ) -> None:
        self.options, self.fetch, self.teacher, self.step_number = options, fetch, teacher, step_number
        self.monitors: dict[int, BranchMonitor] = {}

    def __call__(self, data_iterator: Any, model: torch.nn.Module) -> tuple[Tensor, Callable[[Tensor], tuple]]:
        """Run one micro-batch; returns the output tensor and the function that turns it into the loss."""
        student = unwrap_model(model)
        batch = self.fetch(data_iterator, student)
        if student.post_process and id(student) not in self.monitors:
            self.monitors[id(student)] = BranchMonitor(student, student.pg_collection.tp)
        if self.options.stage == "align":
            losses = align_forward(self.teacher, student, batch["tokens"], batch["position_ids"], self.options.align_loss)
            return losses, partial(self._align_result, student)
        forward = partial(model, batch["tokens"], batch["position_ids"], None)
        if self.options.stage == "extend":
            return forward(labels=batch["labels"]), partial(self._extend_result, student, forward, batch)
        with torch.no_grad():
            teacher_bsw = self.teacher(batch["tokens"], batch["position_ids"], None)
        return forward(), partial(self._distill_result, student, forward, batch, teacher_bsw)

    def _align_result(self, student: GPTModel, losses: Tensor) -> tuple:
        total = losses.sum()
        if not bool(torch.isfinite(total.detach())):
            worst = int(torch.isfinite(losses.detach()).int().argmin())
            raise nonfinite(self.step_number(), f"the align loss of layer {worst}")
        report = {"align loss": _mean_of(total)}
        report.update({f"align layer {layer_idx}": _mean_of(loss) for layer_idx, loss in enumerate(losses)})
        return total, {**report, **self.monitors[id(student)].take()}

    def _extend_result(self, student: GPTModel, forward: Callable, batch: Batch, ce_bs: Tensor) -> tuple:
        return self._token_result(student, forward, batch, ce_bs.float(), {})

    def _distill_result(self, student: GPTModel, forward: Callable, batch: Batch, teacher_bsw: Tensor, student_bsw: Tensor) -> tuple:
        group, options = student.pg_collection.tp, self.options
        kl_bs = kl_divergence(teacher_bsw, student_bsw, options.kl_temperature, group)
        ce_bs = cross_entropy(student_bsw, batch["labels"], group)
        loss_bs = options.kl_weight * kl_bs + options.ce_weight * ce_bs
        return self._token_result(student, forward, batch, loss_bs, {"kl": kl_bs, "ce": ce_bs})

    def _token_result(self, student: GPTModel, forward: Callable, batch: Batch, loss_bs: Tensor, parts: dict[str, Tensor]) -> tuple:
        """Sum over the tokens that count, their number, and the report of the loss and its parts."""
        mask_bs = batch["loss_mask"].float()
        loss = (loss_bs * mask_bs).sum()
        if not bool(torch.isfinite(loss.detach())):
            pipelined = student.pg_collection.pp.size() > 1
            where = "this pipeline stage" if pipelined else first_nonfinite_layer(student, forward)
            raise nonfinite(self.step_number(), f"the {self.options.stage} loss (first seen in {where})")
        count = mask_bs.sum()
        report = {f"{self.options.stage} loss": torch.stack([loss.detach(), count])}
        report.update({name: torch.stack([(part.detach() * mask_bs).sum(), count]) for name, part in parts.items()})
        return loss, count.to(torch.int), {**report, **self.monitors[id(student)].take()}


def align_forward(teacher: GPTModel, student: GPTModel, tokens_bs: Tensor, position_ids_bs: Tensor, kind: str) -> Tensor:
    """One align loss a layer [layers]; every student layer is fed the teacher's own input, so layers do not interact.

    The trunk is the teacher, without gradients; a student layer's graph holds that layer's attention alone.
    """
    with torch.no_grad(), recorded_attention(teacher) as records:
        teacher(tokens_bs, position_ids_bs, None)
    group = student.pg_collection.tp if student.config.sequence_parallel else None
    losses = []
    for layer, (hidden_sbm, rotary, teacher_sbm) in zip(student.decoder.layers, records, strict=True):
        student_sbm, _ = layer.self_attention(hidden_sbm, rotary_pos_emb=rotary)
        losses.append(align_loss(student_sbm, teacher_sbm, kind, group))
    return torch.stack(losses)


@contextlib.contextmanager
def recorded_attention(model: GPTModel) -> Iterator[list[tuple[Tensor, Tensor, Tensor]]]:
    """Collect (input, rotary, output) of every layer's attention while the block is open."""
    records: list[tuple[Tensor, Tensor, Tensor]] = []

    def record(module: torch.nn.Module, inputs: tuple, keywords: dict[str, Any], output: tuple[Tensor, None]) -> None:
        records.append((inputs[0], keywords["rotary_pos_emb"], output[0]))

    hooks = [layer.self_attention.register_forward_hook(record, with_kwargs=True) for layer in model.decoder.layers]
    try:
        yield records
    finally:
        for hook in hooks:
            hook.remove()


def _mean_of(value: Tensor) -> Tensor:
    """(sum, count) of one micro-batch's value, so that Megatron averages it over micro-batches and ranks."""
    return torch.stack([value.detach(), torch.ones_like(value)])
