# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Linear attention with a fixed decay a head, token by token as the paper writes it: slow truth for the tests."""

from __future__ import annotations

import torch
from torch import Tensor


def naive_linear_attention(
    q_bshd: Tensor,
    k_bshd: Tensor,
    v_bshv: Tensor,
    log_decay_h: Tensor,
    *,
    scale: float | None = None,
    initial_state_bhdv: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Recur S_t = lambda S_{t-1} + k_t v_t^T, o_t = S_t^T q_t in float64 (arXiv 2401.04658 eq 4).

    Returns the outputs [b, s, h, v] and the last state [b, h, d, v], both float64.
    """
    (b, _, h, d), v = q_bshd.shape, v_bshv.shape[-1]
    scale = d**-0.5 if scale is None else scale
    decay_h11 = log_decay_h.double().exp()[:, None, None]
    state_bhdv = torch.zeros(b, h, d, v, dtype=torch.float64)
    if initial_state_bhdv is not None:
        state_bhdv = initial_state_bhdv.double()
    outputs = []
    for q_bhd, k_bhd, v_bhv in zip(*(x.double().unbind(1) for x in (q_bshd, k_bshd, v_bshv)), strict=True):
        state_bhdv = decay_h11 * state_bhdv + torch.einsum("bhd,bhv->bhdv", k_bhd, v_bhv)
        outputs.append(torch.einsum("bhd,bhdv->bhv", q_bhd, state_bhdv) * scale)
    return torch.stack(outputs, dim=1), state_bhdv
