# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The full-attention heads of a layer: the teacher's own heads, without positions and with an output gate."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from hydra_mcore.config import HydraOptions
from hydra_mcore.heads import HeadLayout, HeadRole
from hydra_mcore.model.gates import OutputGate
from hydra_mcore.model.parameters import GroupLinear, HeadLinear, RMSNorm


class FullAttentionHeads(MegatronModule):
    """Causal softmax attention of this rank's FA heads.

    q, k, v are the teacher's rows; grouped queries stay grouped (a kv group lives while one of its heads is FA).
    NoPE and the log-position scale q_t * ln(t+a)/ln(a) with t from 0 (paper section 3.2, HypeNet Eq 11).
    """

    def __init__(
        self,
        config: TransformerConfig,
        options: HydraOptions,
        layout: HeadLayout,
        pg_collection: ProcessGroupCollection,
        log_scale: bool,
        shared_kv: bool,
    ) -> None:
        super().__init__(config)
        self.options, self.log_scale = options, log_scale
        self.cp_group = pg_collection.cp
        heads, branch = layout.ranks[pg_collection.tp.rank()].fa, layout.layer.fa
        ordinals = [branch.index(h) for h in heads]
        d = config.kv_channels
        self.linear_q = HeadLinear(config, ordinals, len(branch), d)
        if not shared_kv:
            self.linear_kv = GroupLinear(config, layout, heads, 2 * d, pg_collection, HeadRole.FA)
        if config.qk_layernorm:
            norm = {"eps": config.layernorm_epsilon, "tp_group": pg_collection.tp, "partial_gradient": True}
            self.q_norm, self.k_norm = RMSNorm(config, d, **norm), RMSNorm(config, d, **norm)
        if options.fa_gate != "none":
            self.gate = OutputGate(config, ordinals, len(branch), options.fa_gate, options.gate_activation)

    def forward(self, x_sbm: Tensor, rotary: Tensor, kv_sbhd: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Head outputs [s, b, h, d] and their gate ([s, b, h, d or 1], or None), which fusion applies."""
        q_sbhd = self.linear_q(x_sbm)
        kv_sbhd = self.linear_kv(x_sbm) if kv_sbhd is None else kv_sbhd
        k_sbhd, v_sbhd = kv_sbhd.chunk(2, dim=-1)
        if self.config.qk_layernorm:
            q_sbhd, k_sbhd = self.q_norm(q_sbhd), self.k_norm(k_sbhd)
        if self.options.fa_position == "rope":
            q_sbhd, k_sbhd = (apply_rotary_pos_emb(t, rotary, self.config, cp_group=self.cp_group) for t in (q_sbhd, k_sbhd))
        if self.log_scale:
            q_sbhd = q_sbhd * log_position_scale(q_sbhd.shape[0], self.options.fa_log_scale_base, q_sbhd)[:, None, None, None]
        gate = self.gate(x_sbm) if self.options.fa_gate != "none" else None
        return causal_attention(q_sbhd, k_sbhd, v_sbhd), gate


def log_position_scale(length: int, base: float, like: Tensor) -> Tensor:
    """ln(t + base) / ln(base) for t = 0 .. length-1, in the dtype and on the device of ``like`` (HypeNet Eq 11)."""
    position_s = torch.arange(length, device=like.device, dtype=torch.float32)
    return (torch.log(position_s + base) / math.log(base)).to(like.dtype)


def causal_attention(q_sbhd: Tensor, k_sbhd: Tensor, v_sbhd: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v over earlier positions; with no heads, an empty result that keeps the graph."""
    if q_sbhd.shape[2] == 0:
        return q_sbhd + k_sbhd + v_sbhd
    q, k, v = (t.permute(1, 2, 0, 3) for t in (q_sbhd, k_sbhd, v_sbhd))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).permute(2, 0, 1, 3)
