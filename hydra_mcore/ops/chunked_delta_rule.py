# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The gated delta rule in plain torch: chunk by chunk over whole sequences, token by token while decoding.

Per head and token, in the paper's letters (the GDN branch of HydraHead, arXiv 2606.20097, after Gated
DeltaNet, arXiv 2412.06464 eq 10):

    S_t = alpha_t S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T        o_t = S_t q_t

The state is stored transposed, [d, v], as flash-linear-attention does. Shape suffixes: b batch, s sequence, h heads,
d key dimension, v value dimension; inside this file sequences are cut into ``c`` chunks of ``r`` rows, and

    k                             documents packed into a row
    n = b * h                     heads of all rows, one batch axis of every product
    p = 2r readers of a chunk     its queries, then its keys: both read the state, the queries for the output, the keys
                                  (times beta) for what stands already where they are about to write

This file needs torch only: a copy of it travels with every model exported to Hugging Face.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["chunked_delta_rule", "recurrent_delta_rule"]

# A segment is as many chunks as stay in a processor's cache, some megabytes with all that is made of them. Measured on
# two cores with 32 MiB: half to four times as many take as long, an eighth a third longer, all at once twice as long.
SEGMENT_VALUES = 2**18  # of one of q, k, v


def chunked_delta_rule(
    q_bshd: Tensor,
    k_bshd: Tensor,
    v_bshv: Tensor,
    log_decay_bsh: Tensor,
    write_bsh: Tensor,
    *,
    scale: float | None = None,
    initial_state_bhdv: Tensor | None = None,
    bounds: Sequence[int] | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """Apply the gated delta rule on any device, linear in s forward and backward, in time and memory.

    Chunked as in DeltaNet (arXiv 2406.06484 section 3) with the decay of Gated DeltaNet (arXiv 2412.06464
    section 3.3): inside a chunk the inverse of a triangular matrix replaces the recurrence, between chunks the state is
    carried. A chunk holds one document only, the rest of its rows is padding. Backward keeps what each row wrote and
    the inverses, one and a half times the memory of the values in float32, and computes the rest anew.

    Args:
        q_bshd, k_bshd: queries and keys, already normalised (keys to length 1).
        v_bshv: values.
        log_decay_bsh: ln(alpha), finite and at most 0.
        write_bsh: beta, 0 to 2. A token of log decay 0 and beta 0 leaves the state as it was.
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
    b, s, h, d = q_bshd.shape
    bounds = (0, s) if bounds is None else bounds
    documents = len(bounds) - 1
    initial_state_bhdv = _initial_state(q_bshd, (documents * b, h, d, v_bshv.shape[-1]), initial_state_bhdv)
    initial_kndv = initial_state_bhdv.unflatten(0, (documents, b)).flatten(1, 2)
    inputs = (q_bshd, k_bshd, v_bshv, log_decay_bsh, write_bsh, initial_kndv)
    segments = _segments(bounds, chunk_size, segment_tokens(b * h, d, chunk_size) // chunk_size)
    scale = d**-0.5 if scale is None else scale
    if torch.is_grad_enabled():
        out_bshv, last_kndv = _ChunkedDeltaRule.apply(*inputs, scale, segments, chunk_size)
    else:  # an autograd function would hold until it returns what it keeps for backward
        out_bshv, last_kndv = _forward(inputs, scale, segments, chunk_size, None)
    return out_bshv, last_kndv.unflatten(1, (b, h)).flatten(0, 1)


def segment_tokens(heads: int, d: int, chunk_size: int = 64) -> int:
    """Tokens of a row that are worked on together: a state is kept for each of so many.

    Args:
        heads: of all rows.
    """
    return chunk_size * max(1, SEGMENT_VALUES // max(1, heads * d * chunk_size))


def recurrent_delta_rule(
    q_bshd: Tensor,
    k_bshd: Tensor,
    v_bshv: Tensor,
    log_decay_bsh: Tensor,
    write_bsh: Tensor,
    *,
    scale: float | None = None,
    initial_state_bhdv: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same token by token, as the equation stands: for one token or a few, where a chunk would be mostly padding.

    Arguments, results and errors as ``chunked_delta_rule`` of one document.
    """
    b, _, h, d = q_bshd.shape
    dtype = _state_dtype(q_bshd)
    state_bhdv = _initial_state(q_bshd, (b, h, d, v_bshv.shape[-1]), initial_state_bhdv)
    q_sbh1d = (q_bshd.to(dtype) * (d**-0.5 if scale is None else scale)).transpose(0, 1).unsqueeze(-2)
    k_sbhd1, v_sbh1v = k_bshd.to(dtype).transpose(0, 1).unsqueeze(-1), v_bshv.to(dtype).transpose(0, 1).unsqueeze(-2)
    decay_sbh11, write_sbh11 = (
        x.transpose(0, 1)[..., None, None] for x in (log_decay_bsh.to(dtype).exp(), write_bsh.to(dtype))
    )
    outputs = [v_sbh1v[:0]]
    for q, k, v, decay, write in zip(q_sbh1d, k_sbhd1, v_sbh1v, decay_sbh11, write_sbh11, strict=True):
        state_bhdv = state_bhdv * decay
        state_bhdv = state_bhdv + k * (write * (v - k.mT @ state_bhdv))
        outputs.append((q @ state_bhdv)[None])
    return torch.cat(outputs).squeeze(-2).transpose(0, 1).to(q_bshd.dtype), state_bhdv


def _state_dtype(q_bshd: Tensor) -> torch.dtype:
    return torch.promote_types(q_bshd.dtype, torch.float32)


def _initial_state(q_bshd: Tensor, shape: tuple[int, ...], given: Tensor | None) -> Tensor:
    if given is None:
        return q_bshd.new_zeros(shape, dtype=_state_dtype(q_bshd))
    if given.shape != shape:
        raise ValueError(f"initial state has shape {list(given.shape)}, needs {list(shape)}")
    return given.to(_state_dtype(q_bshd))


class _Segment(NamedTuple):
    """Consecutive chunks that are worked on together: their tokens, and what each chunk begins and ends."""

    tokens: slice
    slots: list[int] | None  # the row of each token, where there are more rows than tokens
    begins: list[int | None]  # the document that a chunk is the first of
    ends: list[int | None]  # the document that it is the last of


def _segments(bounds: Sequence[int], chunk_size: int, at_once: int) -> list[_Segment]:
    """Cut documents into chunks, and these into segments of ``at_once`` chunks."""
    chunks, segments = [], []
    for document, (start, end) in enumerate(itertools.pairwise(bounds)):
        for first in range(start, end, chunk_size):
            last = min(first + chunk_size, end)
            chunks.append((first, last, document if first == start else None, document if last == end else None))
    for i in range(0, len(chunks), at_once):
        firsts, lasts, begins, ends = map(list, zip(*chunks[i : i + at_once], strict=True))
        slots: list[int] = []
        for chunk, (first, last) in enumerate(zip(firsts, lasts, strict=True)):
            slots += range(chunk * chunk_size, chunk * chunk_size + last - first)
        full = len(slots) == len(firsts) * chunk_size
        segments.append(_Segment(slice(firsts[0], lasts[-1]), None if full else slots, begins, ends))
    return segments


def _to_chunks(x_bsh: Tensor, segment: _Segment, chunk_size: int, dtype: torch.dtype) -> Tensor:
    """The segment's part of [b, s, h, ...] as [c, n, r, ...]; zeros in padded rows, which write and forget nothing."""
    x_bsh = x_bsh[:, segment.tokens]
    if segment.slots is not None:
        slot_s = torch.tensor(segment.slots, device=x_bsh.device)
        rows = len(segment.begins) * chunk_size
        x_bsh = x_bsh.new_zeros(x_bsh.shape[0], rows, *x_bsh.shape[2:]).index_copy_(1, slot_s, x_bsh)
    x_cbhr = x_bsh.unflatten(1, (len(segment.begins), chunk_size)).movedim(3, 2).movedim(1, 0)
    return torch.empty(x_cbhr.shape, dtype=dtype, device=x_bsh.device).copy_(x_cbhr).flatten(1, 2)


def _from_chunks(x_cnr: Tensor, segment: _Segment, out_bsh: Tensor) -> None:
    """Write [c, n, r, ...] into the segment's part of [b, s, h, ...]."""
    b, h = out_bsh.shape[0], out_bsh.shape[2]
    x_bsh = x_cnr.unflatten(1, (b, h)).movedim(0, 1).movedim(3, 2)
    if segment.slots is None:
        out_bsh[:, segment.tokens].unflatten(1, (len(x_cnr), x_cnr.shape[2])).copy_(x_bsh)
    else:
        out_bsh[:, segment.tokens] = x_bsh.flatten(1, 2)[:, segment.slots].to(out_bsh.dtype)


class _Chunks(NamedTuple):
    """What the rows of chunks are to one another, the state aside."""

    k_cnrd: Tensor
    readers_cnpd: Tensor  # scaled queries, then keys times beta
    decay_cn1rr: Tensor  # from row to row, 0 from later rows to earlier ones
    from_start_cn1r1: Tensor  # decay of the state before the chunk on its way to a row
    to_end_cnr1: Tensor  # decay of what a row writes on its way to the chunk's end
    scores_cnpr: Tensor  # readers times keys, decayed
    decayed_readers_cnpd: Tensor  # to apply to the state before the chunk
    decayed_k_cnrd: Tensor  # to add to the state after the chunk
    forget_cn11: Tensor  # decay of the state through the whole chunk


def _chunks(q_cnrd: Tensor, k_cnrd: Tensor, log_decay_cnr: Tensor, write_cnr: Tensor, scale: float) -> _Chunks:
    """From what does not depend on the state."""
    r, dtype = k_cnrd.shape[2], k_cnrd.dtype
    # Sums of log decays in float64: after a few strong decays their differences, which is all that is used,
    # would keep only four digits in float32. Masked before exp, which above the diagonal could overflow.
    total_cnr = log_decay_cnr.double().cumsum(-1)
    later_rr = torch.ones(r, r, dtype=torch.bool, device=k_cnrd.device).triu(1)
    decay_cnrr = (total_cnr[..., :, None] - total_cnr[..., None, :]).to(dtype).masked_fill_(later_rr, -torch.inf).exp_()
    from_start_cn1r1 = total_cnr.exp().to(dtype)[:, :, None, :, None]
    to_end_cnr1 = (total_cnr[..., -1:] - total_cnr).exp().to(dtype)[..., None]
    readers_cn2rd = torch.stack([q_cnrd * scale, k_cnrd * write_cnr[..., None]], dim=2)
    readers_cnpd = readers_cn2rd.flatten(2, 3)
    scores_cnpr = readers_cnpd @ k_cnrd.mT
    scores_cnpr.unflatten(2, (2, r)).mul_(decay_cnrr[:, :, None])
    return _Chunks(
        k_cnrd, readers_cnpd, decay_cnrr[:, :, None], from_start_cn1r1, to_end_cnr1, scores_cnpr,
        (readers_cn2rd * from_start_cn1r1).flatten(2, 3), k_cnrd * to_end_cnr1, from_start_cn1r1[:, :, 0, -1:],
    )  # fmt: skip


def _forward(
    inputs: tuple[Tensor, ...], scale: float, segments: list[_Segment], r: int, kept: list[Tensor] | None
) -> tuple[Tensor, Tensor]:
    """Outputs [b, s, h, v] and the last state of each document [k, n, d, v]; ``kept`` gets what backward needs.

    What a row writes is what it brings less what it reads, of earlier rows of its chunk and of the state before it,

        written = beta v - (beta k) S - L written,    written = (1 + L)^-1 (beta v - (beta k) S)

    with L the strictly lower scores of keys with keys.
    """
    *tokens, initial_kndv = inputs
    last_kndv = initial_kndv.clone()
    out_bshv = torch.empty_like(inputs[2], dtype=inputs[0].dtype)
    eye_rr = torch.eye(r, dtype=initial_kndv.dtype, device=initial_kndv.device)
    state_ndv = initial_kndv[0]
    for segment in segments:
        q_cnrd, k_cnrd, v_cnrv, log_decay_cnr, write_cnr = (
            _to_chunks(x, segment, r, initial_kndv.dtype) for x in tokens
        )
        chunks = _chunks(q_cnrd, k_cnrd, log_decay_cnr, write_cnr, scale)
        # The solver takes the diagonal as 1 and reads nothing above it.
        lower_cnrr = chunks.scores_cnpr[:, :, r:]
        inverse_cnrr = torch.linalg.solve_triangular(
            lower_cnrr, eye_rr.expand_as(lower_cnrr), upper=False, unitriangular=True
        )
        written_cnrv = v_cnrv * write_cnr[..., None]
        out_cnrv = torch.empty_like(v_cnrv)
        before_ndv = state_ndv
        for c, (begins, ends) in enumerate(zip(segment.begins, segment.ends, strict=True)):
            if begins is not None:
                state_ndv = initial_kndv[begins]
            read_npv = chunks.decayed_readers_cnpd[c] @ state_ndv
            out_cnrv[c] = read_npv[:, :r]
            written_cnrv[c] = inverse_cnrr[c] @ (written_cnrv[c] - read_npv[:, r:])
            state_ndv = (state_ndv * chunks.forget_cn11[c]).baddbmm_(chunks.decayed_k_cnrd[c].mT, written_cnrv[c])
            if ends is not None:
                last_kndv[ends] = state_ndv
        _add_product(out_cnrv, chunks.scores_cnpr[:, :, :r], written_cnrv)
        _from_chunks(out_cnrv, segment, out_bshv)
        if kept is not None:
            kept += [before_ndv, inverse_cnrr, written_cnrv]
    return out_bshv, last_kndv


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
            tensors = [_to_chunks(x, segment, ctx.r, initial_kndv.dtype) for x in (*inputs, d_out_bshv)]
            q_cnrd, k_cnrd, v_cnrv, log_decay_cnr, write_cnr, d_out_cnrv = tensors
            before_ndv, inverse_cnrr, written_cnrv = kept[3 * i : 3 * i + 3]
            chunks = _chunks(q_cnrd, k_cnrd, log_decay_cnr, write_cnr, ctx.scale)
            state_cndv = _states(segment, chunks, written_cnrv, before_ndv, initial_kndv)
            # The gradient of what each reader read; that of a key's is also minus that of what its row brought, beta v.
            d_read_cnpv = torch.cat([d_out_cnrv, torch.empty_like(v_cnrv)], dim=2)
            d_written_cnrv = chunks.scores_cnpr[:, :, : ctx.r].mT @ d_out_cnrv
            d_state_cndv = torch.empty_like(state_cndv)
            for c in reversed(range(len(k_cnrd))):
                if (document := segment.ends[c]) is not None:
                    d_state_ndv = d_last_kndv[document]
                d_state_cndv[c] = d_state_ndv
                d_brought_nrv = inverse_cnrr[c].mT @ d_written_cnrv[c].baddbmm_(chunks.decayed_k_cnrd[c], d_state_ndv)
                torch.neg(d_brought_nrv, out=d_read_cnpv[c, :, ctx.r :])
                d_state_ndv = (d_state_ndv * chunks.forget_cn11[c]).baddbmm_(
                    chunks.decayed_readers_cnpd[c].mT, d_read_cnpv[c]
                )
                if (document := segment.begins[c]) is not None:
                    d_initial_kndv[document] = d_state_ndv
            found = _gradients(
                chunks, state_cndv, d_state_cndv, written_cnrv, d_read_cnpv, v_cnrv, write_cnr, ctx.scale
            )
            for gradient, found_cnr in zip(gradients, found, strict=True):
                _from_chunks(found_cnr, segment, gradient)
        return *gradients, d_initial_kndv, None, None, None


def _states(
    segment: _Segment, chunks: _Chunks, written_cnrv: Tensor, before_ndv: Tensor, initial_kndv: Tensor
) -> Tensor:
    """The state before each chunk [c, n, d, v], from what its predecessors wrote."""
    states = []
    for c, begins in enumerate(segment.begins):
        if begins is not None:
            before_ndv = initial_kndv[begins]
        states.append(before_ndv)
        before_ndv = (before_ndv * chunks.forget_cn11[c]).baddbmm_(chunks.decayed_k_cnrd[c].mT, written_cnrv[c])
    return torch.stack(states)


def _gradients(
    chunks: _Chunks,
    state_cndv: Tensor,
    d_state_cndv: Tensor,
    written_cnrv: Tensor,
    d_read_cnpv: Tensor,
    v_cnrv: Tensor,
    write_cnr: Tensor,
    scale: float,
) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, log decay and write, from those of the states after the chunks and of what was read."""
    k_cnrd, r = chunks.k_cnrd, write_cnr.shape[-1]
    d_scores_cnpr = d_read_cnpv @ written_cnrv.mT
    d_scores_cnpr[:, :, r:].tril_(-1)
    through_scores_cnpr = d_scores_cnpr * chunks.scores_cnpr
    d_scores_cnpr.unflatten(2, (2, r)).mul_(chunks.decay_cn1rr)
    d_readers_cnpd = d_read_cnpv @ state_cndv.mT
    d_readers_cnpd.unflatten(2, (2, r)).mul_(chunks.from_start_cn1r1)
    # Keys in their other part, as what is written to, which the state after the chunk and the scores read.
    d_k_cnrd = (written_cnrv @ d_state_cndv.mT).mul_(chunks.to_end_cnr1)
    d_log_decay_cnr = _d_log_decay(chunks, state_cndv, d_state_cndv, through_scores_cnpr, d_readers_cnpd, d_k_cnrd)
    _add_product(d_readers_cnpd, d_scores_cnpr, k_cnrd)
    _add_product(d_k_cnrd, d_scores_cnpr.mT, chunks.readers_cnpd)
    d_q_cnrd, d_weighted_k_cnrd = d_readers_cnpd[:, :, :r] * scale, d_readers_cnpd[:, :, r:]
    d_brought_cnrv = d_read_cnpv[:, :, r:].neg()
    d_write_cnr = (k_cnrd * d_weighted_k_cnrd).sum(-1) + (v_cnrv * d_brought_cnrv).sum(-1)
    d_k_cnrd.addcmul_(d_weighted_k_cnrd, write_cnr[..., None])
    return d_q_cnrd, d_k_cnrd, d_brought_cnrv.mul_(write_cnr[..., None]), d_log_decay_cnr, d_write_cnr


def _d_log_decay(
    chunks: _Chunks,
    state_cndv: Tensor,
    d_state_cndv: Tensor,
    through_scores_cnpr: Tensor,
    d_readers_cnpd: Tensor,
    d_k_cnrd: Tensor,
) -> Tensor:
    """The gradient of the log decays [c, n, r], from the readers' and keys' gradients as far as they go through states.

    The total log decay of a row stands in exp(+total) wherever the row reads, in exp(-total) wherever it is written to;
    a log decay is in the totals of its own and all later rows. Summed in float64: what does not pass a log decay
    cancels in its gradient, which strong decays make small beside it.

    Args:
        through_scores_cnpr: scores times their gradients.
    """
    reads_cnp = (chunks.readers_cnpd * d_readers_cnpd).sum(-1) + through_scores_cnpr.sum(-1, dtype=torch.float64)
    to_end_cnr = (chunks.k_cnrd * d_k_cnrd).sum(-1).double()
    d_total_cnr = (
        reads_cnp.unflatten(-1, (2, reads_cnp.shape[-1] // 2)).sum(-2)
        - through_scores_cnpr.sum(-2, dtype=torch.float64)
        - to_end_cnr
    )
    through_state_cn = chunks.forget_cn11[..., 0, 0] * (state_cndv * d_state_cndv).sum((-1, -2))
    d_total_cnr[..., -1] += to_end_cnr.sum(-1) + through_state_cn
    return d_total_cnr.flip(-1).cumsum(-1).flip(-1)


def _add_product(sum_cnxy: Tensor, a_cnxz: Tensor, b_cnzy: Tensor) -> None:
    """sum += a @ b, in place."""
    sum_cnxy.flatten(0, 1).baddbmm_(a_cnxz.flatten(0, 1), b_cnzy.flatten(0, 1))
