# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The delta rule with decay in plain torch: chunk by chunk over whole sequences, token by token while decoding.

Per head and token, in the paper's letters (the GDN branch of HydraHead, arXiv 2606.20097, after Gated
DeltaNet, arXiv 2412.06464 eq 10):

    S_t = alpha_t S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T        o_t = S_t q_t

where alpha_t is one decay a head, or, as in Kimi Delta Attention (arXiv 2510.26692 eq 1), one for each key channel:
Diag(alpha_t) S_{t-1}^T in place of alpha_t S_{t-1}^T. ``decays.py`` knows the difference. The state is stored
transposed, [d, v], as flash-linear-attention does. Shape suffixes are those of ``chunks.py``, and

    p = 2r readers of a chunk     of each row its query, then its key: both read the state, the query for the output,
                                  the key (times beta) for what stands already where it is about to write
    x                             1, or d where every key channel has a decay

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
from .decays import ChannelDecay, HeadDecay

__all__ = ["chunked_delta_rule", "recurrent_delta_rule"]


def chunked_delta_rule(
    q_bshd: Tensor,
    k_bshd: Tensor,
    v_bshv: Tensor,
    log_decay: Tensor,
    write_bsh: Tensor,
    *,
    scale: float | None = None,
    initial_state_bhdv: Tensor | None = None,
    bounds: Sequence[int] | None = None,
    chunk_size: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """Apply the gated delta rule on any device, linear in s forward and backward, in time and memory.

    Chunked as in DeltaNet (arXiv 2406.06484 section 3) with the decay of Gated DeltaNet (arXiv 2412.06464
    section 3.3): inside a chunk the inverse of a triangular matrix replaces the recurrence, between chunks the state is
    carried. A chunk holds one document only, the rest of its rows is padding. Backward keeps what each row wrote and
    the inverses, one and a half times the memory of the values in float32, and computes the rest anew.

    Args:
        q_bshd, k_bshd: queries and keys, already normalised (keys to length 1).
        v_bshv: values.
        log_decay: ln(alpha), finite and at most 0: [b, s, h], or [b, s, h, d] for one a key channel.
        write_bsh: beta, 0 to 2. A token of log decay 0 and beta 0 leaves the state as it was.
        scale: factor on the queries, d**-0.5 unless given.
        initial_state_bhdv: state before the first token, zeros unless given; [b * documents, h, d, v].
        bounds: boundaries 0 < ... < s of the documents packed into each row, one document unless given.
        chunk_size: rows per chunk, a power of two; results do not depend on it.

    Returns:
        Outputs [b, s, h, v] in the dtype of ``q_bshd``, and the state after the last token of each document in float32
        (float64 for float64 queries), [b * documents, h, d, v].

    Raises:
        ValueError: the shape of the initial state is wrong.
    """
    b, _, h, d = q_bshd.shape
    initial_kndv, segments = lay_out(q_bshd, v_bshv, initial_state_bhdv, bounds, chunk_size)
    inputs = (q_bshd, k_bshd, v_bshv, log_decay, write_bsh, initial_kndv)
    scale = d**-0.5 if scale is None else scale
    if torch.is_grad_enabled():
        out_bshv, last_kndv = _ChunkedDeltaRule.apply(*inputs, scale, segments, chunk_size)
    else:  # an autograd function would hold until it returns what it keeps for backward
        out_bshv, last_kndv = _forward(inputs, scale, segments, chunk_size, None)
    return out_bshv, last_kndv.unflatten(1, (b, h)).flatten(0, 1)


def recurrent_delta_rule(
    q_bshd: Tensor,
    k_bshd: Tensor,
    v_bshv: Tensor,
    log_decay: Tensor,
    write_bsh: Tensor,
    *,
    scale: float | None = None,
    initial_state_bhdv: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same token by token, as the equation stands: for one token or a few, where a chunk would be mostly padding.

    Arguments, results and errors as ``chunked_delta_rule`` of one document.
    """
    b, _, h, d = q_bshd.shape
    dtype = state_dtype(q_bshd)
    state_bhdv = first_state(q_bshd, (b, h, d, v_bshv.shape[-1]), initial_state_bhdv)
    q_sbh1d = (q_bshd.to(dtype) * (d**-0.5 if scale is None else scale)).transpose(0, 1).unsqueeze(-2)
    k_sbhd1, v_sbh1v = k_bshd.to(dtype).transpose(0, 1).unsqueeze(-1), v_bshv.to(dtype).transpose(0, 1).unsqueeze(-2)
    log_decay_bshx = log_decay if log_decay.dim() == 4 else log_decay[..., None]
    decay_sbhx1 = log_decay_bshx.to(dtype).exp().transpose(0, 1).unsqueeze(-1)
    write_sbh11 = write_bsh.to(dtype).transpose(0, 1)[..., None, None]
    outputs = [v_sbh1v[:0]]
    for q, k, v, decay, write in zip(q_sbh1d, k_sbhd1, v_sbh1v, decay_sbhx1, write_sbh11, strict=True):
        state_bhdv = state_bhdv * decay
        state_bhdv = state_bhdv + k * (write * (v - k.mT @ state_bhdv))
        outputs.append((q @ state_bhdv)[None])
    return torch.cat(outputs).squeeze(-2).transpose(0, 1).to(q_bshd.dtype), state_bhdv


class _Chunks(NamedTuple):
    """What the rows of chunks are to one another, the state aside."""

    k_cnrd: Tensor
    readers_cnr2d: Tensor  # scaled query and key times beta of each row
    decay: HeadDecay | ChannelDecay
    scores_cnr2r: Tensor  # readers times keys, decayed
    decayed_readers_cnpd: Tensor  # to apply to the state before the chunk
    decayed_k_cnrd: Tensor  # to add to the state after the chunk


def _chunks(
    q_cnrd: Tensor, k_cnrd: Tensor, log_decay_cnr: Tensor, write_cnr: Tensor, scale: float, for_backward: bool
) -> _Chunks:
    """From what does not depend on the state."""
    decay = (HeadDecay if log_decay_cnr.dim() == 3 else ChannelDecay)(log_decay_cnr, k_cnrd.dtype)
    readers_cnr2d = torch.stack([q_cnrd * scale, k_cnrd * write_cnr[..., None]], dim=3)
    scores_cnr2r, decayed_readers_cnr2d, decayed_k_cnrd = decay.apply(readers_cnr2d, k_cnrd, for_backward)
    return _Chunks(k_cnrd, readers_cnr2d, decay, scores_cnr2r, decayed_readers_cnr2d.flatten(2, 3), decayed_k_cnrd)


def _forward(
    inputs: tuple[Tensor, ...], scale: float, segments: list[Segment], r: int, kept: list[Tensor] | None
) -> tuple[Tensor, Tensor]:
    """Outputs [b, s, h, v] and the last state of each document [k, n, d, v]; ``kept`` gets what backward needs."""
    *tokens, initial_kndv = inputs
    last_kndv = initial_kndv.clone()
    out_bshv = torch.empty_like(inputs[2], dtype=inputs[0].dtype)
    state_ndv = initial_kndv[0]
    for segment in segments:
        state_ndv = _forward_segment(
            tokens, segment, scale, r, state_ndv, initial_kndv, out_bshv=out_bshv, last_kndv=last_kndv, kept=kept
        )
    return out_bshv, last_kndv


def _forward_segment(
    tokens: Sequence[Tensor],
    segment: Segment,
    scale: float,
    r: int,
    state_ndv: Tensor,
    initial_kndv: Tensor,
    *,
    out_bshv: Tensor,
    last_kndv: Tensor,
    kept: list[Tensor] | None,
) -> Tensor:
    """The state behind a segment; fills in its outputs and the states that documents end with.

    What a row writes is what it brings less what it reads, of earlier rows of its chunk and of the state before it,

        written = beta v - (beta k) S - L written,    written = (1 + L)^-1 (beta v - (beta k) S)

    with L the strictly lower scores of keys with keys.
    """
    q_cnrd, k_cnrd, v_cnrv, log_decay_cnr, write_cnr = (to_chunks(x, segment, r, initial_kndv.dtype) for x in tokens)
    chunks = _chunks(q_cnrd, k_cnrd, log_decay_cnr, write_cnr, scale, for_backward=False)
    # The solver takes the diagonal as 1 and reads nothing above it.
    lower_cnrr = chunks.scores_cnr2r[:, :, :, 1]
    eye_rr = torch.eye(r, dtype=initial_kndv.dtype, device=initial_kndv.device)
    inverse_cnrr = torch.linalg.solve_triangular(
        lower_cnrr, eye_rr.expand_as(lower_cnrr), upper=False, unitriangular=True
    )
    written_cnrv = v_cnrv * write_cnr[..., None]
    out_cnrv = torch.empty_like(v_cnrv)
    if kept is not None:
        kept += [state_ndv, inverse_cnrr, written_cnrv]
    for c, (begins, ends) in enumerate(zip(segment.begins, segment.ends, strict=True)):
        if begins is not None:
            state_ndv = initial_kndv[begins]
        read_nr2v = (chunks.decayed_readers_cnpd[c] @ state_ndv).unflatten(1, (r, 2))
        out_cnrv[c] = read_nr2v[:, :, 0]
        written_cnrv[c] = inverse_cnrr[c] @ (written_cnrv[c] - read_nr2v[:, :, 1])
        state_ndv = (state_ndv * chunks.decay.forget_cnx1[c]).baddbmm_(chunks.decayed_k_cnrd[c].mT, written_cnrv[c])
        if ends is not None:
            last_kndv[ends] = state_ndv
    add_product(out_cnrv, chunks.scores_cnr2r[:, :, :, 0], written_cnrv)
    from_chunks(out_cnrv, segment, out_bshv)
    return state_ndv


class _ChunkedDeltaRule(torch.autograd.Function):
    """``_forward`` with its gradient, segment by segment from the last to the first.

    By hand, because what autograd would keep is many times the inputs, and its backward of a loop over chunks leaves
    the cache.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        *inputs, scale, segments, r = arguments
        kept: list[Tensor] = []
        results = _forward(tuple(inputs), scale, segments, r, kept)
        ctx.save_for_backward(*inputs, *kept)
        ctx.scale, ctx.segments, ctx.r = scale, segments, r
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out_bshv: Tensor, d_last_kndv: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # to be unpacked once, says torch's checkpointing
        inputs, initial_kndv, kept = saved[:5], saved[5], saved[6:]
        d_initial_kndv = d_last_kndv.clone()
        gradients = [torch.empty_like(x) for x in inputs]
        d_state_ndv = d_last_kndv[-1]
        for i, segment in reversed(list(enumerate(ctx.segments))):
            d_state_ndv, found = _backward_segment(
                (*inputs, d_out_bshv), kept[3 * i : 3 * i + 3], segment, ctx.scale, ctx.r, d_state_ndv, initial_kndv,
                d_last_kndv, d_initial_kndv,
            )  # fmt: skip
            for gradient, found_cnr in zip(gradients, found, strict=True):
                from_chunks(found_cnr, segment, gradient)
            del found
        return *gradients, d_initial_kndv, None, None, None


def _backward_segment(
    tokens: Sequence[Tensor],
    kept: Sequence[Tensor],
    segment: Segment,
    scale: float,
    r: int,
    d_state_ndv: Tensor,
    initial_kndv: Tensor,
    d_last_kndv: Tensor,
    d_initial_kndv: Tensor,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The gradient of the state before a segment, and those of its inputs; fills in those of documents' first states.

    Args:
        tokens: inputs, and the gradient of the output.
        kept: of the forward pass.
        d_state_ndv: the gradient of the state behind the segment.
    """
    q_cnrd, k_cnrd, v_cnrv, log_decay_cnr, write_cnr, d_out_cnrv = (
        to_chunks(x, segment, r, initial_kndv.dtype) for x in tokens
    )
    before_ndv, inverse_cnrr, written_cnrv = kept
    chunks = _chunks(q_cnrd, k_cnrd, log_decay_cnr, write_cnr, scale, for_backward=True)
    state_cndv = _states(segment, chunks, written_cnrv, before_ndv, initial_kndv)
    # The gradient of what each reader read; that of a key's is also minus that of what its row brought, beta v.
    d_read_cnr2v = torch.stack([d_out_cnrv, torch.empty_like(v_cnrv)], dim=3)
    d_written_cnrv = chunks.scores_cnr2r[:, :, :, 0].mT @ d_out_cnrv
    d_state_cndv = torch.empty_like(state_cndv)
    for c in reversed(range(len(k_cnrd))):
        if (document := segment.ends[c]) is not None:
            d_state_ndv = d_last_kndv[document]
        d_state_cndv[c] = d_state_ndv
        d_brought_nrv = inverse_cnrr[c].mT @ d_written_cnrv[c].baddbmm_(chunks.decayed_k_cnrd[c], d_state_ndv)
        torch.neg(d_brought_nrv, out=d_read_cnr2v[c, :, :, 1])
        d_state_ndv = (d_state_ndv * chunks.decay.forget_cnx1[c]).baddbmm_(
            chunks.decayed_readers_cnpd[c].mT, d_read_cnr2v[c].flatten(1, 2)
        )
        if (document := segment.begins[c]) is not None:
            d_initial_kndv[document] = d_state_ndv
    found = _gradients(chunks, state_cndv, d_state_cndv, written_cnrv, d_read_cnr2v, v_cnrv, write_cnr, scale)
    return d_state_ndv, found


def _states(
    segment: Segment, chunks: _Chunks, written_cnrv: Tensor, before_ndv: Tensor, initial_kndv: Tensor
) -> Tensor:
    """The state before each chunk [c, n, d, v], from what its predecessors wrote."""
    states = []
    for c, begins in enumerate(segment.begins):
        if begins is not None:
            before_ndv = initial_kndv[begins]
        states.append(before_ndv)
        before_ndv = (before_ndv * chunks.decay.forget_cnx1[c]).baddbmm_(chunks.decayed_k_cnrd[c].mT, written_cnrv[c])
    return torch.stack(states)


def _gradients(
    chunks: _Chunks,
    state_cndv: Tensor,
    d_state_cndv: Tensor,
    written_cnrv: Tensor,
    d_read_cnr2v: Tensor,
    v_cnrv: Tensor,
    write_cnr: Tensor,
    scale: float,
) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, log decay and write, from those of the states after the chunks and of what was read."""
    k_cnrd, rows_and_readers = chunks.k_cnrd, d_read_cnr2v.shape[2:4]
    d_read_cnpv = d_read_cnr2v.flatten(2, 3)
    d_scores_cnr2r = (d_read_cnpv @ written_cnrv.mT).unflatten(2, rows_and_readers)
    d_scores_cnr2r[:, :, :, 1].tril_(-1)
    d_readers_cnr2d = (d_read_cnpv @ state_cndv.mT).unflatten(2, rows_and_readers)
    # Keys in their other part, as what is written to, which the state after the chunk and the scores read.
    d_k_cnrd = written_cnrv @ d_state_cndv.mT
    d_log_decay = chunks.decay.gradient(
        chunks.readers_cnr2d, k_cnrd, chunks.scores_cnr2r, d_scores_cnr2r, d_readers_cnr2d, d_k_cnrd, state_cndv,
        d_state_cndv,
    )  # fmt: skip
    d_q_cnrd, d_weighted_k_cnrd = d_readers_cnr2d[:, :, :, 0] * scale, d_readers_cnr2d[:, :, :, 1]
    d_brought_cnrv = d_read_cnr2v[:, :, :, 1].neg()
    d_write_cnr = (k_cnrd * d_weighted_k_cnrd).sum(-1) + (v_cnrv * d_brought_cnrv).sum(-1)
    d_k_cnrd.addcmul_(d_weighted_k_cnrd, write_cnr[..., None])
    return d_q_cnrd, d_k_cnrd, d_brought_cnrv.mul_(write_cnr[..., None]), d_log_decay, d_write_cnr
