# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The full-attention heads of a layer: the teacher's own heads, without positions and with an output gate."""

from __future__ import annotations

import itertools
import math
from functools import partial

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from hydra_mcore.config import HydraOptions
from hydra_mcore.heads import HeadLayout, HeadRole
from hydra_mcore.model.cache import LayerMemory
from hydra_mcore.model.gates import OutputGate
from hydra_mcore.model.parameters import GroupLinear, HeadLinear, RMSNorm, recomputed
from hydra_mcore.ops.context_parallel import gather_parts, swap_with_mirror
from hydra_mcore.ops.sequence import Rows, Segment, SequencePart


class FullAttentionHeads(MegatronModule):
    """Causal softmax attention of the FA heads: this rank's own, and its part of the queries of those it shares.

    q, k, v are the teacher's rows; grouped queries stay grouped (a kv group lives while one of its heads is FA).
    NoPE and the log-position scale q_t * ln(t+a)/ln(a) with t from 0 (paper section 3.2, HypeNet Eq 11).

    Under context parallelism keys and values are gathered (few heads, little data), and the second half of the queries
    is exchanged with the mirror rank, so that every rank computes the same number of causal products.
    """

    def __init__(
        self,
        config: TransformerConfig,
        options: HydraOptions,
        layout: HeadLayout,
        pg_collection: ProcessGroupCollection,
        log_scale: bool,
        attention_factor: float,
        shared_kv: bool,
    ) -> None:
        super().__init__(config)
        self.options, self.attention_factor = options, attention_factor
        self.log_scale_base = options.fa_log_scale_base if log_scale else None
        self.tp_group, self.cp_group = pg_collection.tp, pg_collection.cp
        heads, branch = layout.ranks[pg_collection.tp.rank()].fa, layout.layer.fa
        self.num_heads = len(heads)
        ordinals, shared = ([branch.index(h) for h in owned] for owned in (heads, layout.shared_fa))
        d = config.kv_channels
        self.linear_q = HeadLinear(
            config, ordinals, len(branch), d, pg_collection, bias=config.add_qkv_bias, shared=shared
        )
        if not shared_kv:
            self.linear_kv = GroupLinear(config, layout, heads + layout.shared_fa, 2 * d, pg_collection, HeadRole.FA)
        self.core_attention = CausalAttention()
        if config.qk_layernorm:
            norm = {"eps": config.layernorm_epsilon, "tp_group": pg_collection.tp, "partial_gradient": True}
            self.q_norm, self.k_norm = RMSNorm(config, d, **norm), RMSNorm(config, d, **norm)
        if options.fa_gate != "none":
            gate = (options.fa_gate, options.gate_activation, pg_collection)
            self.gate = OutputGate(config, ordinals, len(branch), *gate, shared=shared)

    def forward(
        self,
        x_sbm: Tensor,
        part: SequencePart,
        rotary: Tensor,
        kv: tuple[Tensor, Tensor] | None,
        memory: LayerMemory | None = None,
    ) -> list[tuple[Tensor, Tensor | None]]:
        """(outputs [s, b, h, d], gate [s, b, h, d or 1] or None) of the rank's own heads, then of the shared ones if
        any.

        Shared heads come with the ``query_rows`` of this rank instead of all s.

        Args:
            kv: keys and values by group [s, b, g, 2d] and the group of each head, where both branches share them.
            memory: where keys and values are kept, and those before the ``part`` are found.
        """
        kv_sbgd, group_of_head = (self.linear_kv(x_sbm), self.linear_kv.group_of_head) if kv is None else kv
        k_sbgd, v_sbgd = kv_sbgd.chunk(2, dim=-1)
        if self.config.qk_layernorm:
            k_sbgd = self.k_norm(k_sbgd)
        if self.options.fa_position == "rope":
            k_sbgd = apply_rotary_pos_emb(
                k_sbgd, rotary, self.config, mscale=self.attention_factor, cp_group=self.cp_group
            )
        if memory is not None:
            memory.keep(k_sbgd, v_sbgd)
        groups = group_of_head.split([self.num_heads, len(group_of_head) - self.num_heads])
        parts = [part.query_rows()]
        if self.linear_q.shared:
            parts.append(part.query_rows(self.tp_group.rank(), self.tp_group.size()))
        if part.past:
            return [
                self._recall(x_sbm, part, rows, rotary, groups[shared], bool(shared), memory)
                for shared, rows in enumerate(parts)
            ]
        k_sbgd, v_sbgd = gather_parts(torch.cat([k_sbgd, v_sbgd], dim=-1), self.cp_group).chunk(2, dim=-1)
        return [
            self._attend(
                x_sbm, part, rows, rotary, *(t.index_select(2, groups[shared]) for t in (k_sbgd, v_sbgd)), bool(shared)
            )
            for shared, rows in enumerate(parts)
        ]

    def _attend(
        self,
        x_sbm: Tensor,
        part: SequencePart,
        rows: Rows,
        rotary: Tensor,
        k_sbhd: Tensor,
        v_sbhd: Tensor,
        shared: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of one set of heads for the queries ``rows`` of this part."""
        q_sbhd, gate = self._queries(x_sbm, part, rows, rotary, shared)
        attention = partial(self.core_attention, part.segments(rows))
        out_sbhd = recomputed(self.config, attention, self._swap_second_half(q_sbhd, rows), k_sbhd, v_sbhd)
        return self._swap_second_half(out_sbhd, rows), gate

    def _recall(
        self,
        x_sbm: Tensor,
        part: SequencePart,
        rows: Rows,
        rotary: Tensor,
        group_of_head: Tensor,
        shared: bool,
        memory: LayerMemory,
    ) -> tuple[Tensor, Tensor | None]:
        """The same for tokens that follow remembered ones."""
        q_sbhd, gate = self._queries(x_sbm, part, rows, rotary, shared)
        behind_s = take_rows(torch.arange(-part.num_tokens, 0, device=q_sbhd.device), rows)
        return memory.attend(q_sbhd, behind_s, group_of_head, self.cp_group), gate

    def _queries(
        self, x_sbm: Tensor, part: SequencePart, rows: Rows, rotary: Tensor, shared: bool
    ) -> tuple[Tensor, Tensor | None]:
        """What one set of heads asks at the ``rows`` of this part, and the gate of their outputs."""
        x_sbm, rotary = take_rows(x_sbm, rows), take_rows(rotary, rows)
        q_sbhd = self.linear_q(x_sbm, shared)
        if self.config.qk_layernorm:
            q_sbhd = self.q_norm(q_sbhd)
        if self.options.fa_position == "rope":
            q_sbhd = apply_rotary_pos_emb(
                q_sbhd, rotary, self.config, mscale=self.attention_factor, cp_group=self.cp_group
            )
        if self.log_scale_base is not None:
            position_s = take_rows(part.positions(q_sbhd.device), rows)
            q_sbhd = q_sbhd * log_position_scale(position_s, self.log_scale_base).to(q_sbhd.dtype)[:, None, None, None]
        return q_sbhd, self.gate(x_sbm, shared) if self.options.fa_gate != "none" else None

    def _swap_second_half(self, x_sbhd: Tensor, rows: Rows) -> Tensor:
        if self.cp_group.size() == 1:
            return x_sbhd
        second = sum(end - start for start, end in rows[1])
        first_sbhd, second_sbhd = x_sbhd.split([x_sbhd.shape[0] - second, second])
        return torch.cat([first_sbhd, swap_with_mirror(second_sbhd, self.cp_group)])


def take_rows(x_s: Tensor, rows: Rows) -> Tensor:
    """The given runs of axis 0, joined; the tensor itself where they are all of it."""
    runs = [run for half in rows for run in half]
    if all(end == start for (_, end), (start, _) in itertools.pairwise(runs)):
        return x_s[runs[0][0] : runs[-1][1]]
    return torch.cat([x_s[start:end] for start, end in runs])


def set_log_scale(model: torch.nn.Module, base: float | None) -> None:
    """Have all FA heads of a model scale their queries with another ``base`` from now on, or not at all with None."""
    for module in model.modules():
        if isinstance(module, FullAttentionHeads):
            module.log_scale_base = base


def log_position_scale(position_s: Tensor, base: float) -> Tensor:
    """ln(t + base) / ln(base) for positions t from 0, float32 (HypeNet Eq 11)."""
    return torch.log(position_s.float() + base) / math.log(base)


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
