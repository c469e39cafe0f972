# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The Lightning attention heads of a layer (arXiv 2401.04658), as HypeNet converts attention heads into them (HALO,
arXiv 2601.22156).
"""

from __future__ import annotations

import math
from functools import partial

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from hydra_mcore.heads import HeadLayout
from hydra_mcore.kinds.lightning import LIGHTNING, decay_rate
from hydra_mcore.kinds.recurrent import keys_values_by_head
from hydra_mcore.model.attention_plan import AttentionPlan
from hydra_mcore.model.branch import Branch, BranchOutput, GroupedKeysValues
from hydra_mcore.model.cache import LayerCache, left_behind
from hydra_mcore.model.imitation import Memory
from hydra_mcore.model.parameters import new_index, recomputed
from hydra_mcore.ops.linear_attention import linear_attention
from hydra_mcore.sequence import SequencePart


class LightningHeads(Branch):
    """Linear attention with a fixed decay a head, on this rank's Lightning heads.

    projections -> per-head RMSNorm -> rotary -> linear attention (order as in HALO), lambda = exp(-slope) with a slope
    of each head (``kinds.lightning.decay_rate``).
    """

    kind, core = LIGHTNING.name, "linear_attention"

    def __init__(
        self,
        config: TransformerConfig,
        plan: AttentionPlan,
        layout: HeadLayout,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        kv_per_head = keys_values_by_head(plan.options, self.kind)
        super().__init__(config, plan, layout, pg_collection, kv_per_head=kv_per_head)
        if self.option("qk_norm") == "rms":
            self.add_qk_norms()
        self.add_gate()
        self.num_heads = layout.num_heads
        own = new_index(config, layout.ranks[self.tp_group.rank()][self.kind])
        self.register_buffer("head_idx", own, persistent=False)  # rates themselves would be rounded with the model

    def forward(
        self,
        x_sbm: Tensor,
        part: SequencePart,
        rotary: Tensor,
        kv: GroupedKeysValues | None = None,
        cache: LayerCache | None = None,
    ) -> BranchOutput:
        """As ``Branch.forward``."""
        states = None if cache is None else cache.states[self.kind]
        attend = partial(self._linear_attention, part, states)
        out_sbhd, state_bhdv = recomputed(self.config, attend, *self.queries_keys_values(x_sbm, part, rotary, kv))
        if states is not None:
            states["state"] = left_behind(state_bhdv, part, self.cp_group)
        return BranchOutput((out_sbhd, None if self.gate is None else self.gate(x_sbm)))

    def queries_keys_values(
        self, x_sbm: Tensor, part: SequencePart, rotary: Tensor, kv: GroupedKeysValues | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What the attention takes, each [s, b, h, d]; no token sees another here, so the part is not read."""
        q_sbhd, (k_sbhd, v_sbhd) = self.linear_q(x_sbm), self.keys_values_by_head(x_sbm, kv).chunk(2, dim=-1)
        q_sbhd = self.normed_and_turned(q_sbhd, rotary, "q_norm")
        k_sbhd = self.normed_and_turned(k_sbhd, rotary, "k_norm")
        return q_sbhd, k_sbhd, v_sbhd

    def memories(self, place: int) -> list[Memory]:
        """The one memory that the head's slope gives."""
        half_life = math.log(2) / float(self._rates()[place])
        return [Memory(half_life, 1.0, half_life)]

    def _rates(self) -> Tensor:
        """-ln(lambda) of this rank's heads, [h] float64."""
        return decay_rate(self.options, self.head_idx.double(), self.num_heads)

    def _linear_attention(
        self, part: SequencePart, states: dict[str, Tensor] | None, *inputs_sbhd: Tensor
    ) -> tuple[Tensor, Tensor]:
        out_bshd, state_bhdv = linear_attention(
            *(x.transpose(0, 1) for x in inputs_sbhd),
            -self._rates(),
            part=part,
            cp_group=self.cp_group,
            initial_state_bhdv=None if states is None else states.get("state"),
        )
        return out_bshd.transpose(0, 1), state_bhdv
