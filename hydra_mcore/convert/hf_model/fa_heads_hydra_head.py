# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Full-attention heads of HydraHead models; shape suffixes as in heads_hydra_head.py."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from .cache_hydra_head import HydraHeadCacheLayer
from .configuration_hydra_head import HydraHeadConfig
from .heads_hydra_head import Call, Heads, repeat_groups


class FullAttentionHeads(Heads):
    """Causal softmax attention; query heads of one kv group share its keys and values.

    Keys and values, in the cache too, are those of the groups that have an FA head. Queries are multiplied by
    ln(t + a) / ln(a), t the position from 0 (HypeNet, arXiv 2601.22156, Eq 11).
    """

    kind = "fa"

    def __init__(self, config: HydraHeadConfig, heads: list[int]) -> None:
        super().__init__(
            config, heads, kv_per_head=False, qk_norm=config.qk_norm, position=config.fa_position, gate=config.fa_gate
        )

    def outputs(
        self, x_bsm: Tensor, call: Call, shared_kv: tuple[Tensor, Tensor] | None, cache: HydraHeadCacheLayer | None
    ) -> Tensor:
        q, k, v = self.project(x_bsm, shared_kv)
        q, k = self.norm_and_place(q, k, call)
        if call.query_scale_bs11 is not None:
            q = q * call.query_scale_bs11
        q_bhsd, k_bgtd, v_bgtd = (x.transpose(1, 2) for x in (q, k, v))
        if cache is not None:
            k_bgtd, v_bgtd = cache.update(k_bgtd, v_bgtd)
        attend = self._attend_one if q_bhsd.shape[2] == 1 else self._attend
        return attend(q_bhsd, k_bgtd, v_bgtd, call.mask_b1st).transpose(1, 2)

    def _attend(self, q_bhsd: Tensor, k_bgtd: Tensor, v_bgtd: Tensor, mask_b1st: Tensor | None) -> Tensor:
        k_bhtd, v_bhtd = (repeat_groups(x, self.heads_per_group, dim=1) for x in (k_bgtd, v_bgtd))
        s, t = q_bhsd.shape[2], k_bgtd.shape[2]
        if mask_b1st is None and s < t:
            mask_b1st = causal_lower_right(s, t)  # a GPU's kernels know it by name: no mask of s * t entries is made
        return F.scaled_dot_product_attention(q_bhsd, k_bhtd, v_bhtd, attn_mask=mask_b1st, is_causal=mask_b1st is None)

    def _attend_one(self, q_bh1d: Tensor, k_bgtd: Tensor, v_bgtd: Tensor, mask_b11t: Tensor | None) -> Tensor:
        """One token: the heads of a group are its query rows, so that keys and values are read once, not copied per
        head.
        """
        most = max(self.heads_per_group)
        groups = q_bh1d[:, :, 0].split(self.heads_per_group, dim=1)
        rows_bgrd = torch.stack([F.pad(q, (0, 0, 0, most - q.shape[1])) for q in groups], dim=1)
        out_bgrd = F.scaled_dot_product_attention(rows_bgrd, k_bgtd, v_bgtd, attn_mask=mask_b11t)
        rows = [out[:, :count] for out, count in zip(out_bgrd.unbind(1), self.heads_per_group, strict=True)]
        return torch.cat(rows, dim=1)[:, :, None]
