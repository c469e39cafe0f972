# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The gated delta rule token by token, exactly as the paper writes it: slow truth for the tests."""

from __future__ import annotations

import torch
from torch import Tensor


def naive_gated_delta_rule(
    q_bshd: Tensor,
    k_bshd: Tensor,
    v_bshv: Tensor,
    log_decay: Tensor,
    write_bsh: Tensor,
    *,
    scale: float | None = None,
    initial_state_bhdv: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Recur S_t = S_{t-1} Diag(alpha_t) (I - beta_t k_t k_t^T) + beta_t v_t k_t^T, o_t = S_t q_t in float64.

    S is [v, d] here, as in the paper (arXiv 2606.20097; arXiv 2412.06464 eq 10); log decays are [b, s, h], or
    [b, s, h, d] for one a key channel (arXiv 2510.26692 eq 1). Returns the outputs [b, s, h, v] and the last state
    transposed to [b, h, d, v], both float64.
    """
    (b, _, h, d), v = q_bshd.shape, v_bshv.shape[-1]
    scale = d**-0.5 if scale is None else scale
    eye_dd = torch.eye(d, dtype=torch.float64)
    state_bhvd = torch.zeros(b, h, v, d, dtype=torch.float64)
    if initial_state_bhdv is not None:
        state_bhvd = initial_state_bhdv.double().mT
    alpha_bshx = (log_decay if log_decay.dim() == 4 else log_decay[..., None]).double().exp()
    tokens = [x.double().unbind(1) for x in (q_bshd, k_bshd, v_bshv, alpha_bshx, write_bsh)]
    outputs = []
    for q_bhd, k_bhd, v_bhv, alpha_bhx, write_bh in zip(*tokens, strict=True):
        alpha, beta = alpha_bhx[..., None, :], write_bh[..., None, None]
        kk_bhdd = k_bhd[..., :, None] * k_bhd[..., None, :]
        vk_bhvd = v_bhv[..., :, None] * k_bhd[..., None, :]
        state_bhvd = alpha * state_bhvd @ (eye_dd - beta * kk_bhdd) + beta * vk_bhvd
        outputs.append((state_bhvd @ q_bhd[..., None]).squeeze(-1) * scale)
    return torch.stack(outputs, dim=1), state_bhvd.mT
