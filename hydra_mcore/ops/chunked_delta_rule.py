# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The gated delta rule in plain torch: chunk by chunk over whole sequences, token by token while decoding.

Per head and token, in the paper's letters (the GDN branch of HydraHead, arXiv 2606.20097, after Gated
DeltaNet, arXiv 2412.06464 eq 10):

    S_t = alpha_t S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T        o_t = S_t q_t

The state is stored transposed, [d, v], as flash-linear-attention does. Shape suffixes: b batch, s sequence, h heads,
d key dimension, v value dimension; inside this file the sequence is also cut into ``c`` chunks of ``r`` rows.

This file needs torch only: a copy of it travels with every model exported to Hugging Face.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["chunked_delta_rule", "recurrent_delta_rule"]

# Of (chunks, number of chunks of the last document): the state with which the first document begins.
Enter = Callable[[list[tuple[Tensor, ...]], int], Tensor]


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
    enter: Enter | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """Apply the gated delta rule on any device, linear in s forward and backward.

    Chunked as in DeltaNet (arXiv 2406.06484 section 3) with the decay of Gated DeltaNet (arXiv 2412.06464
    section 3.3): inside a chunk one triangular solve replaces the recurrence, between chunks the state is
    carried. A chunk holds one document only, so up to ``chunk_size - 1`` rows of padding follow each: nothing
    beside documents of many chunks; for documents of few tokens, five times the states returned anyway.

    Args:
        q_bshd, k_bshd: queries and keys, already normalised (keys to length 1).
        v_bshv: values.
        log_decay_bsh: ln(alpha), finite and at most 0.
        write_bsh: beta, 0 to 2. A token of log decay 0 and beta 0 leaves the state as it was.
        scale: factor on the queries, d**-0.5 unless given.
        initial_state_bhdv: state before the first token, zeros unless given; [b * n, h, d, v] with n documents.
        bounds: boundaries 0 < ... < s of the n documents packed into each row, one document unless given.
        enter: gives the first document's state when another rank holds its beginning.
        chunk_size: rows per chunk; results do not depend on it.

    Returns:
        Outputs [b, s, h, v] in the dtype of ``q_bshd``, and the state after the last token of each document in float32
        (float64 for float64 queries), [b * n, h, d, v].

    Raises:
        ValueError: the shape of the initial state is wrong.
    """
    b, s, h, d = q_bshd.shape
    bounds = (0, s) if bounds is None else bounds
    initial_state_bhdv = _initial_state(q_bshd, (b * (len(bounds) - 1), h, d, v_bshv.shape[-1]), initial_state_bhdv)
    # Padded rows hold zeros: they write nothing and forget nothing. An empty sequence is one chunk of them.
    chunks_per_document = [max(1, -(-(end - start) // chunk_size)) for start, end in itertools.pairwise(bounds)]
    slot_s = _slots(bounds, chunks_per_document, chunk_size, q_bshd.device)

    def chunked(x: Tensor) -> Tensor:
        """[b, s, h, ...] to [b, h, c, r, ...]"""
        x = x.to(_state_dtype(q_bshd)).transpose(1, 2)
        padded = x.new_zeros(*x.shape[:2], sum(chunks_per_document) * chunk_size, *x.shape[3:])
        return padded.index_copy(2, slot_s, x).unflatten(2, (-1, chunk_size))

    q, k, v, log_decay, write = (chunked(x) for x in (q_bshd, k_bshd, v_bshv, log_decay_bsh, write_bsh))
    states_bhdv = list(initial_state_bhdv.split(b))
    out_bhcrv, last_bhdv = _scan(q * (d**-0.5 if scale is None else scale), k, v, log_decay, write, states_bhdv, chunks_per_document, enter)
    return out_bhcrv.flatten(2, 3).transpose(1, 2).index_select(1, slot_s).to(q_bshd.dtype), last_bhdv


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
    decay_sbh11, write_sbh11 = (x.transpose(0, 1)[..., None, None] for x in (log_decay_bsh.to(dtype).exp(), write_bsh.to(dtype)))
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


def _scan(
    q_bhcrd: Tensor,
    k_bhcrd: Tensor,
    v_bhcrv: Tensor,
    log_decay_bhcr: Tensor,
    write_bhcr: Tensor,
    states_bhdv: list[Tensor],
    chunks_per_document: Sequence[int],
    enter: Enter | None,
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


def _slots(bounds: Sequence[int], chunks_per_document: list[int], chunk_size: int, device: torch.device) -> Tensor:
    """Return, for every token, its place [s] once each document is padded to whole chunks."""
    bounds_n1 = torch.tensor(bounds)
    padded_starts_n = torch.tensor([0, *itertools.accumulate(chunks_per_document[:-1])]) * chunk_size
    shifts_s = (padded_starts_n - bounds_n1[:-1]).repeat_interleave(bounds_n1.diff())
    return (torch.arange(bounds[-1]) + shifts_s).to(device)
