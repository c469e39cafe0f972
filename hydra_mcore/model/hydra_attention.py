# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The HydraHead attention block: kinds of heads, mixed head by head in one layer.

                  +-- FA heads:  q k v, NoPE, causal softmax -----------------+
    x (normed) ---|                                                           |--> norm and scale per head --> o_proj
                  +-- GDN, KDA, Lightning heads: q k v, rotary, recurrence ---+

The teacher is this same class with every head FA, rotary positions, no gate and no fusion.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
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

from hydra_mcore.heads import HeadLayout
from hydra_mcore.model.attention_plan import AttentionPlan, HeadSet
from hydra_mcore.model.branch import Branch, GroupedKeysValues, branch_class
from hydra_mcore.model.cache import DecodingCache, LayerCache
from hydra_mcore.model.fusion import Fusion
from hydra_mcore.model.parameters import (
    GroupLinear,
    data_parallel_replica,
    head_shards,
    new_index,
    new_parameter,
    replicated,
)
from hydra_mcore.model.te_layers import TELinear, uses_te
from hydra_mcore.ops.rows import positions, take_rows
from hydra_mcore.sequence import SequencePart


class HydraAttention(MegatronModule):
    """Takes the place of Megatron's self-attention; same call, same result shape.

    Args:
        layer_number: Megatron's 1-based number over the whole model; turned into ``layer_idx`` here, once.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        plan: AttentionPlan,
        pg_collection: ProcessGroupCollection,
        name: str | None = None,
        cp_comm_type: str | None = None,
    ) -> None:
        super().__init__(config)
        self.layer_idx = layer_number - 1
        self.tp_group, self.cp_group = pg_collection.tp, pg_collection.cp
        self.layout = plan.layout(self.layer_idx, self.tp_group.size())
        self.linear_kv: SharedKeysValues | None = None
        if plan.options.qkv == "shared":
            self.linear_kv = SharedKeysValues(config, self.layout, 2 * config.kv_channels, pg_collection)
        for kind in self.layout.layer:
            self.add_module(kind, branch_class(kind)(config, plan, self.layout, pg_collection))
        self.fusion = Fusion(config, plan.options, self.layout, pg_collection)
        self.linear_proj = OutputProjection(config, HeadSet.of_layer(self.layout, self.tp_group.rank()), self.tp_group)

    @property
    def branches(self) -> dict[str, Branch]:
        """The layer's heads, kind by kind."""
        return {kind: getattr(self, kind) for kind in self.layout.layer}

    def mix(self, hidden_sbm: Tensor, part: SequencePart, rotary: Tensor, cache: LayerCache | None = None) -> Tensor:
        """The layer's output of this rank's ``part`` of the sequence: [s, b, m]; rotary holds the angles of its
        positions.

        ``cache`` has what the tokens before the part left behind, and gets what this part leaves.
        """
        if self.config.sequence_parallel:
            x_sbm = gather_from_sequence_parallel_region(hidden_sbm, group=self.tp_group)
            x_sbm = x_sbm[: part.num_tokens]  # the rest is padding
        else:
            x_sbm = copy_to_tensor_model_parallel_region(hidden_sbm, group=self.tp_group)
        kv_of_kind = {} if self.linear_kv is None else self.linear_kv.by_kind(x_sbm)
        outputs = {
            kind: branch(x_sbm, part, rotary, kv_of_kind.get(kind), cache) for kind, branch in self.branches.items()
        }
        own_sbhd = self.fusion({kind: output.own for kind, output in outputs.items()}, x_sbm)
        shared = {kind: output.shared for kind, output in outputs.items() if output.shared is not None}
        if not shared:
            return self.linear_proj(own_sbhd.flatten(2))
        rows = part.query_rows(self.tp_group.rank(), self.tp_group.size())
        shared_sbhd = self.fusion(shared, take_rows(x_sbm, rows), shared=True)
        token_s = take_rows(torch.arange(part.num_tokens, device=x_sbm.device), rows)
        return self.linear_proj(own_sbhd.flatten(2), shared_sbhd.flatten(2), token_s)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        rotary_pos_emb: Tensor | None = None,
        inference_context: DecodingCache | None = None,
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
        if attention_bias is not None or not isinstance(inference_context, DecodingCache | None):
            raise ValueError(
                "HydraAttention takes no attention_bias, and as inference_context only a model.cache.DecodingCache"
            )
        if inference_context is not None:
            part, cache = inference_context.part, inference_context.layers[self.layer_idx]
            start = part.past + part.start
            return self.mix(hidden_states, part, rotary_pos_emb[start : start + part.num_tokens], cache), None
        tokens = hidden_states.shape[0] * (self.tp_group.size() if self.config.sequence_parallel else 1)
        cp_size, cp_rank = self.cp_group.size(), self.cp_group.rank()
        documents = None if packed_seq_params is None else tuple(packed_seq_params.cu_seqlens_q.tolist())
        part = SequencePart(tokens * cp_size, cp_size, cp_rank, documents)
        if not part.packed and rotary_pos_emb.shape[0] < part.length:
            raise ValueError("rotary angles of a part; give those of the whole row (model.build.contiguous_parts)")
        angles = rotary_pos_emb[positions(part, hidden_states.device)] if cp_size > 1 or part.packed else rotary_pos_emb
        return self.mix(hidden_states, part, angles), None


