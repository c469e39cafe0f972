# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The full-attention heads of a layer: the teacher's own heads, without positions and with an output gate."""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from hydra_mcore.heads import HeadLayout
from hydra_mcore.kinds import FA
from hydra_mcore.model.attention_plan import AttentionPlan
from hydra_mcore.model.branch import Branch, BranchOutput, Gated, GroupedKeysValues
from hydra_mcore.model.cache import LayerCache
from hydra_mcore.model.parameters import recomputed
from hydra_mcore.ops.context_parallel import gather_parts, swap_with_mirror
from hydra_mcore.ops.rows import positions, take_rows
from hydra_mcore.sequence import Rows, Segment, SequencePart


class CausalAttention(torch.nn.Module):
    """softmax(q k^T / sqrt(d)) v; a module, so that a hook on it sees queries and keys."""

    def forward(self, segments: list[Segment], q_sbhd: Tensor, k_sbhd: Tensor, v_sbhd: Tensor) -> Tensor:
        """Each segment's queries over their document's earlier keys: [queries, b, h, d].

        With no heads or no queries, an empty result that keeps the graph.
        """
        if q_sbhd.numel() == 0:
            return q_sbhd + (k_sbhd.sum() + v_sbhd.sum())
        q, k, v = (t.permute(1, 2, 0, 3) for t in (q_sbhd, k_sbhd, v_sbhd))
        out = []
        for start, end, key_start, key_end in segments:
            square = end - start == key_end - key_start
            mask = None if square else _later_queries(end - start, key_end - key_start, q.device)
            keys = slice(key_start, key_end)
            out.append(
                F.scaled_dot_product_attention(
                    q[:, :, start:end], k[:, :, keys], v[:, :, keys], attn_mask=mask, is_causal=square
                )
            )
        return torch.cat(out, dim=2).permute(2, 0, 1, 3)


def _later_queries(queries: int, keys: int, device: torch.device) -> Tensor:
    """The causal mask of the last ``queries`` of ``keys`` tokens; a GPU's attention kernels know it by name."""
    if device.type == "cuda":
        return causal_lower_right(queries, keys)
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


