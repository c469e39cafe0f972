# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The delta rule with decay, of GDN and KDA heads, over whole sequences, packed documents and context-parallel parts.

One signature over two engines: flash-linear-attention's kernels (``fla_kernels.py``) and the torch reference, whose
file states the equation (``chunked_delta_rule.py``). Shape suffixes are those of ``hydra_mcore/heads.py``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hydra_mcore.ops import fla_kernels
from hydra_mcore.ops.chunked_delta_rule import chunked_delta_rule, recurrent_delta_rule
from hydra_mcore.ops.chunks import FEW_TOKENS
from hydra_mcore.ops.context_parallel import Group, state_from_previous
from hydra_mcore.sequence import SequencePart

__all__ = ["gated_delta_rule"]


def gated_delta_rule(
    q_bshd: Tensor,
    k_bshd: Tensor,
    v_bshv: Tensor,
    log_decay: Tensor,
    write_bsh: Tensor,
    *,
    part: SequencePart | None = None,
    cp_group: Group | None = None,
    scale: float | None = None,
    initial_state_bhdv: Tensor | None = None,
    state_of_part: bool = False,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor | None]:
    """Apply the gated delta rule, with flash-linear-attention's kernels where they serve (``fla_kernels.serve``).

    Everything else takes ``chunked_delta_rule``, or the recurrence for a few tokens. All keep the state in float32.

    Args:
        q_bshd, k_bshd: queries and keys, already normalised (keys to length 1).
        v_bshv: values.
        log_decay: ln(alpha), finite and at most 0: [b, s, h], or [b, s, h, d] for one a key channel.
        write_bsh: beta, 0 to 1, or to 2 where negative eigenvalues are wanted.
        part: which tokens of the row these are, and where documents begin, which do not see each other (n of them;
            packed documents need b == 1); the whole row and one document unless given.
        cp_group: the ranks that hold the row's parts, where there are several; an initial state is not taken then.
        scale: factor on the queries, d**-0.5 unless given.
        initial_state_bhdv: state before the first token, zeros unless given; [n, h, d, v] of packed documents.
        state_of_part: of several parts, return the state after this rank's part too; not of packed documents.
        chunk_size: rows per chunk of the torch reference, a power of two; results do not depend on it.

    Returns:
        Outputs [b, s, h, v] in the dtype of ``q_bshd``, and the state after the last token, [b, h, d, v] or
        [n, h, d, v], in float32 (float64 for float64 queries). Of several parts None, or the state after this one.

    Raises:
        ValueError: the tokens are not those of the part, or the shape of the initial state is wrong.
    """
    part = SequencePart(q_bshd.shape[1]) if part is None else part
    check_part(part, q_bshd, initial_state_bhdv)
    inputs = (q_bshd, k_bshd, v_bshv, log_decay, write_bsh)
    few = part.cp_size == 1 and not part.packed and 0 < part.length <= FEW_TOKENS
    fused = fla_kernels.serve(q_bshd)
    if fused and part.cp_size > 1 and not state_of_part:
        return fla_kernels.delta_rule_on_parts(inputs, scale, part, cp_group), None
    if part.cp_size > 1:
        initial_state_bhdv = _state_before(part, cp_group, inputs)
    if fused:
        return fla_kernels.delta_rule(inputs, scale, initial_state_bhdv, part.bounds if part.packed else None, few)
    if few:
        return recurrent_delta_rule(*inputs, scale=scale, initial_state_bhdv=initial_state_bhdv)
    layout = {"bounds": part.bounds, "chunk_size": chunk_size}
    out_bshv, state_bhdv = chunked_delta_rule(*inputs, scale=scale, initial_state_bhdv=initial_state_bhdv, **layout)
    return out_bshv, state_bhdv if part.cp_size == 1 or state_of_part else None


def _state_before(part: SequencePart, cp_group: Group, inputs: tuple[Tensor, ...]) -> Tensor:
    """The states with which this rank's documents begin, in exchange for what this part does to a state.

    Every token maps the state S to A S + B. From the state [0 | 1], with values that are zero beside the true ones, the
    rule itself arrives at [B | A] of the part's last document. A document that begins here ignores the state before.
    """
    hands_on = part.continues and part.cp_rank < part.cp_size - 1
    last = slice(
        part.bounds[-2] if hands_on else part.num_tokens, None
    )  # no tokens keep the graph: see context_parallel
    _, k, v, log_decay, write = (x[:, last] for x in inputs)
    b, _, h, d = k.shape
    start_bhd1 = F.pad(
        torch.eye(d, dtype=torch.promote_types(k.dtype, torch.float32), device=k.device), (v.shape[-1], 0)
    )
    start_bhd1, wider = start_bhd1.expand(b, h, -1, -1).contiguous(), (k, k, F.pad(v, (0, d)), log_decay, write)
    if fla_kernels.serve(k):
        _, state = fla_kernels.delta_rule(wider, None, start_bhd1, None)
    else:
        _, state = chunked_delta_rule(*wider, initial_state_bhdv=start_bhd1)
    offset, transition = state.split([v.shape[-1], d], dim=-1)
    if not hands_on:
        offset = offset * 0.0
    first_bhdv = state_from_previous(transition * float(hands_on and len(part.bounds) == 2), offset, cp_group)
    return torch.cat([first_bhdv, first_bhdv.new_zeros(b * (len(part.bounds) - 2), h, d, v.shape[-1])])


def check_part(part: SequencePart, q_bshd: Tensor, initial_state_bhdv: Tensor | None) -> None:
    """Raise ValueError unless these are the tokens of the part, and its initial state one that can be given."""
    if part.cp_size > 1 and initial_state_bhdv is not None:
        raise ValueError("an initial state comes from the previous rank under context parallelism; pass none")
    b, s = q_bshd.shape[:2]
    if part.num_tokens != s:
        raise ValueError(f"{s} tokens were given, the part has {part.num_tokens}")
    if part.packed and b != 1:
        raise ValueError(f"packed documents need all of them in one row, got a batch of {b}")
