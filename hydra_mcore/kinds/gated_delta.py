# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Gated DeltaNet (GDN, Yang et al., arXiv 2412.06464): the delta rule with one decay a head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hydra_mcore.kinds.delta_rule import DeltaRuleHeads


@dataclass(kw_only=True, frozen=True)
class GatedDeltaOptions:
    """The options of GDN heads."""

    gdn_position: Literal["rope", "nope"] = "rope"
    """Positions of GDN heads [paper: rope]."""
    gdn_qk_norm: Literal["rms", "none"] = "rms"
    """RMSNorm of GDN queries and keys before rotary and L2 norm [HALO: rms]."""
    gdn_conv_kernel: int = 4
    """Taps of the causal short convolution on q, k and v of GDN heads, which starts as the identity; 0 for none [paper
    keeps it; size ours].
    """
    gdn_conv_activation: Literal["none", "silu"] = "none"
    """Activation after the short convolution. silu gives up the identity start [ours: none]."""
    gdn_write_max: float = 1.0
    """Largest value of the write gate (gdn_write_max * sigmoid). 2 allows negative eigenvalues [HALO: 2; ours: 1]."""
    gdn_half_life: float = 69.0
    """Tokens after which a GDN state has decayed to half at the start of training [ours: long memory]."""
    gdn_gate: Literal["none", "elementwise", "headwise"] = "none"
    """Output gate of GDN heads [HALO: optional]."""
    gdn_kv: Literal["per_head", "per_group"] = "per_head"
    """Keys and values of GDN heads: one copy a head, or shared in a group as in the teacher [paper: per_head]."""


GATED_DELTA = DeltaRuleHeads("gdn", per_channel=False).kind(
    label="GDN",
    title="Gated DeltaNet",
    colour="#2a6f9e",
    branch="hydra_mcore.model.gdn_heads:GatedDeltaHeads",
    exported="convert/hf_model/gdn_heads_hydra_head.py",
    options=GatedDeltaOptions,
)
