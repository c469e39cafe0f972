# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Linear attention with a fixed decay a head, of Lightning heads, over whole sequences, packed documents and
context-parallel parts.

One signature over two engines, as in ``gated_delta.py``: flash-linear-attention's kernels and the torch reference,
whose file states the equation (``chunked_linear_attention.py``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from hydra_mcore.ops import fla_kernels
from hydra_mcore.ops.chunked_linear_attention import chunked_linear_attention, recurrent_linear_attention
from hydra_mcore.ops.chunks import FEW_TOKENS, state_dtype
from hydra_mcore.ops.context_parallel import Group, state_from_previous
from hydra_mcore.ops.gated_delta import check_part
from hydra_mcore.sequence import SequencePart


def linear_attention(
    q_bshd: Tensor,
    k_bshd: Tensor,
    v_bshv: Tensor,
    log_decay_h: Tensor,
    *,
    part: SequencePart | None = None,
    cp_group: Group | None = None,
    scale: float | None = None,
    initial_state_bhdv: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Apply decayed linear attention, with flash-linear-attention's kernels where they serve (``fla_kernels.serve``).

    Everything else takes ``chunked_linear_attention``, or the recurrence for a few tokens. All keep the state in
    float32.

    Args:
        q_bshd, k_bshd: queries and keys.
        v_bshv: values.
        log_decay_h: ln(lambda) of each head, finite and at most 0; no gradient.
        part: which tokens of the row these are, and where documents begin, which do not see each other (n of them;
            packed documents need b == 1); the whole row and one document unless given.
        cp_group: the ranks that hold the row's parts, where there are several; an initial state is not taken then.
        scale: factor on the queries, d**-0.5 unless given.
        initial_state_bhdv: state before the first token, zeros unless given; [n, h, d, v] of packed documents.

    Returns:
        Outputs [b, s, h, v] in the dtype of ``q_bshd``, and the state after the last token of the part, [b, h, d, v] or
        [n, h, d, v], in float32 (float64 for float64 queries).

    Raises:
        ValueError: the tokens are not those of the part, or the shape of the initial state is wrong.
    """
    part = SequencePart(q_bshd.shape[1]) if part is None else part
    check_part(part, q_bshd, initial_state_bhdv)
    if part.cp_size > 1:
        initial_state_bhdv = _state_before(part, cp_group, k_bshd, v_bshv, log_decay_h)
    inputs, packed = (q_bshd, k_bshd, v_bshv, log_decay_h), len(part.bounds) > 2
    few = not packed and 0 < part.num_tokens <= FEW_TOKENS
    if fla_kernels.serve(q_bshd):
        bounds = part.bounds if packed else None
        return fla_kernels.linear_attention(inputs, scale, initial_state_bhdv, bounds, few)
    if few:
        return recurrent_linear_attention(*inputs, scale=scale, initial_state_bhdv=initial_state_bhdv)
    return chunked_linear_attention(*inputs, scale=scale, initial_state_bhdv=initial_state_bhdv, bounds=part.bounds)


def _state_before(part: SequencePart, cp_group: Group, k: Tensor, v: Tensor, log_decay_h: Tensor) -> Tensor:
    """The states with which this rank's documents begin, in exchange for what this part adds to a state and leaves of
    it. A document that begins here ignores the state before.
    """
    hands_on = part.continues and part.cp_rank < part.cp_size - 1
    first = part.bounds[-2] if hands_on else part.num_tokens  # no tokens keep the graph: see context_parallel
    dtype = state_dtype(k)
    age_s = torch.arange(part.num_tokens - 1 - first, -1, -1, device=k.device)
    left_sh1 = (log_decay_h.double() * age_s[:, None]).exp().to(dtype)[..., None]
    added_bhdv = (k[:, first:].to(dtype) * left_sh1).permute(0, 2, 3, 1) @ v[:, first:].to(dtype).transpose(1, 2)
    whole_h = (log_decay_h.double() * part.num_tokens).exp() * float(hands_on and len(part.bounds) == 2)
    left_bhd1 = whole_h.to(dtype)[:, None, None].expand(*added_bhdv.shape[:3], 1)
    first_bhdv = state_from_previous(left_bhd1, added_bhdv, cp_group)
    return torch.cat([first_bhdv, first_bhdv.new_zeros(k.shape[0] * (len(part.bounds) - 2), *first_bhdv.shape[1:])])
