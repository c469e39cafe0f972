# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Stage align on one pipeline stage: the teacher's layers run, and each student layer is fitted on the spot."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from megatron.core.fp8_utils import get_fp8_context
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.mappings import (
    gather_from_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from hydra_mcore.config import StageOptions
from hydra_mcore.model.hydra_attention import HydraAttention, head_outputs
from hydra_mcore.train.data import MicroBatch

Group = torch.distributed.ProcessGroup


def align_forward(
    teacher: GPTModel, student: GPTModel, batch: MicroBatch, options: StageOptions
) -> tuple[Tensor, Tensor]:
    """The teacher's output [s, b, m] of this pipeline stage, and one align loss for each of its layers [layers].

    Every student layer is fed the teacher's own input, so layers do not interact: the trunk is the teacher, without
    gradients. A layer's gradient is taken as soon as its loss is known, so that no layer's activations are kept while
    another's are made. The pipeline hands the teacher's hidden state from stage to stage. The losses are those of the
    layers' outputs; ``align_heads`` adds the heads' own error to what gradients are taken of.
    """
    teacher.set_input_tensor(student.decoder.input_tensor)
    with_gradient = torch.is_grad_enabled()
    losses: list[Tensor] = []

    def fit(mine: TransformerLayer, layer: TransformerLayer, run: AttentionRun) -> None:
        def loss() -> tuple[Tensor, Tensor]:
            inputs = {name: run.keywords[name] for name in ("rotary_pos_emb", "packed_seq_params")}
            fp8 = get_fp8_context(layer.config, layer.layer_number - 1)  # the teacher's layer may have another
            with fp8, head_outputs(layer.self_attention) as heads:
                student_sbm, _ = layer.self_attention(run.hidden_sbm, **inputs)
            reported = align_loss(student_sbm, run.out_sbm, options.align_loss, groups)
            if not options.align_heads:
                return reported, reported
            of_heads = heads_loss(layer.self_attention, mine.self_attention, heads[0], run.heads_sbn)
            return reported, reported + options.align_heads * of_heads

        if with_gradient:
            with torch.enable_grad():
                losses.append(GradientAtOnce.apply(loss, *(p for p in layer.parameters() if p.requires_grad)))
        else:
            losses.append(loss()[0])

    groups = [student.pg_collection.cp] + ([student.pg_collection.tp] if student.config.sequence_parallel else [])
    with torch.no_grad(), _after_attention(teacher, student, fit):
        hidden_sbm = teacher(batch.tokens_bs, batch.position_ids_bs, None, packed_seq_params=batch.documents)
    return hidden_sbm, torch.stack(losses) if losses else hidden_sbm.new_zeros(0, dtype=torch.float32)


def align_loss(student_sbm: Tensor, teacher_sbm: Tensor, measure: str, groups: list[Group]) -> Tensor:
    """Squared error of one layer's attention output (paper Eq 15), a float32 scalar.

    "squared": summed over the width, averaged over tokens. "relative": each row's error over the square of
    the teacher's own output there, averaged over rows; 1 means "no better than zero" in every layer, and the
    value does not depend on how rows are dealt to micro-batches.

    Args:
        groups: the groups that the sequence is sharded over (context and sequence parallelism).
    """
    error_b = (student_sbm.float() - teacher_sbm.float()).square().sum(dim=(0, 2))
    tokens = torch.full_like(error_b, student_sbm.shape[0])
    scale_b = teacher_sbm.float().square().sum(dim=(0, 2)) if measure == "relative" else tokens
    for group in groups:
        error_b, scale_b = (reduce_from_tensor_model_parallel_region(t, group=group) for t in (error_b, scale_b))
    return (error_b / scale_b).mean()


def heads_loss(student: HydraAttention, teacher: HydraAttention, own_sbn: Tensor, theirs_sbn: Tensor) -> Tensor:
    """Squared error of each head's output over the square of the teacher's, averaged over heads and rows.

    Args:
        own_sbn, theirs_sbn: what this rank's heads hand to the output projection, side by side.
    """
    theirs_sbn = gather_from_tensor_model_parallel_region(theirs_sbn, group=teacher.tp_group)
    order = list(itertools.chain.from_iterable(rank.heads for rank in teacher.layout.ranks))
    own = student.layout.ranks[student.tp_group.rank()].heads
    wanted_sbhd = theirs_sbn.unflatten(-1, (len(order), -1))[:, :, [order.index(head_idx) for head_idx in own]].float()
    error_bh = (own_sbn.unflatten(-1, (len(own), -1)).float() - wanted_sbhd).square().sum(dim=(0, 3))
    scale_bh = wanted_sbhd.square().sum(dim=(0, 3))
    error_bh, scale_bh = (
        reduce_from_tensor_model_parallel_region(t, group=student.cp_group) for t in (error_bh, scale_bh)
    )
    share = (error_bh / scale_bh.clamp(min=torch.finfo(scale_bh.dtype).tiny)).mean(dim=0).sum() / len(order)
    return reduce_from_tensor_model_parallel_region(share, group=student.tp_group)


class AttentionRun(NamedTuple):
    """What the attention of a teacher layer took and gave."""

    hidden_sbm: Tensor
    keywords: dict[str, Any]
    heads_sbn: Tensor
    out_sbm: Tensor


@contextlib.contextmanager
def _after_attention(teacher: GPTModel, student: GPTModel, fit: Callable[..., None]) -> Iterator[None]:
    """Call ``fit(teacher layer, student layer, run)`` after the attention of each teacher layer."""

    def after(
        mine: TransformerLayer, layer: TransformerLayer, heads: list[Tensor],
        module: torch.nn.Module, inputs: tuple, keywords: dict[str, Any], output: tuple,
    ) -> None:  # fmt: skip
        fit(mine, layer, AttentionRun(inputs[0], keywords, heads.pop(), output[0]))

    with contextlib.ExitStack() as hooks:
        for mine, layer in zip(teacher.decoder.layers, student.decoder.layers, strict=True):
            heads = hooks.enter_context(head_outputs(mine.self_attention))
            hook = partial(after, mine, layer, heads)
            hooks.enter_context(mine.self_attention.register_forward_hook(hook, with_kwargs=True))
        yield


class GradientAtOnce(torch.autograd.Function):
    """The first of ``loss()``, with the gradient of the second in ``parameters``: computed in the forward pass, whose
    graph is then dropped.

    Backward multiplies the kept gradients, so that whatever scale and hooks Megatron applies still hold. Kept is one
    gradient a parameter and micro-batch in flight, instead of the activations of all layers.
    """

    @staticmethod
    def forward(ctx: Any, loss: Callable[[], tuple[Tensor, Tensor]], *parameters: Tensor) -> Tensor:
        with torch.enable_grad():
            reported, trained = loss()
            gradients = torch.autograd.grad(trained, parameters, allow_unused=True)
        ctx.save_for_backward(*gradients)
        return reported.detach()

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(
            None if gradient is None else gradient * scale.to(gradient.dtype) for gradient in ctx.saved_tensors
        )


class JoinPipeline(torch.autograd.Function):
    """``output``, with the local loss of a pipeline stage tied to it: Megatron runs backward from a stage's output.

    Megatron scales only the last stage's loss, so the others give theirs ``scale``. The gradient sent to the stage
    before is zero (nothing flows through the teacher), but sent it must be: that stage waits for it.

    Args:
        output: hidden state for the next stage, or the loss of the last one.
        loss: this stage's loss; an empty sum on the last stage, whose loss is ``output`` itself.
        entry: the hidden state that came from the stage before; None on the first.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, loss: Tensor, entry: Tensor | None, scale: float) -> Tensor:
        ctx.scale, ctx.loss, ctx.entry = scale, loss.detach(), None if entry is None else entry.detach()
        return output.clone()  # Megatron frees a sent output in place, which a view would not survive

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        entry = None if ctx.entry is None else torch.zeros_like(ctx.entry)
        return gradient, torch.full_like(ctx.loss, ctx.scale), entry, None
