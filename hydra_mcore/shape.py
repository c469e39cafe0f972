# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The shape of a model: what its pretrained weights fix."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from hydra_mcore.errors import ConfigError
from hydra_mcore.files import shown

LARGEST = {  # sizes that no model reaches: what asks for more is refused before memory is asked for
    "num_layers": 2**12,
    "num_heads": 2**12,
    "num_kv_groups": 2**12,
    "head_dim": 2**14,
    "hidden_size": 2**20,
    "ffn_hidden_size": 2**24,
    "vocab_size": 2**26,
    "native_length": 2**40,
}


@dataclass(kw_only=True, frozen=True)
class ModelShape:
    """The shape of a decoder-only model with grouped-query attention and a gated MLP."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_groups: int
    head_dim: int
    ffn_hidden_size: int
    vocab_size: int
    native_length: int
    rope_theta: float = 1e6
    norm_epsilon: float = 1e-6
    tied_embeddings: bool = True
    qk_norm: bool = True
    qkv_bias: bool = False
    # as in Hugging Face's config.json, without rope_theta: {"rope_type": "linear", "factor": 2.0}; hash=False as it is
    # a dict
    rope_scaling: dict[str, Any] | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        for name, largest in LARGEST.items():
            if not 1 <= getattr(self, name) <= largest:
                raise ConfigError(f"{name} is {shown(getattr(self, name))}; it must be from 1 to {largest}")
        if self.num_heads % self.num_kv_groups:
            raise ConfigError(f"num_kv_groups {self.num_kv_groups} does not divide num_heads {self.num_heads}")
        if not (0 < self.rope_theta < math.inf and 0 < self.norm_epsilon < 1):  # so written, NaN is refused too
            raise ConfigError(
                f"rope_theta {self.rope_theta} or norm_epsilon {self.norm_epsilon} is out of range; both are positive"
            )

    def to_recipe(self) -> dict[str, Any]:
        """The same facts as Megatron flags, in recipe form."""
        return {
            "num-layers": self.num_layers,
            "hidden-size": self.hidden_size,
            "num-attention-heads": self.num_heads,
            "group-query-attention": True,
            "num-query-groups": self.num_kv_groups,
            "kv-channels": self.head_dim,
            "ffn-hidden-size": self.ffn_hidden_size,
            "vocab-size": self.vocab_size,
            "make-vocab-size-divisible-by": 1,
            "rotary-base": int(self.rope_theta),
            "norm-epsilon": self.norm_epsilon,
            "untie-embeddings-and-output-weights": not self.tied_embeddings,
            "qk-layernorm": self.qk_norm,
            "position-embedding-type": "rope",
            "normalization": "RMSNorm",
            "swiglu": True,
            "disable-bias-linear": True,
            "add-qkv-bias": self.qkv_bias,
            "attention-dropout": 0.0,
        }