@contextlib.contextmanager
def head_outputs(attention: HydraAttention) -> Iterator[list[Tensor]]:
    """A list that gets what the rank's own heads hand to the output projection, [s, b, h * d], run by run."""
    outputs: list[Tensor] = []
    with attention.linear_proj.register_forward_pre_hook(lambda _, args: outputs.append(args[0])):
        yield outputs


class SharedKeysValues(GroupLinear):
    """One projection of keys and values for the heads of all kinds, which hands each kind the kv groups it reads."""

    def __init__(
        self, config: TransformerConfig, layout: HeadLayout, rows: int, pg_collection: ProcessGroupCollection
    ) -> None:
        super().__init__(config, layout, rows, pg_collection)
        own, self.kinds = layout.ranks[self.tp_group.rank()], tuple(layout.layer)
        for kind in self.kinds:
            group_of_head = [self.groups.index(layout.group_of(head)) for head in own[kind] + layout.shared[kind]]
            groups = sorted(set(group_of_head))
            index = {"groups": groups, "group_of_head": [groups.index(group) for group in group_of_head]}
            for name, values in index.items():
                self.register_buffer(f"{kind}_{name}", new_index(config, values), persistent=False)

    def by_kind(self, x_sbm: Tensor) -> dict[str, GroupedKeysValues]:
        kv_sbgd = self(x_sbm)
        groups, group_of_head = (
            {kind: getattr(self, f"{kind}_{name}") for kind in self.kinds} for name in ("groups", "group_of_head")
        )
        return {kind: GroupedKeysValues(kv_sbgd.index_select(2, groups[kind]), group_of_head[kind]) for kind in groups}


class OutputProjection(torch.nn.Module):
    """The inherited output projection over this rank's heads, one checkpoint shard a head.

    Its input columns stand in the rank's own head order. Where heads are shared, every rank holds their columns and
    adds its own rows; the sum over ranks, needed anyway, puts them together.
    """

    def __init__(
        self,
        config: TransformerConfig,
        heads: HeadSet,
        tp_group: torch.distributed.ProcessGroup,
    ) -> None:
        super().__init__()
        self.heads, self.tp_group = heads, tp_group
        self.width, self.sequence_parallel = config.hidden_size, config.sequence_parallel
        for suffix, owned in (("", heads.ordinals), ("_shared", heads.shared)):
            if owned:
                weight = new_parameter(config, config.hidden_size, len(owned) * config.kv_channels)
                config.output_layer_init_method(weight)
                self.register_parameter("weight" + suffix, weight)
        self.te: TELinear | None = None
        if heads.ordinals:
            set_tensor_model_parallel_attributes(self.weight, True, 1, 1)
            if uses_te(config):
                self.te = TELinear(config, self.weight)

    def forward(self, own_sbn: Tensor, shared_sbn: Tensor | None = None, rows_s: Tensor | None = None) -> Tensor:
        """[s, b, own heads * d], and the shared heads' outputs of the tokens ``rows_s`` -> [s, b, m], summed over
        ranks.
        """
        if self.te is not None:
            out_sbm = self.te(own_sbn)
        elif self.heads.ordinals:
            out_sbm = F.linear(own_sbn, self.weight)
        else:
            out_sbm = own_sbn.new_zeros(*own_sbn.shape[:2], self.width)
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
        held = (("weight", self.heads.ordinals, 0), ("weight_shared", self.heads.shared, self.tp_group.rank()))
        return {
            prefix + name: head_shards(
                prefix + "weight",
                getattr(self, name),
                owned,
                self.heads.total,
                data_parallel_replica(metadata, tp_rank),
                axis=1,
            )
            for name, owned, tp_rank in held
            if owned
        }
