# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The gated delta rule: what a GDN head computes, over whole sequences and over packed documents.

Per head and token, in the paper's letters (the GDN branch of HydraHead, arXiv 2606.20097, after Gated
DeltaNet, arXiv 2412.06464 eq 10):

    S_t = alpha_t S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T        o_t = S_t q_t

The state is stored transposed, [d, v], as flash-linear-attention does. Shape suffixes are those of
``hydra_mcore/heads.py``; inside this file the sequence is also cut into ``c`` chunks of ``r`` rows.
"""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hydra_mcore.ops.context_parallel import Group, state_from_previous
from hydra_mcore.ops.sequence import SequencePart

__all__ = ["gated_delta_rule"]


def gated_delta_rule(
    q_bshd: Tensor,
    k_bshd: Tensor,
    v_bshv: Tensor,
    log_decay_bsh: Tensor,
    write_bsh: Tensor,
    *,
    scale: float | None = None,
    initial_state_bhdv: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cp_group: Group | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor | None]:
    """Apply the gated delta rule, with flash-linear-attention's kernel where there is one.

    The kernel serves GPU tensors up to 32 bits when the package is installed (float32 products then run in
    TF32); everything else takes ``torch_gated_delta_rule``. Both keep the state in float32.

    Args:
        q_bshd, k_bshd: queries and keys, already normalised (keys to length 1).
        v_bshv: values.
        log_decay_bsh: ln(alpha), finite and at most 0.
        write_bsh: beta, 0 to 1, or to 2 where negative eigenvalues are wanted.
        scale: factor on the queries, d**-0.5 unless given.
        initial_state_bhdv: state before the first token, zeros unless given; [n, h, d, v] with ``cu_seqlens``.
        cu_seqlens: [n + 1] integers 0 < ... < s, the boundaries of n documents packed into one row (b == 1).
            No document sees another. Read on the host: a CPU tensor avoids a GPU synchronisation.
        cp_group: ranks that hold consecutive parts of the row, all of the same length. The tensors are then this
            rank's part, ``cu_seqlens`` the boundaries of the whole row, and an initial state is not taken.
        chunk_size: rows per chunk of the torch reference; results do not depend on it.

    Returns:
        Outputs [b, s, h, v] in the dtype of ``q_bshd``, and the state after the last token, [b, h, d, v] or
        [n, h, d, v], in float32 (float64 for float64 queries); None in its place with a ``cp_group`` of several ranks.

    Raises:
        ValueError: ``cu_seqlens`` or the shape of the initial state is wrong.
    """
    part = _part(q_bshd, cu_seqlens, cp_group)
    if part.cp_size > 1 and initial_state_bhdv is not None:
        raise ValueError("an initial state comes from the previous rank under context parallelism; pass none")
    # An empty grid is an error to the kernel; tensor-parallel ranks may own no GDN head of a layer.
    if q_bshd.is_cuda and q_bshd.dtype != torch.float64 and v_bshv.numel() > 0 and (kernel := _fla_kernel()):
        fla_inputs = (q_bshd, k_bshd, v_bshv, log_decay_bsh, write_bsh)
        if part.cp_size > 1:
            return _fla_on_parts(kernel, fla_inputs, scale, part, cp_group), None
        return _fla_gated_delta_rule(kernel, *fla_inputs, scale, initial_state_bhdv, cu_seqlens)
    out_bshv, state_bhdv = torch_gated_delta_rule(
        q_bshd, k_bshd, v_bshv, log_decay_bsh, write_bsh, scale, initial_state_bhdv, part, cp_group, chunk_size
    )
    return out_bshv, state_bhdv if part.cp_size == 1 else None


def torch_gated_delta_rule(
    q_bshd: Tensor,
    k_bshd: Tensor,
    v_bshv: Tensor,
    log_decay_bsh: Tensor,
    write_bsh: Tensor,
    scale: float | None,
    initial_state_bhdv: Tensor | None,
    part: SequencePart,
    cp_group: Group | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """The reference in plain torch: ``gated_delta_rule`` on any device, linear in s forward and backward.

    Chunked as in DeltaNet (arXiv 2406.06484 section 3) with the decay of Gated DeltaNet (arXiv 2412.06464
    section 3.3): inside a chunk one triangular solve replaces the recurrence, between chunks the state is
    carried. A chunk holds one document only, so up to ``chunk_size - 1`` rows of padding follow each: nothing
    beside documents of many chunks; for documents of few tokens, five times the states returned anyway.
    """
    b, _, h, d = q_bshd.shape
    bounds = part.bounds
    num_documents = len(bounds) - 1
    state_shape = (b * num_documents, h, d, v_bshv.shape[-1])
    dtype = torch.promote_types(q_bshd.dtype, torch.float32)
    if initial_state_bhdv is None:
        initial_state_bhdv = q_bshd.new_zeros(state_shape, dtype=dtype)
    elif initial_state_bhdv.shape != state_shape:
        raise ValueError(f"initial state has shape {list(initial_state_bhdv.shape)}, needs {list(state_shape)}")

    # Padded rows hold zeros: they write nothing and forget nothing. An empty sequence is one chunk of them.
    chunks_per_document = [max(1, -(-(end - start) // chunk_size)) for start, end in itertools.pairwise(bounds)]
    slot_s = _slots(bounds, chunks_per_document, chunk_size, q_bshd.device)

    def chunked(x: Tensor) -> Tensor:
        """[b, s, h, ...] to [b, h, c, r, ...]"""
        x = x.to(dtype).transpose(1, 2)
        padded = x.new_zeros(*x.shape[:2], sum(chunks_per_document) * chunk_size, *x.shape[3:])
        return padded.index_copy(2, slot_s, x).unflatten(2, (-1, chunk_size))

    out_bhcrv, final_state_bhdv = _scan(
        chunked(q_bshd) * (d**-0.5 if scale is None else scale),
        chunked(k_bshd),
        chunked(v_bshv),
        chunked(log_decay_bsh),
        chunked(write_bsh),
        list(initial_state_bhdv.to(dtype).split(b)),
        chunks_per_document,
        functools.partial(_enter_part, part, cp_group) if part.cp_size > 1 else None,
    )
    out_bshv = out_bhcrv.flatten(2, 3).transpose(1, 2).index_select(1, slot_s)
    return out_bshv.to(q_bshd.dtype), final_state_bhdv


def _scan(
    q_bhcrd: Tensor,
    k_bhcrd: Tensor,
    v_bhcrv: Tensor,
    log_decay_bhcr: Tensor,
    write_bhcr: Tensor,
    states_bhdv: list[Tensor],
    chunks_per_document: Sequence[int],
    enter: Callable[[list[tuple[Tensor, ...]], int], Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """Run documents, each made of consecutive chunks and starting from its own state.

    ``enter`` gives the first document's state when another rank holds its beginning.
    Returns the outputs [b, h, c, r, v] and the last states of all documents, joined along b.
    """
    rows = q_bhcrd.shape[3]
    # Sums of log decays in float64: after a few strong decays their differences, which is all that is used,
    # would keep only four digits in float32. Masked before exp, because above the diagonal the exponent is
    # positive, and an overflow that is masked afterwards still has a NaN gradient.
    total_bhcr = log_decay_bhcr.double().cumsum(-1)
    future_rr = torch.ones(rows, rows, dtype=torch.bool, device=q_bhcrd.device).triu(1)
    decay_bhcrr = (total_bhcr[..., :, None] - total_bhcr[..., None, :]).masked_fill(future_rr, -torch.inf)
    decay_bhcrr = decay_bhcrr.to(q_bhcrd.dtype).exp()
    from_start_bhcr = total_bhcr.to(q_bhcrd.dtype).exp()
    to_end_bhcr = (total_bhcr[..., -1:] - total_bhcr).to(q_bhcrd.dtype).exp()

    # What a row writes is what it brings, less what earlier rows and the incoming state already hold at its
    # key: (1 + L) u = beta v - beta k S. Solved here for both right-hand sides at once, S still unknown; the
    # solver takes the diagonal as 1 and reads nothing above it.
    write_key_bhcrd = k_bhcrd * write_bhcr[..., None]
    lower_bhcrr = (write_key_bhcrd @ k_bhcrd.mT) * decay_bhcrr
    brought = torch.cat([v_bhcrv * write_bhcr[..., None], write_key_bhcrd * from_start_bhcr[..., None]], dim=-1)
    solved = torch.linalg.solve_triangular(lower_bhcrr, brought, upper=False, unitriangular=True)
    new_bhcrv, erase_bhcrd = solved.split([v_bhcrv.shape[-1], k_bhcrd.shape[-1]], dim=-1)

    per_chunk = (
        new_bhcrv,
        erase_bhcrd,
        (q_bhcrd @ k_bhcrd.mT) * decay_bhcrr,
        q_bhcrd * from_start_bhcr[..., None],
        k_bhcrd * to_end_bhcr[..., None],
        from_start_bhcr[..., -1:, None],
    )
    # Unbound once: indexing chunk by chunk would make backward quadratic in their number.
    chunks = list(zip(*(x.unbind(2) for x in per_chunk), strict=True))
    if enter is not None:
        states_bhdv[0] = enter(chunks, chunks_per_document[-1])
    outputs, final_states = [], []
    following = iter(chunks)
    for state, num_chunks in zip(states_bhdv, chunks_per_document, strict=True):
        for new, erase, scores, query, key, forget in itertools.islice(following, num_chunks):
            written = new - erase @ state
            outputs.append(query @ state + scores @ written)
            state = state * forget + key.mT @ written
        final_states.append(state)
    return torch.stack(outputs, dim=2), torch.cat(final_states)


def _enter_part(part: SequencePart, cp_group: Group, chunks: list[tuple[Tensor, ...]], last_document: int) -> Tensor:
    """The state with which this rank's part begins, in exchange for what this part does to a state.

    A state passes a chunk as S -> forget S + key^T (new - erase S), which is linear: carried through the chunks of the
    part's last document, [0 | 1] becomes [B | A] of S -> A S + B. A document that begins here ignores the state before.
    """
    new, erase, _, _, _, _ = chunks[0]
    v, d = new.shape[-1], erase.shape[-1]
    joined_bh11 = new[..., :0, :1].sum(dim=(-2, -1), keepdim=True)  # zero, joined to the graph: see context_parallel
    state = joined_bh11 + torch.cat([new.new_zeros(d, v), torch.eye(d, dtype=new.dtype, device=new.device)], dim=-1)
    if not part.continues or part.cp_rank == part.cp_size - 1:
        state = state * 0.0
    else:
        for new, erase, _, _, key, forget in chunks[-last_document:]:
            state = state * forget + key.mT @ (torch.nn.functional.pad(new, (0, d)) - erase @ state)
    offset, transition = state.split([v, d], dim=-1)
    return state_from_previous(transition * float(len(part.bounds) == 2), offset, cp_group)


def _part(q_bshd: Tensor, cu_seqlens: Tensor | None, cp_group: Group | None) -> SequencePart:
    """The rows that this rank holds, from boundaries of the whole row; without ``cu_seqlens`` it is one document."""
    b, s = q_bshd.shape[:2]
    if cu_seqlens is not None and b != 1:
        raise ValueError(f"cu_seqlens needs all documents packed into one row, got a batch of {b}")
    cp_size, cp_rank = (cp_group.size(), cp_group.rank()) if cp_group is not None else (1, 0)
    return SequencePart(s * cp_size, cp_size, cp_rank, None if cu_seqlens is None else tuple(cu_seqlens.tolist()))


def _slots(bounds: Sequence[int], chunks_per_document: list[int], chunk_size: int, device: torch.device) -> Tensor:
    """Return, for every token, its place [s] once each document is padded to whole chunks."""
    bounds_n1 = torch.tensor(bounds)
    padded_starts_n = torch.tensor([0, *itertools.accumulate(chunks_per_document[:-1])]) * chunk_size
    shifts_s = (padded_starts_n - bounds_n1[:-1]).repeat_interleave(bounds_n1.diff())
    return (torch.arange(bounds[-1]) + shifts_s).to(device)


@functools.cache
def _fla_kernel() -> Callable[..., tuple[Tensor, Tensor]] | None:
    """Return flash-linear-attention's chunked kernel, or None with one warning where it is not installed."""
    try:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule  # needs a GPU build of triton: only on demand
    except ImportError as error:
        warnings.warn(
            f"gated delta rule: no flash-linear-attention ({error}); the torch reference runs on the GPU instead, "
            "slower. Mend: pip install flash-linear-attention",
            stacklevel=3,
        )
        return None
    return chunk_gated_delta_rule