class FullAttentionHeads(Branch):
    """Causal softmax attention of the FA heads: this rank's own, and its part of the queries of those it shares.

    q, k, v are the teacher's rows; grouped queries stay grouped (a kv group lives while one of its heads is FA).
    NoPE and the log-position scale q_t * ln(t+a)/ln(a) with t from 0 (paper section 3.2, HypeNet Eq 11).

    Under context parallelism keys and values are gathered (few heads, little data), and the second half of the queries
    is exchanged with the mirror rank, so that every rank computes the same number of causal products.
    """

    kind, core = FA, CausalAttention

    def __init__(
        self,
        config: TransformerConfig,
        plan: AttentionPlan,
        layout: HeadLayout,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        super().__init__(config, plan, layout, pg_collection)
        self.attention_factor = plan.attention_factor
        self.log_scale_base = plan.options.fa_log_scale_base if plan.log_scale else None
        self.core_attention = CausalAttention()
        if config.qk_layernorm:
            self.add_qk_norms()
        self.add_gate()

    def forward(
        self,
        x_sbm: Tensor,
        part: SequencePart,
        rotary: Tensor,
        kv: GroupedKeysValues | None = None,
        cache: LayerCache | None = None,
    ) -> BranchOutput:
        """As ``Branch.forward``; shared heads come with the ``query_rows`` of this rank instead of all s."""
        kv_sbgd, group_of_head = self.grouped_keys_values(x_sbm, kv)
        k_sbgd, v_sbgd = kv_sbgd.chunk(2, dim=-1)
        if self.config.qk_layernorm:
            k_sbgd = self.k_norm(k_sbgd)
        if self.options.fa_position == "rope":
            k_sbgd = self._rotated(k_sbgd, rotary)
        if cache is not None:
            cache.keys_values.keep(k_sbgd, v_sbgd)
        if part.past:
            attend = partial(self._attend_cached, part, cache)
        else:
            kv_sbgd = gather_parts(torch.cat([k_sbgd, v_sbgd], dim=-1), self.cp_group)
            attend = partial(self._attend, part, kv_sbgd)
        own, shared = group_of_head.split([len(self.heads.ordinals), len(self.heads.shared)])
        rows = part.query_rows()
        output = attend(rows, own, *self._queries(x_sbm, part, rows, rotary, shared=False))
        if not self.heads.shared:
            return BranchOutput(output)
        rows = part.query_rows(self.tp_group.rank(), self.tp_group.size())
        return BranchOutput(output, attend(rows, shared, *self._queries(x_sbm, part, rows, rotary, shared=True)))

    def _queries(
        self, x_sbm: Tensor, part: SequencePart, rows: Rows, rotary: Tensor, shared: bool
    ) -> tuple[Tensor, Tensor | None]:
        """What the own or the shared heads ask at the ``rows`` of this part, and the gate of their outputs."""
        x_sbm, rotary = take_rows(x_sbm, rows), take_rows(rotary, rows)
        q_sbhd = self.linear_q(x_sbm, shared)
        if self.config.qk_layernorm:
            q_sbhd = self.q_norm(q_sbhd)
        if self.options.fa_position == "rope":
            q_sbhd = self._rotated(q_sbhd, rotary)
        if self.log_scale_base is not None:
            position_s = take_rows(positions(part, q_sbhd.device), rows)
            q_sbhd = q_sbhd * log_position_scale(position_s, self.log_scale_base).to(q_sbhd.dtype)[:, None, None, None]
        return q_sbhd, None if self.gate is None else self.gate(x_sbm, shared)

    def _rotated(self, x_sbhd: Tensor, rotary: Tensor) -> Tensor:
        return apply_rotary_pos_emb(x_sbhd, rotary, self.config, mscale=self.attention_factor, cp_group=self.cp_group)

    def _attend(
        self,
        part: SequencePart,
        kv_sbgd: Tensor,
        rows: Rows,
        group_of_head: Tensor,
        q_sbhd: Tensor,
        gate: Tensor | None,
    ) -> Gated:
        """Attention of one set of heads for the queries ``rows`` of this part to the keys of the whole row."""
        k_sbhd, v_sbhd = (t.index_select(2, group_of_head) for t in kv_sbgd.chunk(2, dim=-1))
        attention = partial(self.core_attention, part.segments(rows))
        out_sbhd = recomputed(self.config, attention, self._swap_second_half(q_sbhd, rows), k_sbhd, v_sbhd)
        return self._swap_second_half(out_sbhd, rows), gate

    def _attend_cached(
        self,
        part: SequencePart,
        cache: LayerCache,
        rows: Rows,
        group_of_head: Tensor,
        q_sbhd: Tensor,
        gate: Tensor | None,
    ) -> Gated:
        """Attention of new tokens to those in the cache and to each other; every rank's partial softmax is merged."""
        behind_s = take_rows(torch.arange(-part.num_tokens, 0, device=q_sbhd.device), rows)
        return cache.keys_values.attend(q_sbhd, behind_s, group_of_head, self.cp_group), gate

    def _swap_second_half(self, x_sbhd: Tensor, rows: Rows) -> Tensor:
        if self.cp_group.size() == 1:
            return x_sbhd
        second = sum(end - start for start, end in rows[1])
        first_sbhd, second_sbhd = x_sbhd.split([x_sbhd.shape[0] - second, second])
        return torch.cat([first_sbhd, swap_with_mirror(second_sbhd, self.cp_group)])


def set_log_scale(model: torch.nn.Module, base: float | None) -> None:
    """Have all FA heads of a model scale their queries with another ``base`` from now on, or not at all with None."""
    for module in model.modules():
        if isinstance(module, FullAttentionHeads):
            module.log_scale_base = base


def log_position_scale(position_s: Tensor, base: float) -> Tensor:
    """ln(t + base) / ln(base) for positions t from 0, float32 (HypeNet Eq 11)."""
    return torch.log(position_s.float() + base) / math.log(base)
