# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The exported toy heads, and the table of kinds with them; takes the place of the file of this name in an export."""

from __future__ import annotations

import torch
from torch import Tensor

from .cache_hydra_head import HydraHeadCacheLayer
from .configuration_hydra_head import HydraHeadConfig
from .fa_heads_hydra_head import FullAttentionHeads
from .gdn_heads_hydra_head import GatedDeltaHeads
from .heads_hydra_head import Call, Heads, precise


class ToyHeads(Heads):
    """S_t = decay S_{t-1} + k_t v_t^T, o_t = S_t^T q_t / sqrt(d); padding is no token."""

    kind = "toy"

    def __init__(self, config: HydraHeadConfig, heads: list[int]) -> None:
        super().__init__(config, heads, kv_per_head=True, qk_norm=False, position="nope", gate="none")

    def outputs(
        self, x_bsm: Tensor, call: Call, shared_kv: tuple[Tensor, Tensor] | None, cache: HydraHeadCacheLayer | None
    ) -> Tensor:
        q, k, v = (precise(x) for x in self.project(x_bsm, shared_kv))
        decay, real_bs = self.config.toy_decay, x_bsm.new_ones(x_bsm.shape[:2], dtype=q.dtype)
        if call.padding is not None:
            real_bs = call.padding.real_bs.to(q.dtype)
        time_bs, order = real_bs.cumsum(dim=1), torch.ones(2 * x_bsm.shape[1:2], dtype=torch.bool, device=x_bsm.device)
        weight_bst = (decay ** (time_bs[:, :, None] - time_bs[:, None]).clamp(min=0)) * order.tril() * real_bs[:, None]
        out = torch.einsum("bshd,bthd,bst,bthv->bshv", q, k, weight_bst, v)
        left_bs = decay ** (time_bs[:, -1:] - time_bs) * real_bs
        state = torch.einsum("bs,bshd,bshv->bhdv", left_bs, k, v)
        states = {} if cache is None else cache.states.setdefault(self.kind, {})
        if "recurrent" in states:
            out = out + torch.einsum("bs,bshd,bhdv->bshv", decay**time_bs, q, states["recurrent"])
            state = state + decay ** time_bs[:, -1, None, None, None] * states["recurrent"]
        states["recurrent"] = state
        return (out * q.shape[-1] ** -0.5).to(x_bsm.dtype)


BRANCHES: dict[str, type[Heads]] = {branch.kind: branch for branch in (FullAttentionHeads, GatedDeltaHeads, ToyHeads)}
