# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The loss of stages distill and extend, fused with the output layer: no [tokens, vocabulary] tensor ever exists.

Logits, losses and the gradient of the logits are made for one chunk of tokens at a time, in the forward pass, and
only the gradients of hidden states and output weight are kept (as in Liger Kernel, arXiv 2410.10989). The backward
pass multiplies them by the incoming scalar.

Shapes are suffixes: s sequence, b batch, n = s * b tokens, c tokens of a chunk, m model width (a teacher may have its
own), w this rank's rows of the vocabulary: rank r of tp holds rows r * w to (r + 1) * w - 1 of a vocabulary of tp * w.

Its peak memory is `costs/loss_memory.py`. The same softmaxes for all tokens at once take n * w * (3 f + p) bytes, p a
parameter's and f = max(p, 4). Qwen3-8B's output layer (w 151936, m 4096), 8192 tokens, bfloat16, one rank: 3.9 GB in
chunks, nearly all of it the weight's gradient, against 17.4 GB for logits alone.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ReduceOp

Group = torch.distributed.ProcessGroup
Output = tuple[Tensor, Tensor]  # an output layer: its input and its weight


class TokenLoss(NamedTuple):
    """Three scalars in nats, each a sum over tokens; float32, or float64 for float64 parameters.

    ``kl`` is KL(teacher, student) * temperature^2, zero without a teacher; ``ce`` the next-token cross-entropy.
    Only ``loss`` = kl_weight * kl + ce_weight * ce has a gradient.
    """

    loss: Tensor
    kl: Tensor
    ce: Tensor


class _Settings(NamedTuple):
    ce_weight: float
    kl_weight: float
    temperature: float
    chunk_elements: int
    tp_group: Group


def token_loss(
    student_sbm: Tensor,
    student_weight_wm: Tensor,
    labels_bs: Tensor,
    mask_bs: Tensor,
    *,
    tp_group: Group,
    ce_weight: float = 1.0,
    kl_weight: float = 0.0,
    temperature: float = 1.0,
    teacher: Output | None = None,
    chunk_elements: int = 2**26,
) -> TokenLoss:
    """Sum over tokens of mask * (kl_weight * KL + ce_weight * CE), logits being hidden states times weight.

    KL = temperature^2 * sum over the vocabulary of p_t (log p_t - log p_s), both softmax at ``temperature``
    (arXiv 2606.20097 Eq 16; the factor: Hinton et al. 2015, arXiv 1503.02531). CE is at temperature 1.

    Every rank gets the same loss. The gradient of ``student_sbm`` is this rank's share, from its own rows of the
    vocabulary: whatever brought the hidden states to all ranks sums it over them.

    Args:
        student_sbm: the whole sequence on every rank; contiguous, else it is copied.
        labels_bs: long, index in the whole vocabulary; may be anything where the mask is 0.
        mask_bs: bool, or the weight of each token.
        teacher: (hidden_sbm, weight_wm), constants. Without it ``kl_weight`` has no meaning.
        chunk_elements: logits of one rank that may exist at once; a chunk is at least one token. Each chunk reads
            and writes the weight's gradient once, so larger is faster where it is large.

    Raises:
        ValueError: shapes that do not match; torch would broadcast some of them.
    """
    s, b, _ = student_sbm.shape
    rows = len(student_weight_wm)
    expected = {
        "student_weight_wm": (student_weight_wm, (rows, student_sbm.shape[2])),
        "labels_bs": (labels_bs, (b, s)),
    }
    expected["mask_bs"] = mask_bs, (b, s)
    if teacher is not None:
        expected["teacher hidden_sbm"] = teacher[0], (s, b, teacher[0].shape[-1])
        expected["teacher weight_wm"] = teacher[1], (rows, teacher[0].shape[-1])
    for name, (tensor, shape) in expected.items():
        if tensor.shape != shape:
            raise ValueError(
                f"{name}: shape {list(tensor.shape)}, but student_sbm {list(student_sbm.shape)} asks for {list(shape)}"
            )
    if not torch.is_grad_enabled():  # ctx.needs_input_grad does not look
        student_sbm, student_weight_wm = student_sbm.detach(), student_weight_wm.detach()
    settings = _Settings(ce_weight, kl_weight if teacher else 0.0, temperature, chunk_elements, tp_group)
    return TokenLoss(*_FusedTokenLoss.apply(student_sbm, student_weight_wm, labels_bs, mask_bs, teacher, settings))


