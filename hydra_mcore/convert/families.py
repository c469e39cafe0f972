# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""What is specific to a Hugging Face model family: names, shapes, and what this package does not do. Facts only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hydra_mcore.config import ModelShape
from hydra_mcore.convert.mapping import Copy, PerGroup, Stacked, WeightMapping

LAYER = "{layer}"
_WHOLE = Copy()


@dataclass(frozen=True)
class WeightRule:
    """One Hugging Face tensor and where it goes; names with ``{layer}`` hold for every layer, counted from 0.

    ``dims`` is the tensor's shape in Hugging Face, in the words of ``dimensions``.
    """

    hf: str
    ours: str
    dims: tuple[str, ...]
    mapping: WeightMapping = _WHOLE


@dataclass(frozen=True)
class Family:
    """A model family as its ``config.json`` and its weight files describe it."""

    model_type: str
    shape_keys: Mapping[str, str]
    """ModelShape field -> key of config.json that must be there."""
    shape_defaults: Mapping[str, tuple[str, Any]]
    """ModelShape field -> key of config.json that may be missing, and what the family takes it for then."""
    required_values: Mapping[str, tuple[Any, ...]]
    """Key of config.json -> the values under which our layers compute the same; a missing key counts as one of them."""
    weights: tuple[WeightRule, ...]
    output_layer: WeightRule
    """Its own tensor when embeddings are not tied; when they are, a copy of ``embedding`` that need not be stored."""
    embedding: str


def dimensions(shape: ModelShape) -> dict[str, int]:
    """The sizes that ``WeightRule.dims`` refer to."""
    return {
        "vocab": shape.vocab_size,
        "model": shape.hidden_size,
        "ffn": shape.ffn_hidden_size,
        "head": shape.head_dim,
        "heads": shape.num_heads * shape.head_dim,
        "groups": shape.num_kv_groups * shape.head_dim,
    }


_HF, _OURS = "model.layers.{layer}.", "decoder.layers.{layer}."
_ATTENTION = _OURS + "self_attention."

QWEN3 = Family(
    model_type="qwen3",
    shape_keys={
        "num_layers": "num_hidden_layers",
        "hidden_size": "hidden_size",
        "num_heads": "num_attention_heads",
        "num_kv_groups": "num_key_value_heads",
        "ffn_hidden_size": "intermediate_size",
        "vocab_size": "vocab_size",
        "native_length": "max_position_embeddings",
    },
    shape_defaults={
        "head_dim": ("head_dim", 128),
        "norm_epsilon": ("rms_norm_eps", 1e-6),
        "tied_embeddings": ("tie_word_embeddings", False),
    },
    required_values={
        "attention_bias": (False,),
        "hidden_act": ("silu",),
        "use_sliding_window": (False,),
        "rope_scaling": (None,),
        "num_experts": (None, 0),
        "quantization_config": (None,),
    },
    weights=(
        WeightRule("model.embed_tokens.weight", "embedding.word_embeddings.weight", ("vocab", "model")),
        WeightRule(_HF + "input_layernorm.weight", _OURS + "input_layernorm.weight", ("model",)),
        WeightRule(_HF + "self_attn.q_proj.weight", _ATTENTION + "fa.linear_q.weight", ("heads", "model")),
        WeightRule(_HF + "self_attn.k_proj.weight", _ATTENTION + "fa.linear_kv.weight", ("groups", "model"), PerGroup(0, 2)),
        WeightRule(_HF + "self_attn.v_proj.weight", _ATTENTION + "fa.linear_kv.weight", ("groups", "model"), PerGroup(1, 2)),
        WeightRule(_HF + "self_attn.q_norm.weight", _ATTENTION + "fa.q_norm.weight", ("head",)),
        WeightRule(_HF + "self_attn.k_norm.weight", _ATTENTION + "fa.k_norm.weight", ("head",)),
        WeightRule(_HF + "self_attn.o_proj.weight", _ATTENTION + "linear_proj.weight", ("model", "heads")),
        WeightRule(_HF + "post_attention_layernorm.weight", _OURS + "pre_mlp_layernorm.weight", ("model",)),
        WeightRule(_HF + "mlp.gate_proj.weight", _OURS + "mlp.linear_fc1.weight", ("ffn", "model"), Stacked(0, 2)),
        WeightRule(_HF + "mlp.up_proj.weight", _OURS + "mlp.linear_fc1.weight", ("ffn", "model"), Stacked(1, 2)),
        WeightRule(_HF + "mlp.down_proj.weight", _OURS + "mlp.linear_fc2.weight", ("model", "ffn")),
        WeightRule("model.norm.weight", "decoder.final_layernorm.weight", ("model",)),
    ),
    output_layer=WeightRule("lm_head.weight", "output_layer.weight", ("vocab", "model")),
    embedding="model.embed_tokens.weight",
)

FAMILIES: dict[str, Family] = {family.model_type: family for family in (QWEN3,)}