def _fla_gated_delta_rule(
    kernel: Callable[..., tuple[Tensor, Tensor]],
    q_bshd: Tensor,
    k_bshd: Tensor,
    v_bshv: Tensor,
    log_decay_bsh: Tensor,
    write_bsh: Tensor,
    scale: float | None,
    initial_state_bhdv: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Translate to the kernel's names (written for flash-linear-attention 0.6.0) and call it."""
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.to(q_bshd.device, torch.long)
    if initial_state_bhdv is not None:
        initial_state_bhdv = initial_state_bhdv.float()
    return kernel(
        q=q_bshd,
        k=k_bshd.to(q_bshd.dtype),
        v=v_bshv.to(q_bshd.dtype),
        g=log_decay_bsh.float(),
        beta=write_bsh.float(),
        scale=scale,
        initial_state=initial_state_bhdv,
        output_final_state=True,
        use_qk_l2norm_in_kernel=False,
        cu_seqlens=cu_seqlens,
    )


def _fla_on_parts(
    kernel: Callable[..., Any], inputs: tuple[Tensor, ...], scale: float | None, part: SequencePart, cp_group: Group
) -> Tensor:
    """flash-linear-attention's own context parallelism, which takes one row at a time and the whole row's boundaries.

    Written for 0.6.0; not yet run on a GPU.
    """
    from fla.ops.cp import build_cp_context

    cu_seqlens = torch.tensor(part.documents)
    context = build_cp_context(cu_seqlens.to(inputs[0].device), group=cp_group, cu_seqlens_cpu=cu_seqlens)
    q, k, v, log_decay, write = inputs
    rows = [
        kernel(
            q=q[row : row + 1],
            k=k[row : row + 1].to(q.dtype),
            v=v[row : row + 1].to(q.dtype),
            g=log_decay[row : row + 1].float(),
            beta=write[row : row + 1].float(),
            scale=scale,
            use_qk_l2norm_in_kernel=False,
            cp_context=context,
        )[0]
        for row in range(q.shape[0])
    ]
    return torch.cat(rows)