class _FusedTokenLoss(torch.autograd.Function):
    """Loss, KL and CE; the gradients are made in forward, so that no chunk's logits are computed twice."""

    @staticmethod
    def forward(
        ctx: Any,
        student_sbm: Tensor,
        weight_wm: Tensor,
        labels_bs: Tensor,
        mask_bs: Tensor,
        teacher: Output | None,
        settings: _Settings,
    ) -> tuple[Tensor, Tensor, Tensor]:
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        dtype = torch.promote_types(weight_wm.dtype, torch.float32)
        student_nm, labels_n, mask_n = (
            student_sbm.flatten(0, 1),
            labels_bs.t().flatten(),
            mask_bs.t().flatten().to(dtype),
        )
        teacher_nm, teacher_weight_wm = (teacher[0].flatten(0, 1), teacher[1]) if teacher else (None, None)
        d_student_nm = torch.empty_like(student_nm) if wants_hidden else None
        d_weight_wm = torch.zeros_like(weight_wm, dtype=dtype) if wants_weight else None
        kl, ce = mask_n.new_zeros(()), mask_n.new_zeros(())
        size = max(1, settings.chunk_elements // len(weight_wm))
        for start in range(0, len(student_nm), size):
            part = slice(start, start + size)
            student_cw = _logits(student_nm[part], weight_wm)
            teacher_cw = _logits(teacher_nm[part], teacher_weight_wm) if teacher else None
            kl_c, ce_c = _to_gradient(
                student_cw, teacher_cw, labels_n[part], mask_n[part], settings, wants_hidden or wants_weight
            )
            kl += kl_c @ mask_n[part]
            ce += ce_c @ mask_n[part]
            del teacher_cw  # each goes as soon as it may: the formula above counts on it
            gradient_cw = student_cw.to(weight_wm.dtype)
            del student_cw
            if wants_hidden:
                torch.mm(gradient_cw, weight_wm, out=d_student_nm[part])
            if wants_weight and dtype == weight_wm.dtype:
                d_weight_wm.addmm_(gradient_cw.t(), student_nm[part])
            elif wants_weight:
                d_weight_wm += gradient_cw.t() @ student_nm[part]
            del gradient_cw
        d_student_sbm = d_student_nm.view(student_sbm.shape) if wants_hidden else None
        ctx.save_for_backward(d_student_sbm, d_weight_wm.to(weight_wm.dtype) if wants_weight else None)
        ctx.mark_non_differentiable(kl, ce)
        return settings.kl_weight * kl + settings.ce_weight * ce, kl, ce

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        # In place: a copy would raise the peak. Autograd raises if a retained graph is then run again.
        d_student_sbm, d_weight_wm = (None if x is None else x.mul_(grad_loss) for x in ctx.saved_tensors)
        return d_student_sbm, d_weight_wm, None, None, None, None


def _logits(hidden_cm: Tensor, weight_wm: Tensor) -> Tensor:
    """Logits [c, w] in at least float32, multiplied in the parameters' own precision."""
    return (hidden_cm @ weight_wm.t()).to(torch.promote_types(weight_wm.dtype, torch.float32))


def _to_gradient(
    student_cw: Tensor,
    teacher_cw: Tensor | None,
    labels_c: Tensor,
    mask_c: Tensor,
    settings: _Settings,
    wants_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """KL and CE of each token [c]; turns the student's logits into the gradient of the loss, in place.

    At most three [c, w] tensors live: both logits and either their difference or the student's softmax at temperature.
    """
    group, temperature, (_, w) = settings.tp_group, settings.temperature, student_cw.shape
    logits = [student_cw] if teacher_cw is None else [student_cw, teacher_cw]
    for x_cw, peak_c in zip(
        logits, _all_reduce([x_cw.amax(dim=-1) for x_cw in logits], ReduceOp.MAX, group), strict=True
    ):
        x_cw.sub_(peak_c[:, None])
    index_c = labels_c - group.rank() * w
    own_c = (index_c >= 0) & (index_c < w)
    index_c1 = index_c.clamp(0, w - 1)[:, None]
    sums = [student_cw.gather(1, index_c1)[:, 0] * own_c]
    soft_cw = None  # the student at temperature, where that is not CE's softmax
    if teacher_cw is not None:
        teacher_cw.div_(temperature)
        gap_cw = torch.sub(teacher_cw, student_cw, alpha=1 / temperature)
        sums += [gap_cw.mul_(teacher_cw.exp_()).sum(dim=-1), teacher_cw.sum(dim=-1)]
        del gap_cw
        if temperature != 1:
            soft_cw = (student_cw / temperature).exp_()
            sums.append(soft_cw.sum(dim=-1))
    label_c, *of_kl, total_c = _all_reduce([*sums, student_cw.exp_().sum(dim=-1)], ReduceOp.SUM, group)

    ce_c, kl_c = total_c.log() - label_c, torch.zeros_like(label_c)
    d_ce_c, d_kl_c = settings.ce_weight * mask_c, settings.kl_weight * temperature * mask_c
    if teacher_cw is not None:
        gap_c, teacher_total_c, soft_total_c = of_kl if soft_cw is not None else (*of_kl, total_c)
        kl_c = temperature**2 * (gap_c / teacher_total_c - teacher_total_c.log() + soft_total_c.log())
    if wants_gradient:
        student_cw.mul_(((d_ce_c if soft_cw is not None else d_ce_c + d_kl_c) / total_c)[:, None])
        student_cw.scatter_add_(1, index_c1, -(d_ce_c * own_c)[:, None])
        if teacher_cw is not None:
            student_cw.addcmul_(teacher_cw, -(d_kl_c / teacher_total_c)[:, None])
        if soft_cw is not None:
            student_cw.addcmul_(soft_cw, (d_kl_c / soft_total_c)[:, None])
    return kl_c, ce_c


def _all_reduce(values_c: list[Tensor], op: ReduceOp, group: Group) -> Tensor:
    """The values stacked, reduced over the group in one call."""
    stacked = torch.stack(values_c)
    if group.size() > 1:
        torch.distributed.all_reduce(stacked, op=op, group=group)
    return stacked
