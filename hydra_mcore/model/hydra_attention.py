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
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from hydra_mcore.config import HydraOptions
from hydra_mcore.heads import HeadLayout, HeadMap, HeadRole
from hydra_mcore.model.fa_heads import FullAttentionHeads
from hydra_mcore.model.fusion import Fusion
from hydra_mcore.model.gdn_heads import GatedDeltaHeads
from hydra_mcore.model.parameters import GroupLinear, data_parallel_replica, head_shards


class HydraAttention(MegatronModule):
    """Takes the place of Megatron's self-attention; same call, same result shape.

    Args:
        layer_number: Megatron's 1-based number over the whole model; turned into ``layer_idx`` here, once.
        log_scale: whether FA queries carry the log-position scale (``HydraOptions.log_scale_in`` a stage).
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        head_map: HeadMap,
        options: HydraOptions,
        log_scale: bool,
        pg_collection: ProcessGroupCollection,
        name: str | None = None,
        cp_comm_type: str | None = None,
    ) -> None:
        super().__init__(config)
        self.layer_idx = layer_number - 1
        self.tp_group = pg_collection.tp
        self.layout = HeadLayout(head_map.layers[self.layer_idx], head_map.num_kv_groups, self.tp_group.size(), self.layer_idx)
        owned = self.layout.ranks[self.tp_group.rank()]
        self.num_fa = len(owned.fa)
        shared_kv = options.qkv == "shared"
        if shared_kv:
            self.linear_kv = GroupLinear(config, self.layout, owned.heads, 2 * config.kv_channels, pg_collection)
        self.shared_kv = shared_kv
        if self.layout.layer.fa:
            self.fa = FullAttentionHeads(config, options, self.layout, pg_collection, log_scale, shared_kv)
        if self.layout.layer.gdn:
            self.gdn = GatedDeltaHeads(config, options, self.layout, pg_collection, shared_kv)
        self.fusion = Fusion(config, options, self.layout, pg_collection)
        self.linear_proj = HeadRowParallelLinear(config, owned.heads, self.layout.num_heads, self.tp_group)

    def head_outputs(self, hidden_sbm: Tensor, rotary: Tensor) -> Tensor:
        """What every head of this rank hands to the output projection: [s, b, h, d], FA heads first."""
        if self.config.sequence_parallel:
            x_sbm = gather_from_sequence_parallel_region(hidden_sbm, group=self.tp_group)
        else:
            x_sbm = copy_to_tensor_model_parallel_region(hidden_sbm, group=self.tp_group)
        kv_fa = kv_gdn = None
        if self.shared_kv:
            kv_fa, kv_gdn = (kv := self.linear_kv(x_sbm))[:, :, : self.num_fa], kv[:, :, self.num_fa :]
        branches = {}
        if self.layout.layer.fa:
            branches[HeadRole.FA] = self.fa(x_sbm, rotary, kv_fa)
        if self.layout.layer.gdn:
            branches[HeadRole.GDN] = self.gdn(x_sbm, rotary, kv_gdn)
        return self.fusion(branches, x_sbm)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        rotary_pos_emb: Tensor | None = None,
        inference_context: Any = None,
        rotary_pos_cos: Tensor | None = None,
        rotary_pos_sin: Tensor | None = None,
        rotary_pos_cos_sin: Tensor | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
        sequence_len_offset: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """hidden_states [s, b, m] (this rank's part of s under sequence parallelism) -> (same shape, no bias).

        Heads are causal by themselves, so the mask is not read. The keywords after ``rotary_pos_emb`` are what
        Megatron's layer passes to any attention; those that would change the result are refused.

        Raises:
            ValueError: inference state, an attention bias or packed sequences were given.
        """
        unsupported = {"inference_context": inference_context, "attention_bias": attention_bias, "packed_seq_params": packed_seq_params}
        for argument, value in unsupported.items():
            if value is not None:
                raise ValueError(f"HydraAttention does not take {argument}")
        out_sbhd = self.head_outputs(hidden_states, rotary_pos_emb)
        return self.linear_proj(out_sbhd.flatten(2))


class HeadRowParallelLinear(RowParallelLinear):
    """The inherited output projection, its input columns in the rank's own head order, one checkpoint shard a head."""

    def __init__(self, config: TransformerConfig, heads: tuple[int, ...], num_heads: int, tp_group: torch.distributed.ProcessGroup) -> None:
        super().__init__(
            num_heads * config.kv_channels,
            config.hidden_size,
            config=config,
            init_method=config.output_layer_init_method,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=True,
            tp_group=tp_group,
        )
        self.heads, self.num_heads = heads, num_heads

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, ShardedTensorFactory]:
        key = prefix + "weight"
        return {key: head_shards(key, self.weight, self.heads, self.num_heads, data_parallel_replica(metadata), axis=1)}
