# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Linear attention with a fixed decay a head in plain torch (Lightning Attention-2, arXiv 2401.04658).

Per head and token, with lambda the same for all tokens of a head,

    S_t = lambda S_{t-1} + k_t v_t^T        o_t = S_t^T q_t

Chunk by chunk over whole sequences, token by token while decoding. Shape suffixes are those of ``chunks.py``.

This file needs torch only: a copy of it travels with every model exported to Hugging Face.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Relative: exported models hold a copy of these files side by side.
from .chunks import CHUNK, Segment, add_product, first_state, from_chunks, lay_out, state_dtype, to_chunks

__all__ = ["chunked_linear_attention", "recurrent_linear_attention"]


def chunked_linear_attention(
    q_bshd: Tensor,
    k_bshd: Tensor,
    v_bshv: Tensor,
    log_decay_h: Tensor,
    *,
    scale: float | None = None,
    initial_state_bhdv: Tensor | None = None,
    bounds: Sequence[int] | None = None,
    chunk_size: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """Apply decayed linear attention on any device, linear in s forward and backward, in time and memory.

    Within a chunk scores are decayed and applied as in attention without softmax; between chunks the state is carried.
    A chunk holds one document only, the rest of its rows is padding. Backward keeps the inputs and one state a segment,
    and computes the rest anew.

    Args:
        q_bshd, k_bshd: queries and keys.
        v_bshv: values.
        log_decay_h: ln(lambda) of each head, finite and at most 0; no gradient.
        scale: factor on the queries, d**-0.5 unless given.
        initial_state_bhdv: state before the first token, zeros unless given; [b * documents, h, d, v].
        bounds: boundaries 0 < ... < s of the documents packed into each row, one document unless given.
        chunk_size: rows per chunk; results do not depend on it.

    Returns:
        Outputs [b, s, h, v] in the dtype of ``q_bshd``, and the state after the last token of each document in float32
        (float64 for float64 queries), [b * documents, h, d, v].

    Raises:
        ValueError: the shape of the initial state is wrong.
    """
    b, _, h, d = q_bshd.shape
    initial_kndv, segments = lay_out(q_bshd, v_bshv, initial_state_bhdv, bounds, chunk_size)
    scale, rate_n = d**-0.5 if scale is None else scale, log_decay_h.double().repeat(b)
    inputs = (q_bshd, k_bshd, v_bshv, initial_kndv)
    if torch.is_grad_enabled():
        out_bshv, last_kndv = _ChunkedLinearAttention.apply(*inputs, rate_n, scale, segments, chunk_size)
    else:  # an autograd function would hold until it returns what it keeps for backward
        out_bshv, last_kndv = _forward(inputs, rate_n, scale, segments, chunk_size, None)
    return out_bshv, last_kndv.unflatten(1, (b, h)).flatten(0, 1)


def recurrent_linear_attention(
    q_bshd: Tensor,
    k_bshd: Tensor,
    v_bshv: Tensor,
    log_decay_h: Tensor,
    *,
    scale: float | None = None,
    initial_state_bhdv: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same token by token, as the equation stands: for one token or a few, where a chunk would be mostly padding.

    Arguments, results and errors as ``chunked_linear_attention`` of one document.
    """
    b, _, h, d = q_bshd.shape
    dtype = state_dtype(q_bshd)
    state_bhdv = first_state(q_bshd, (b, h, d, v_bshv.shape[-1]), initial_state_bhdv)
    q_sbh1d = (q_bshd.to(dtype) * (d**-0.5 if scale is None else scale)).transpose(0, 1).unsqueeze(-2)
    k_sbhd1, v_sbh1v = k_bshd.to(dtype).transpose(0, 1).unsqueeze(-1), v_bshv.to(dtype).transpose(0, 1).unsqueeze(-2)
    decay_h11 = log_decay_h.double().exp().to(dtype)[:, None, None]
    outputs = [v_sbh1v[:0]]
    for q, k, v in zip(q_sbh1d, k_sbhd1, v_sbh1v, strict=True):
        state_bhdv = state_bhdv * decay_h11 + k * v
        outputs.append((q @ state_bhdv)[None])
    return torch.cat(outputs).squeeze(-2).transpose(0, 1).to(q_bshd.dtype), state_bhdv


class _Decay(NamedTuple):
    """What is left after the ways within and through the chunks of a segment."""

    between_nrr: Tensor  # from row to row, 0 from later rows to earlier ones
    from_start_nr1: Tensor  # of the state before the chunk on its way to a row
    to_end_cnr1: Tensor  # of what a row writes on its way to the chunk's last token
    through_cn11: Tensor  # of the state through the chunk


def _decay(rate_n: Tensor, segment: Segment, r: int, dtype: torch.dtype) -> _Decay:
    row_r = torch.arange(r, device=rate_n.device)
    length_c = torch.tensor(segment.lengths, device=rate_n.device)
    age_rr = row_r[:, None] - row_r
    between_nrr = (rate_n[:, None, None] * age_rr.clamp(min=0)).exp() * (age_rr >= 0)
    from_start_nr = (rate_n[:, None] * (row_r + 1)).exp()
    left_c1r = (length_c[:, None] - 1 - row_r).clamp(min=0)[:, None]
    to_end_cnr = (rate_n[:, None] * left_c1r).exp()
    through_cn = (rate_n * length_c[:, None]).exp()
    return _Decay(
        between_nrr.to(dtype), from_start_nr.to(dtype)[..., None], to_end_cnr.to(dtype)[..., None],
        through_cn.to(dtype)[..., None, None],
    )  # fmt: skip


def _forward(
    inputs: tuple[Tensor, ...], rate_n: Tensor, scale: float, segments: list[Segment], r: int, kept: list[Tensor] | None
) -> tuple[Tensor, Tensor]:
    """Outputs [b, s, h, v] and the last state of each document [k, n, d, v]; ``kept`` gets what backward needs."""
    *tokens, initial_kndv = inputs
    last_kndv = initial_kndv.clone()
    out_bshv = torch.empty_like(inputs[2], dtype=inputs[0].dtype)
    state_ndv = initial_kndv[0]
    for segment in segments:
        if kept is not None:
            kept.append(state_ndv)
        state_ndv = _forward_segment(tokens, segment, rate_n, scale, r, state_ndv, initial_kndv, out_bshv, last_kndv)
    return out_bshv, last_kndv


def _forward_segment(
    tokens: Sequence[Tensor],
    segment: Segment,
    rate_n: Tensor,
    scale: float,
    r: int,
    state_ndv: Tensor,
    initial_kndv: Tensor,
    out_bshv: Tensor,
    last_kndv: Tensor,
) -> Tensor:
    """The state behind a segment; fills in its outputs and the states that documents end with."""
    q_cnrd, k_cnrd, v_cnrv = (to_chunks(x, segment, r, initial_kndv.dtype) for x in tokens)
    decay = _decay(rate_n, segment, r, q_cnrd.dtype)
    q_cnrd *= scale
    state_cndv, state_ndv = _states(segment, decay, k_cnrd, v_cnrv, state_ndv, initial_kndv, last_kndv)
    out_cnrv = ((q_cnrd @ k_cnrd.mT).mul_(decay.between_nrr)) @ v_cnrv
    add_product(out_cnrv, q_cnrd.mul_(decay.from_start_nr1), state_cndv)
    from_chunks(out_cnrv, segment, out_bshv)
    return state_ndv


def _states(
    segment: Segment,
    decay: _Decay,
    k_cnrd: Tensor,
    v_cnrv: Tensor,
    state_ndv: Tensor,
    initial_kndv: Tensor,
    last_kndv: Tensor,
) -> tuple[Tensor, Tensor]:
    """The state before each chunk [c, n, d, v], and the one behind the last; fills in those that documents end with."""
    added_cndv = (k_cnrd * decay.to_end_cnr1).mT @ v_cnrv
    states = []
    for c, (begins, ends) in enumerate(zip(segment.begins, segment.ends, strict=True)):
        if begins is not None:
            state_ndv = initial_kndv[begins]
        states.append(state_ndv)
        state_ndv = torch.addcmul(added_cndv[c], state_ndv, decay.through_cn11[c])
        if ends is not None:
            last_kndv[ends] = state_ndv
    return torch.stack(states), state_ndv


class _ChunkedLinearAttention(torch.autograd.Function):
    """``_forward`` with its gradient, segment by segment from the last to the first; by hand, because what autograd
    would keep is many times the inputs.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        *inputs, rate_n, scale, segments, r = arguments
        kept: list[Tensor] = []
        results = _forward(tuple(inputs), rate_n, scale, segments, r, kept)
        ctx.save_for_backward(*inputs, rate_n, *kept)
        ctx.scale, ctx.segments, ctx.r = scale, segments, r
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out_bshv: Tensor, d_last_kndv: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # to be unpacked once, says torch's checkpointing
        inputs, initial_kndv, rate_n, kept = saved[:3], saved[3], saved[4], saved[5:]
        d_initial_kndv = d_last_kndv.clone()
        gradients = [torch.empty_like(x) for x in inputs]
        d_state_ndv = d_last_kndv[-1]
        for segment, before_ndv in zip(reversed(ctx.segments), reversed(kept), strict=True):
            d_state_ndv, found = _backward_segment(
                (*inputs, d_out_bshv), segment, rate_n, ctx.scale, ctx.r, before_ndv, d_state_ndv, initial_kndv,
                d_last_kndv, d_initial_kndv,
            )  # fmt: skip
            for gradient, found_cnr in zip(gradients, found, strict=True):
                from_chunks(found_cnr, segment, gradient)
            del found
        return *gradients, d_initial_kndv, None, None, None, None


def _backward_segment(
    tokens: Sequence[Tensor],
    segment: Segment,
    rate_n: Tensor,
    scale: float,
    r: int,
    before_ndv: Tensor,
    d_state_ndv: Tensor,
    initial_kndv: Tensor,
    d_last_kndv: Tensor,
    d_initial_kndv: Tensor,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The gradient of the state before a segment, and those of its inputs; fills in those of documents' first states.

    Args:
        tokens: inputs, and the gradient of the output.
        before_ndv: the state before the segment.
        d_state_ndv: the gradient of the one behind it.
    """
    q_cnrd, k_cnrd, v_cnrv, d_out_cnrv = (to_chunks(x, segment, r, initial_kndv.dtype) for x in tokens)
    decay = _decay(rate_n, segment, r, q_cnrd.dtype)
    q_cnrd *= scale
    state_cndv, _ = _states(segment, decay, k_cnrd, v_cnrv, before_ndv, initial_kndv, initial_kndv.clone())
    # A state is read by the rows of its chunk and by the state behind it.
    d_read_cndv = (q_cnrd * decay.from_start_nr1).mT @ d_out_cnrv
    d_state_cndv = torch.empty_like(d_read_cndv)
    for c in reversed(range(len(d_read_cndv))):
        if (document := segment.ends[c]) is not None:
            d_state_ndv = d_last_kndv[document]
        d_state_cndv[c] = d_state_ndv
        d_state_ndv = torch.addcmul(d_read_cndv[c], d_state_ndv, decay.through_cn11[c])
        if (document := segment.begins[c]) is not None:
            d_initial_kndv[document] = d_state_ndv
    found = _gradients(decay, (q_cnrd, k_cnrd, v_cnrv), d_out_cnrv, state_cndv, d_state_cndv)
    found[0].mul_(scale)
    return d_state_ndv, found


def _gradients(
    decay: _Decay, tokens: tuple[Tensor, ...], d_out_cnrv: Tensor, state_cndv: Tensor, d_state_cndv: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of scaled queries, keys and values: what goes through the states, then through the scores.

    Args:
        state_cndv, d_state_cndv: the states before the chunks, and the gradients of those after them.
    """
    q_cnrd, k_cnrd, v_cnrv = tokens
    scores_cnrr = (q_cnrd @ k_cnrd.mT).mul_(decay.between_nrr)
    d_scores_cnrr = (d_out_cnrv @ v_cnrv.mT).mul_(decay.between_nrr)
    d_q_cnrd = (d_out_cnrv @ state_cndv.mT).mul_(decay.from_start_nr1)
    d_k_cnrd = (v_cnrv @ d_state_cndv.mT).mul_(decay.to_end_cnr1)
    d_v_cnrv = (k_cnrd @ d_state_cndv).mul_(decay.to_end_cnr1)
    add_product(d_q_cnrd, d_scores_cnrr, k_cnrd)
    add_product(d_k_cnrd, d_scores_cnrr.mT, q_cnrd)
    add_product(d_v_cnrv, scores_cnrr.mT, d_out_cnrv)
    return d_q_cnrd, d_k_cnrd, d_v_cnrv
