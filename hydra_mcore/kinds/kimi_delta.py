# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Kimi Delta Attention (KDA, Kimi Linear, arXiv 2510.26692): the delta rule with a decay for every key channel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hydra_mcore.kinds.delta_rule import DeltaRuleHeads


@dataclass(kw_only=True, frozen=True)
class KimiDeltaOptions:
    """The options of KDA heads. Their defaults are GDN's, so that the decays alone tell the two kinds apart."""

    kda_position: Literal["rope", "nope"] = "rope"
    """Positions of KDA heads [Kimi: nope; HALO: a switch; ours: rope, as GDN]."""
    kda_qk_norm: Literal["rms", "none"] = "rms"
    """RMSNorm of KDA queries and keys before rotary and L2 norm [Kimi: none; HALO: a switch; ours: rms, as GDN]."""
    kda_conv_kernel: int = 4
    """Taps of the short convolution on q, k and v of KDA heads, which starts as the identity; 0 for none [Kimi: 4]."""
    kda_conv_activation: Literal["none", "silu"] = "none"
    """Activation after the short convolution. silu gives up the identity start [Kimi: silu; ours: none, as GDN]."""
    kda_write_max: float = 1.0
    """Largest value of the write gate (kda_write_max * sigmoid). 2 allows negative eigenvalues [Kimi: 1]."""
    kda_half_life: float = 69.0
    """Tokens after which every channel of a KDA state has decayed to half at the start of training [ours: as GDN]."""
    kda_gate: Literal["none", "elementwise", "headwise"] = "none"
    """Output gate of KDA heads [Kimi, HALO: elementwise, of low rank; ours: none, as GDN]."""
    kda_kv: Literal["per_head", "per_group"] = "per_head"
    """Keys and values of KDA heads: one copy a head, or shared in a group as in the teacher [HALO: per_head]."""


KIMI_DELTA = DeltaRuleHeads("kda", per_channel=True).kind(
    label="KDA",
    title="Kimi Delta Attention",
    colour="#3f8f5f",
    branch="hydra_mcore.model.kda_heads:KimiDeltaHeads",
    exported="convert/hf_model/kda_heads_hydra_head.py",
    options=KimiDeltaOptions,
)
