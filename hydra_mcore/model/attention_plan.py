# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""What every HydraHead layer of a model is built from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hydra_mcore.config import HydraOptions
from hydra_mcore.heads import HeadLayout, HeadMap


@dataclass(frozen=True)
class AttentionPlan:
    """Goes once into the layer spec; each layer finds its own heads by its number.

    Args:
        log_scale: whether FA queries carry the log-position scale (``HydraOptions.log_scale_in`` a stage).
        fa_balance: how FA heads are dealt to tensor-parallel ranks (``HeadLayout``).
        attention_factor: of the shape's rotary scaling (``rotary_frequencies``).
    """

    head_map: HeadMap
    options: HydraOptions
    log_scale: bool = False
    fa_balance: Literal["heads", "queries"] = "heads"
    attention_factor: float = 1.0

    def layout(self, layer_idx: int, tp_size: int) -> HeadLayout:
        """The heads of a layer, dealt to ranks."""
        head_map = self.head_map
        return HeadLayout(head_map.layers[layer_idx], head_map.num_kv_groups, tp_size, layer_idx, self.fa_balance)


@dataclass(frozen=True)
class HeadSet:
    """Heads of one rank among ``total``, by their ordinals; ``shared`` are those that all ranks hold."""

    ordinals: tuple[int, ...]
    total: int
    shared: tuple[int, ...] = ()

    @classmethod
    def of_kind(cls, layout: HeadLayout, kind: str, tp_rank: int) -> HeadSet:
        """A rank's heads of a kind, numbered within the layer's heads of that kind."""
        ordinal = {head_idx: ordinal for ordinal, head_idx in enumerate(layout.layer[kind])}
        own, shared = layout.ranks[tp_rank][kind], layout.shared[kind]
        return cls(tuple(map(ordinal.get, own)), len(ordinal), tuple(map(ordinal.get, shared)))

    @classmethod
    def of_layer(cls, layout: HeadLayout, tp_rank: int) -> HeadSet:
        """A rank's heads of all kinds, numbered within the layer."""
        return cls(layout.ranks[tp_rank].heads, layout.num_heads, layout.shared.heads)
