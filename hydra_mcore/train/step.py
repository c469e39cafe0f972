# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Teacher and student as one forward unit: what a micro-batch computes on one pipeline stage."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.utils import unwrap_model
from torch import Tensor

from hydra_mcore.config import StageOptions
from hydra_mcore.model.forward import hidden_and_weight
from hydra_mcore.stages import STAGES
from hydra_mcore.train.align import JoinPipeline, align_forward
from hydra_mcore.train.anomalies import first_nonfinite_layer, nonfinite, stop_together
from hydra_mcore.train.data import MicroBatch
from hydra_mcore.train.head_statistics import HeadMonitor, layer_name
from hydra_mcore.train.losses import TokenLoss, token_loss

ToLoss = Callable[[Tensor], tuple]  # from the last pipeline stage's output to what Megatron's schedules ask of a loss


class TransferStep(ABC):
    """The forward step of a stage, in the form that Megatron's schedules call.

    Args:
        fetch: (data_iterator, model chunk) -> this rank's micro-batch.
        step_number: the 1-based training step under way.
    """

    def __init__(
        self, options: StageOptions, fetch: Callable[[Any, GPTModel], MicroBatch], step_number: Callable[[], int]
    ) -> None:
        self.options, self.fetch, self.step_number = options, fetch, step_number
        self.students: list[GPTModel] = []
        self.teachers: dict[int, GPTModel] = {}
        self.monitors: list[HeadMonitor] = []
        self.stop_reason: str | None = None

    def prepare(self, students: list[GPTModel], teachers: list[GPTModel]) -> None:
        """Put the frozen teacher's same layers beside each model chunk of this rank; no teachers in a stage without
        one.
        """
        self.teachers = {id(student): teacher for student, teacher in zip(students, teachers, strict=False)}
        self.students = students
        self.monitors = [HeadMonitor(student, self.heads_due) for student in students]

    def heads_due(self) -> bool:
        """Whether the step under way gathers the statistics of heads: the first one, and every so many."""
        step, interval = self.step_number(), self.options.head_statistics_interval
        return interval > 0 and (step == 1 or step % interval == 0)

    def __call__(self, data_iterator: Any, model: torch.nn.Module) -> tuple[Tensor | TokenLoss, ToLoss]:
        """Run one micro-batch; returns this stage's output and the function that turns the last one into the loss."""
        student = unwrap_model(model)
        return self.forward(model, student, self.fetch(data_iterator, student))

    @abstractmethod
    def forward(
        self, model: torch.nn.Module, student: GPTModel, batch: MicroBatch
    ) -> tuple[Tensor | TokenLoss, ToLoss]:
        """The step of one micro-batch, with the results of ``__call__``; ``model`` is the student in the wrappers of
        training.
        """

    def finish(self) -> dict[str, Tensor]:
        """(sum, count) pairs to report of a whole step, over all layers of the pipeline.

        In the form that Megatron sums over micro-batches and data for console, TensorBoard and W&B. Called by all
        ranks.

        Raises:
            TrainingStopped: a rank met a loss that is not finite, before any parameter has moved.
        """
        stop_together(self.stop_reason)
        return {}

    def must_stop(self, where: str) -> None:
        """Note for ``finish`` where a value was not finite; the first one of a step counts."""
        self.stop_reason = self.stop_reason or nonfinite(self.step_number(), where)


