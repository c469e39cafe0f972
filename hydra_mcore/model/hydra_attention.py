# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The HydraHead attention block: full attention and the gated delta rule, mixed head by head in one layer.

                      +-- FA heads:  q k v, NoPE, causal softmax -----+
    x (normed) -------|                                               |--> norm and scale per head --> o_proj
                      +-- GDN heads: q k v, rotary, delta rule -------+

The teacher is this same class with every head FA, rotary positions, no gate and no fusion.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from hydra_mcore.config import HydraOptions
from hydra_mcore.heads import HeadLayout, HeadMap, HeadRole
from hydra_mcore.model.cache import LayerMemory, Memory
from hydra_mcore.model.fa_heads import FullAttentionHeads, take_rows
from hydra_mcore.model.fusion import Fusion
from hydra_mcore.model.gdn_heads import GatedDeltaHeads
from hydra_mcore.model.parameters import GroupLinear, data_parallel_replica, head_shards, new_parameter, replicated
from hydra_mcore.ops.sequence import SequencePart


class HydraAttention(MegatronModule):
    """Takes the place of Megatron's self-attention; same call, same result shape.

    Args:
        layer_number: Megatron's 1-based number over the whole model; turned into ``layer_idx`` here, once.
        log_scale: whether FA queries carry the log-position scale (``HydraOptions.log_scale_in`` a stage).
        fa_balance: how FA heads are dealt to tensor-parallel ranks (``HeadLayout``).
        attention_factor: of the shape's rotary scaling (``rotary_frequencies``).
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        head_map: HeadMap,
        options: HydraOptions,
        log_scale: bool,
        fa_balance: str,
        pg_collection: ProcessGroupCollection,
        attention_factor: float = 1.0,
        name: str | None = None,
        cp_comm_type: str | None = None,
    ) -> None:
        super().__init__(config)
        self.layer_idx = layer_number - 1
        self.tp_group, self.cp_group = pg_collection.tp, pg_collection.cp
        heads = head_map.layers[self.layer_idx]
        self.layout = HeadLayout(heads, head_map.num_kv_groups, self.tp_group.size(), self.layer_idx, fa_balance)
        owned, shared = self.layout.ranks[self.tp_group.rank()], self.layout.shared_fa
        self.num_fa = len(owned.fa)
        self.shared_kv = options.qkv == "shared"
        if self.shared_kv:
            self.linear_kv = GroupLinear(
                config, self.layout, owned.heads + shared, 2 * config.kv_channels, pg_collection
            )
            index, last = self.linear_kv.index_of_head, self.num_fa + len(owned.gdn)
            fa, gdn = index[: self.num_fa] + index[last:], index[self.num_fa : last]
            fa_groups = sorted(set(fa))
            indices = {"gdn_groups": gdn, "fa_groups": fa_groups, "group_of_fa_head": [fa_groups.index(g) for g in fa]}
            for name, index in indices.items():
                self.register_buffer(name, torch.tensor(index, dtype=torch.long), persistent=False)
        if heads.fa:
            self.fa = FullAttentionHeads(
                config, options, self.layout, pg_collection, log_scale, attention_factor, self.shared_kv
            )
        if heads.gdn:
            self.gdn = GatedDeltaHeads(config, options, self.layout, pg_collection, self.shared_kv)
        self.fusion = Fusion(config, options, self.layout, pg_collection)
        self.linear_proj = OutputProjection(config, owned.heads, shared, self.layout.num_heads, self.tp_group)

    def mix(self, hidden_sbm: Tensor, part: SequencePart, rotary: Tensor, memory: LayerMemory | None = None) -> Tensor:
        """The layer's output of this rank's ``part`` of the sequence: [s, b, m]; rotary holds the angles of its
        positions.

        ``memory`` has what the tokens before the part left behind, and gets what this part leaves.
        """
        if self.config.sequence_parallel:
            x_sbm = gather_from_sequence_parallel_region(hidden_sbm, group=self.tp_group)[
                : part.num_tokens
            ]  # the rest is padding
        else:
            x_sbm = copy_to_tensor_model_parallel_region(hidden_sbm, group=self.tp_group)
        kv_fa, kv_gdn = self._shared_keys_values(x_sbm) if self.shared_kv else (None, None)
        branches, shared = {}, []
        if self.layout.layer.fa:
            branches[HeadRole.FA], *shared = self.fa(x_sbm, part, rotary, kv_fa, memory)
        if self.layout.layer.gdn:
            branches[HeadRole.GDN] = self.gdn(x_sbm, part, rotary, kv_gdn, memory)
        own_sbn = self.fusion(branches, x_sbm).flatten(2)
        if not shared:
            return self.linear_proj(own_sbn)
        rows = part.query_rows(self.tp_group.rank(), self.tp_group.size())
        shared_sbhd = self.fusion({HeadRole.FA: shared[0]}, take_rows(x_sbm, rows), shared=True)
        return self.linear_proj(
            own_sbn, shared_sbhd.flatten(2), take_rows(torch.arange(part.num_tokens, device=x_sbm.device), rows)
        )

    def _shared_keys_values(self, x_sbm: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """K/V that both branches read: by group for FA, with the group of its own and shared heads; by head for GDN."""
        kv_sbgd = self.linear_kv(x_sbm)
        return (kv_sbgd.index_select(2, self.fa_groups), self.group_of_fa_head), kv_sbgd.index_select(
            2, self.gdn_groups
        )

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        rotary_pos_emb: Tensor | None = None,
        inference_context: Memory | None = None,
        rotary_pos_cos: Tensor | None = None,
        rotary_pos_sin: Tensor | None = None,
        rotary_pos_cos_sin: Tensor | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
        sequence_len_offset: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """hidden_states [s, b, m] (this rank's part of s under sequence and context parallelism) -> (same shape, no
        bias).

        Heads are causal by themselves, so the mask is not read. Under context parallelism parts are contiguous. The
        keywords after ``rotary_pos_emb`` are what Megatron's layer passes to any attention; those that would change the
        result are refused.

        Args:
            rotary_pos_emb: rotary angles of the positions 0, 1, ... of the whole row.
            inference_context: what the tokens before these left behind, and where these leave theirs.
            packed_seq_params: Megatron's; its ``cu_seqlens_q`` bounds the documents of the one row (best on the CPU).

        Raises:
            ValueError: an attention bias or another's inference state was given, or angles of a part instead of the
                row.
        """
        if attention_bias is not None or not isinstance(inference_context, Memory | None):
            raise ValueError(
                "HydraAttention takes no attention_bias, and as inference_context only a model.cache.Memory"
            )
        if inference_context is not None:
            part, memory = inference_context.part, inference_context.layers[self.layer_idx]
            start = part.past + part.start
            return self.mix(hidden_states, part, rotary_pos_emb[start : start + part.num_tokens], memory), None
        tokens = hidden_states.shape[0] * (self.tp_group.size() if self.config.sequence_parallel else 1)
        cp_size, cp_rank = self.cp_group.size(), self.cp_group.rank()
        documents = None if packed_seq_params is None else tuple(packed_seq_params.cu_seqlens_q.tolist())
        part = SequencePart(tokens * cp_size, cp_size, cp_rank, documents)
        if not part.packed and rotary_pos_emb.shape[0] < part.length:
            raise ValueError("rotary angles of a part; give those of the whole row (model.build.contiguous_parts)")
        angles = rotary_pos_emb[part.positions(hidden_states.device)] if cp_size > 1 or part.packed else rotary_pos_emb
        return self.mix(hidden_states, part, angles), None


class OutputProjection(torch.nn.Module):
    """The inherited output projection over this rank's heads, one checkpoint shard a head.

    Its input columns stand in the rank's own head order. Where heads are shared, every rank holds their columns and
    adds its own rows; the sum over ranks, needed anyway, puts them together.
    """

    def __init__(
        self,
        config: TransformerConfig,
        heads: tuple[int, ...],
        shared: tuple[int, ...],
        num_heads: int,
        tp_group: torch.distributed.ProcessGroup,
    ) -> None:
        super().__init__()
        self.heads, self.shared, self.num_heads, self.tp_group = heads, shared, num_heads, tp_group
        self.width, self.sequence_parallel = config.hidden_size, config.sequence_parallel
        for suffix, owned in (("", heads), ("_shared", shared)):
            if owned:
                weight = new_parameter(config, config.hidden_size, len(owned) * config.kv_channels)
                config.output_layer_init_method(weight)
                self.register_parameter("weight" + suffix, weight)
        if heads:
            set_tensor_model_parallel_attributes(self.weight, True, 1, 1)

    def forward(self, own_sbn: Tensor, shared_sbn: Tensor | None = None, rows_s: Tensor | None = None) -> Tensor:
        """[s, b, own heads * d], and the shared heads' outputs of the tokens ``rows_s`` -> [s, b, m], summed over
        ranks.
        """
        out_sbm = F.linear(own_sbn, self.weight) if self.heads else own_sbn.new_zeros(*own_sbn.shape[:2], self.width)
        if shared_sbn is not None:
            out_sbm = out_sbm.index_add(0, rows_s, F.linear(shared_sbn, replicated(self.weight_shared, self.tp_group)))
        if self.sequence_parallel:
            if padding := -len(out_sbm) % self.tp_group.size():  # of the few tokens of a decoding step
                out_sbm = F.pad(out_sbm, (0, 0, 0, 0, 0, padding))
            return reduce_scatter_to_sequence_parallel_region(out_sbm, group=self.tp_group)
        return reduce_from_tensor_model_parallel_region(out_sbm, group=self.tp_group)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, ShardedTensorFactory]:
        shards = {}
        for name, owned, tp_rank in (("weight", self.heads, 0), ("weight_shared", self.shared, self.tp_group.rank())):
            if owned:
                replica = data_parallel_replica(metadata, tp_rank)
                shards[prefix + name] = head_shards(
                    prefix + "weight", getattr(self, name), owned, self.num_heads, replica, axis=1
                )
        return shards
