# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""What the branch modules of all kinds of heads have in common."""

from __future__ import annotations

import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from hydra_mcore.heads import HeadLayout
from hydra_mcore.kinds import KINDS
from hydra_mcore.kinds.recurrent import option
from hydra_mcore.model.attention_plan import AttentionPlan, HeadSet
from hydra_mcore.model.cache import LayerCache
from hydra_mcore.model.gates import OutputGate
from hydra_mcore.model.imitation import READS, Imitation, Memory
from hydra_mcore.model.parameters import GroupLinear, HeadLinear, RMSNorm, gathered
from hydra_mcore.ops.tiles import in_tiles
from hydra_mcore.sequence import SequencePart

Gated = tuple[Tensor, Tensor | None]  # head outputs [s, b, h, d], and their gate [s, b, h, d or 1] which fusion applies


class BranchOutput(NamedTuple):
    """Outputs of a rank's own heads and, where it shares some, of those for its part of their queries."""

    own: Gated
    shared: Gated | None = None


class GroupedKeysValues(NamedTuple):
    """Keys and values of the kv groups of a branch, [s, b, g, 2d], and the index on axis g of each of its heads."""

    kv_sbgd: Tensor
    group_of_head: Tensor


class Branch(MegatronModule, ABC):
    """The heads of one kind on this rank; makes their queries, keys and values, and their gate.

    ``kind`` is the name in the table of kinds. ``core`` is the module class, or the name of the function in its
    file, whose time a profile tells apart.
    """

    kind: ClassVar[str]
    core: ClassVar[type[torch.nn.Module] | str]

    def __init__(
        self,
        config: TransformerConfig,
        plan: AttentionPlan,
        layout: HeadLayout,
        pg_collection: ProcessGroupCollection,
        *,
        kv_per_head: bool = False,
    ) -> None:
        super().__init__(config)
        self.options, self.pg_collection = plan.options, pg_collection
        self.tp_group, self.cp_group = pg_collection.tp, pg_collection.cp
        self.heads = HeadSet.of_kind(layout, self.kind, self.tp_group.rank())
        d, bias = config.kv_channels, {"bias": config.add_qkv_bias}
        self.linear_q = HeadLinear(config, self.heads, d, pg_collection, **bias)
        self.linear_kv: HeadLinear | GroupLinear | None = None  # where all branches share keys and values
        if kv_per_head:
            self.linear_kv = HeadLinear(config, self.heads, 2 * d, pg_collection, **bias)
        elif self.options.qkv == "separate":
            self.linear_kv = GroupLinear(config, layout, 2 * d, pg_collection, self.kind)

    def option(self, name: str) -> Any:
        """One of the kind's own options: "gate" is ``gdn_gate`` in a branch of GDN heads."""
        return option(self.options, self.kind, name)

    def add_qk_norms(self) -> None:
        norm = {"eps": self.config.layernorm_epsilon, "tp_group": self.tp_group, "partial_gradient": True}
        self.q_norm, self.k_norm = (RMSNorm(self.config, self.config.kv_channels, **norm) for _ in range(2))

    def normed_and_turned(
        self, x_sbhd: Tensor, rotary: Tensor, norm: str, then: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """Queries or keys after per-head RMSNorm and rotary positions, as far as the kind's options want these.

        Args:
            norm: "q_norm" or "k_norm".
            then: what else is done to them.
        """
        weight_d = [gathered(getattr(self, norm)).used_weight()] if self.option("qk_norm") == "rms" else []
        return in_tiles(partial(self._norm_and_turn, then), [x_sbhd, rotary], weight_d)

    def _norm_and_turn(
        self, then: Callable[[Tensor], Tensor] | None, x_sbhd: Tensor, rotary: Tensor, *weight_d: Tensor
    ) -> Tensor:
        for weight in weight_d:
            x_sbhd = F.rms_norm(x_sbhd, weight.shape, weight, self.config.layernorm_epsilon)
        if self.option("position") == "rope":
            x_sbhd = apply_rotary_pos_emb(x_sbhd, rotary, self.config, cp_group=self.cp_group)
        return x_sbhd if then is None else then(x_sbhd)

    def add_gate(self) -> None:
        self.gate: OutputGate | None = None
        granularity, activation = KINDS[self.kind].gate(self.options), self.options.gate_activation
        if granularity != "none":
            self.gate = OutputGate(self.config, self.heads, granularity, activation, self.pg_collection)

    @abstractmethod
    def forward(
        self,
        x_sbm: Tensor,
        part: SequencePart,
        rotary: Tensor,
        kv: GroupedKeysValues | None = None,
        cache: LayerCache | None = None,
    ) -> BranchOutput:
        """Outputs of the heads for the ``part`` of the sequence that this rank holds.

        Args:
            rotary: the angles of the part's positions.
            kv: keys and values where all branches share them.
            cache: has what the tokens before the part left behind, and gets what this part leaves.
        """

    def memories(self, place: int) -> list[Memory]:
        """How a head of this rank can remember at the start (``model.imitation``)."""
        return READS[self.kind][1]

    @torch.no_grad()
    def start_as(self, place: int, found: Imitation) -> None:
        """Give a head of this rank the values of an imitation; heads need keys and values of their own."""
        blocks = [("weight", found.change_md[: self.config.hidden_size].T)]
        if self.config.add_qkv_bias:
            blocks.append(("bias", found.change_md[-1]))
        for name, change in blocks:
            values = getattr(self.linear_kv, name).unflatten(0, (len(self.heads.ordinals), 2, -1))[place, 1]
            values.mul_(found.scale).add_(change)

    def watched(self) -> dict[str, tuple[torch.nn.Module, Callable[[Tensor], Tensor]]]:
        """Statistic of the kind -> the module whose output [s, b, h, 1] it is read from, and how."""
        return {}

    def grouped_keys_values(self, x_sbm: Tensor, kv: GroupedKeysValues | None) -> GroupedKeysValues:
        """Keys and values by kv group."""
        return GroupedKeysValues(self.linear_kv(x_sbm), self.linear_kv.group_of_head) if kv is None else kv

    def keys_values_by_head(self, x_sbm: Tensor, kv: GroupedKeysValues | None) -> Tensor:
        """Keys and values of each head, [s, b, h, 2d]."""
        if isinstance(self.linear_kv, HeadLinear):
            return self.linear_kv(x_sbm)
        kv_sbgd, group_of_head = self.grouped_keys_values(x_sbm, kv)
        return kv_sbgd.index_select(2, group_of_head)


def branch_class(kind: str) -> type[Branch]:
    """The branch module of a kind of heads."""
    return pkgutil.resolve_name(KINDS[kind].branch)