class AlignStep(TransferStep):
    """The attention output of every layer is fitted to the teacher's by itself; the teacher's hidden state travels."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.losses: dict[int, Tensor] = {}  # layer -> (sum, count) over the micro-batches of a step

    def forward(self, model: torch.nn.Module, student: GPTModel, batch: MicroBatch) -> tuple[Tensor, ToLoss]:
        hidden_sbm, losses = align_forward(self.teachers[id(student)], student, batch, self.options)
        layers = [layer.layer_number - 1 for layer in student.decoder.layers]
        finite = torch.isfinite(losses.detach())
        if not bool(finite.all()):
            self.must_stop(f"the {self.options.stage} loss of layer {layers[int(finite.int().argmin())]}")
        for layer_idx, loss in zip(layers, losses.detach(), strict=True):
            self.losses[layer_idx] = self.losses.get(layer_idx, 0.0) + torch.stack([loss, torch.ones_like(loss)])
        total, entry = losses.sum(), student.decoder.input_tensor
        output = total if student.post_process else hidden_sbm
        scale = 0.0 if student.post_process else student.pg_collection.cp.size() / get_num_microbatches()
        return JoinPipeline.apply(output, total, entry, scale), lambda loss: (loss, {})

    def finish(self) -> dict[str, Tensor]:
        """The loss of every layer, and their sum."""
        report, student, name = super().finish(), self.students[0], f"{self.options.stage} loss"
        empty = torch.zeros(2, device=torch.cuda.current_device())
        losses = torch.stack([self.losses.get(layer_idx, empty) for layer_idx in range(student.config.num_layers)])
        self.losses.clear()
        if student.pg_collection.pp.size() > 1:
            torch.distributed.all_reduce(losses, group=student.pg_collection.pp)
        report[name] = torch.stack([losses[:, 0].sum(), losses[0, 1]])
        return report | {f"{name}/{layer_name(layer_idx)}": pair for layer_idx, pair in enumerate(losses)}


class TokenStep(TransferStep):
    """The student's next tokens are compared with the text's and, where there is a teacher, with its logits."""

    def forward(
        self, model: torch.nn.Module, student: GPTModel, batch: MicroBatch
    ) -> tuple[Tensor | TokenLoss, ToLoss]:
        output = partial(self._output, model, student, batch)
        return output(), partial(self._result, student, output, batch)

    def _output(self, model: torch.nn.Module, student: GPTModel, batch: MicroBatch) -> Tensor | TokenLoss:
        """The hidden state for the next stage (teacher's and student's along the batch axis), or the losses on the
        last.
        """
        teacher = self.teachers.get(id(student))
        inputs = {"input_ids": batch.tokens_bs, "position_ids": batch.position_ids_bs, "attention_mask": None}
        inputs |= {"packed_seq_params": batch.documents}
        teacher_sbm = None
        if teacher is not None:
            if (entry := student.decoder.input_tensor) is not None:
                teacher_in, student_in = entry.chunk(2, dim=1)
                teacher.set_input_tensor(teacher_in.detach())
                student.set_input_tensor(student_in)
            with torch.no_grad():
                teacher_sbm = teacher(**inputs, output_processor=hidden_and_weight)
        if student.post_process:
            return TokenLoss(
                *model(**inputs, output_processor=self._losses, output_processor_context=(student, batch, teacher_sbm))
            )
        student_sbm = model(**inputs)
        return student_sbm if teacher_sbm is None else torch.cat([teacher_sbm, student_sbm], dim=1)

    def _losses(self, context: tuple, **output: Any) -> TokenLoss:
        student, batch, teacher = context
        options, group = self.options, student.pg_collection.tp
        whole = (
            gather_from_sequence_parallel_region
            if student.config.sequence_parallel
            else copy_to_tensor_model_parallel_region
        )
        distillation = {}
        if teacher is not None:
            hidden_sbm, weight_wm = teacher
            distillation = {
                "teacher": (whole(hidden_sbm, group=group), weight_wm),
                "ce_weight": options.ce_weight,
                "kl_weight": options.kl_weight,
                "temperature": options.kl_temperature,
            }
        hidden_sbm, weight_wm = hidden_and_weight(**output)
        hidden_sbm = whole(hidden_sbm, group=group)
        return token_loss(hidden_sbm, weight_wm, batch.labels_bs, batch.mask_bs, tp_group=group, **distillation)

    def _result(self, student: GPTModel, output: Callable[[], object], batch: MicroBatch, losses: TokenLoss) -> tuple:
        """Loss of the micro-batch, how many tokens count, and the report: the same on every layout.

        Megatron averages over context-parallel ranks what it divides by a micro-batch's own count. Parts may count
        different numbers of tokens, so each divides by the count of all parts, and the average becomes a sum.
        """
        name = f"{self.options.stage} loss"
        if not bool(torch.isfinite(losses.loss.detach())):
            # the forward pass is run again by this rank (and its tensor-parallel peers, whose loss is the same) alone
            whole = student.pg_collection.pp.size() == student.pg_collection.cp.size() == 1
            where = f" (first seen in {first_nonfinite_layer(student, output)})" if whole else ""
            self.must_stop(f"the {name}{where}")
        count = batch.mask_bs.sum()
        report = {name: torch.stack([losses.loss.detach(), count])}
        if self.teachers:
            report |= {"kl": torch.stack([losses.kl, count]), "ce": torch.stack([losses.ce, count])}
        if student.config.calculate_per_token_loss:
            return losses.loss, count.to(torch.int), report
        count, group = count.clone(), student.pg_collection.cp
        if group.size() > 1:
            torch.distributed.all_reduce(count, group=group)
        return losses.loss * group.size(), count.to(torch.int), report


def forward_step(
    options: StageOptions, fetch: Callable[[Any, GPTModel], MicroBatch], step_number: Callable[[], int]
) -> TransferStep:
    """The step of a stage; arguments as those of ``TransferStep``."""
    return (AlignStep if STAGES[options.stage].fits_layers else TokenStep)(options, fetch, step_number)
