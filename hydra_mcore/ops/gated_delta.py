# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The gated delta rule of GDN heads, over whole sequences, packed documents and context-parallel parts.

One signature over two engines: flash-linear-attention's kernel and the torch reference, whose file states the equation
(``hydra_mcore/ops/chunked_delta_rule.py``). Shape suffixes are those of ``hydra_mcore/heads.py``.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hydra_mcore.ops.chunked_delta_rule import chunked_delta_rule, recurrent_delta_rule
from hydra_mcore.ops.context_parallel import Group, state_from_previous
from hydra_mcore.ops.sequence import SequencePart

__all__ = ["gated_delta_rule"]

FEW_TOKENS = 8  # up to so many the recurrence is less work than one chunk of 64 rows


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
    state_of_part: bool = False,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor | None]:
    """Apply the gated delta rule, with flash-linear-attention's kernel where there is one.

    The kernel serves GPU tensors up to 32 bits when the package is installed (float32 products then run in
    TF32); everything else takes ``chunked_delta_rule``, or the recurrence for a few tokens. All keep the state in float32.

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
        state_of_part: with a ``cp_group``, return the state after this rank's part too; not with ``cu_seqlens``.
        chunk_size: rows per chunk of the torch reference; results do not depend on it.

    Returns:
        Outputs [b, s, h, v] in the dtype of ``q_bshd``, and the state after the last token, [b, h, d, v] or
        [n, h, d, v], in float32 (float64 for float64 queries). With a ``cp_group`` of several ranks None, or the state
        after this rank's part.

    Raises:
        ValueError: ``cu_seqlens`` or the shape of the initial state is wrong.
    """
    part = _part(q_bshd, cu_seqlens, cp_group)
    if part.cp_size > 1 and initial_state_bhdv is not None:
        raise ValueError("an initial state comes from the previous rank under context parallelism; pass none")
    inputs = (q_bshd, k_bshd, v_bshv, log_decay_bsh, write_bsh)
    # An empty grid is an error to the kernel; tensor-parallel ranks may own no GDN head of a layer.
    if q_bshd.is_cuda and q_bshd.dtype != torch.float64 and v_bshv.numel() > 0 and (kernel := _fla_kernel()):
        if part.cp_size > 1 and state_of_part:
            return _fla_with_state(kernel, inputs, scale, cp_group)
        if part.cp_size > 1:
            return _fla_on_parts(kernel, inputs, scale, part, cp_group), None
        return _fla_gated_delta_rule(kernel, *inputs, scale, initial_state_bhdv, cu_seqlens)
    if part.cp_size == 1 and cu_seqlens is None and 0 < part.length <= FEW_TOKENS:
        return recurrent_delta_rule(*inputs, scale=scale, initial_state_bhdv=initial_state_bhdv)
    enter = functools.partial(_enter_part, part, cp_group) if part.cp_size > 1 else None
    layout = {"bounds": part.bounds, "enter": enter, "chunk_size": chunk_size}
    out_bshv, state_bhdv = chunked_delta_rule(*inputs, scale=scale, initial_state_bhdv=initial_state_bhdv, **layout)
    return out_bshv, state_bhdv if part.cp_size == 1 or state_of_part else None


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
            state = state * forget + key.mT @ (F.pad(new, (0, d)) - erase @ state)
    offset, transition = state.split([v, d], dim=-1)
    return state_from_previous(transition * float(len(part.bounds) == 2), offset, cp_group)


def _part(q_bshd: Tensor, cu_seqlens: Tensor | None, cp_group: Group | None) -> SequencePart:
    """The rows that this rank holds, from boundaries of the whole row; without ``cu_seqlens`` it is one document."""
    b, s = q_bshd.shape[:2]
    if cu_seqlens is not None and b != 1:
        raise ValueError(f"cu_seqlens needs all documents packed into one row, got a batch of {b}")
    cp_size, cp_rank = (cp_group.size(), cp_group.rank()) if cp_group is not None else (1, 0)
    return SequencePart(s * cp_size, cp_size, cp_rank, None if cu_seqlens is None else tuple(cu_seqlens.tolist()))


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


def _fla_with_state(kernel: Callable[..., Any], inputs: tuple[Tensor, ...], scale: float | None, cp_group: Group) -> tuple[Tensor, Tensor]:
    """Outputs and last state of this rank's part, which the kernel's own context parallelism does not give.

    A part maps the state S before it to A S + B. The kernel finds both at once: from the state [0 | 1], with values that are
    zero beside the true ones, it arrives at [B | A]. Not yet run on a GPU.
    """
    q, k, v, log_decay, write = inputs
    b, _, h, d = k.shape
    start_bhd1 = F.pad(torch.eye(d, device=k.device), (v.shape[-1], 0)).expand(b, h, -1, -1)
    _, state = _fla_gated_delta_rule(kernel, q, k, F.pad(v, (0, d)), log_decay, write, scale, start_bhd1.contiguous(), None)
    offset, transition = state.split([v.shape[-1], d], dim=-1)
    return _fla_gated_delta_rule(kernel, *inputs, scale, state_from_previous(transition, offset, cp_group), None)
