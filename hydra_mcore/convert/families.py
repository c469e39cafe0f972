# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""What is specific to a Hugging Face model family: names, shapes, and what this package does not do. Facts only.

Every supported teacher names its tensors as Llama does; the families differ in biases, norms, and what a missing key of
config.json means.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hydra_mcore.config import HydraOptions
from hydra_mcore.convert.mapping import Columns, InEachBlock, Stacked, WeightMapping, Whole
from hydra_mcore.heads import HeadLayout, HeadsByKind
from hydra_mcore.kinds import FA, KINDS
from hydra_mcore.kinds.kind import HeadKind
from hydra_mcore.shape import LARGEST as LARGEST_SHAPE
from hydra_mcore.shape import ModelShape

LAYER = "{layer}"
HF_LAYER, OUR_LAYER = "model.layers.{layer}.", "decoder.layers.{layer}."
HF_ATTENTION, OUR_ATTENTION = HF_LAYER + "self_attn.", OUR_LAYER + "self_attention."


@dataclass(frozen=True)
class WeightRule:
    """One Hugging Face tensor and where a checkpoint stores it; names with ``{layer}`` hold for every layer, from 0.

    ``dims`` is the tensor's shape in Hugging Face: numbers, or words of ``tensor_table.dimensions``.
    """

    hf: str
    stored: str
    dims: tuple[str | int, ...]
    mapping: WeightMapping = field(default_factory=Whole)


@dataclass(frozen=True)
class Family:
    """A model family as its ``config.json`` describes it."""

    model_type: str
    qk_norm: bool
    qkv_bias: bool
    required_values: Mapping[str, tuple[Any, ...]]
    """Key of config.json -> the values under which our layers compute the same; a missing key counts as one of them."""


SHAPE_KEYS = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_heads": "num_attention_heads",
    "num_kv_groups": "num_key_value_heads",
    "ffn_hidden_size": "intermediate_size",
    "vocab_size": "vocab_size",
    "native_length": "max_position_embeddings",
}
"""ModelShape field -> key of config.json, the same in every family."""

CONFIG_KEYS = {
    **dict.fromkeys(
        ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"), int
    ),
    **dict.fromkeys(("num_key_value_heads", "head_dim"), int | None),
    "max_position_embeddings": int,
    "rms_norm_eps": float,
    "tie_word_embeddings": bool,
    **dict.fromkeys(("rope_theta", "partial_rotary_factor"), float),
    **dict.fromkeys(("rope_scaling", "rope_parameters"), dict[str, Any] | None),
    "use_sliding_window": bool,
    "sliding_window": int | None,
    "max_window_layers": int,
    "layer_types": list[str] | None,
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), int | list[int] | None),
}
"""What we read of config.json, and the type of each value; the family's own class in transformers knows what a missing
one means.
"""

ROPE_KEYS = {
    **dict.fromkeys(("rope_type", "type"), str),
    **dict.fromkeys(("rope_theta", "partial_rotary_factor", "factor", "low_freq_factor", "high_freq_factor"), float),
    **dict.fromkeys(("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"), float | None),
    "original_max_position_embeddings": int,
    "truncate": bool,
}
"""The same of rope_scaling and rope_parameters; other keys mean nothing to the rope types that we compute."""

LARGEST = {SHAPE_KEYS.get(name, name): largest for name, largest in LARGEST_SHAPE.items()}
"""Key of config.json -> the largest size that a model may ask for."""

UNSUPPORTED_UNLESS = {"hidden_act": ("silu", "swish"), "num_experts": (None, 0), "quantization_config": (None,)}
_NO_BIAS = {**UNSUPPORTED_UNLESS, "attention_bias": (False,), "mlp_bias": (False,)}

QWEN3 = Family("qwen3", qk_norm=True, qkv_bias=False, required_values=_NO_BIAS)
QWEN2 = Family("qwen2", qk_norm=False, qkv_bias=True, required_values=UNSUPPORTED_UNLESS)  # and Qwen2.5
LLAMA = Family("llama", qk_norm=False, qkv_bias=False, required_values=_NO_BIAS)
FAMILIES: dict[str, Family] = {family.model_type: family for family in (QWEN3, QWEN2, LLAMA)}

EMBEDDING = WeightRule("model.embed_tokens.weight", "embedding.word_embeddings.weight", ("vocab", "model"))
# Its own tensor when embeddings are not tied; when they are, a copy of the embedding that need not be stored.
OUTPUT_LAYER = WeightRule("lm_head.weight", "output_layer.weight", ("vocab", "model"))

TRUNK = (
    EMBEDDING,
    WeightRule(HF_LAYER + "input_layernorm.weight", OUR_LAYER + "input_layernorm.weight", ("model",)),
    WeightRule(HF_LAYER + "post_attention_layernorm.weight", OUR_LAYER + "pre_mlp_layernorm.weight", ("model",)),
    WeightRule(HF_LAYER + "mlp.gate_proj.weight", OUR_LAYER + "mlp.linear_fc1.weight", ("ffn", "model"), Stacked(0, 2)),
    WeightRule(HF_LAYER + "mlp.up_proj.weight", OUR_LAYER + "mlp.linear_fc1.weight", ("ffn", "model"), Stacked(1, 2)),
    WeightRule(HF_LAYER + "mlp.down_proj.weight", OUR_LAYER + "mlp.linear_fc2.weight", ("model", "ffn")),
    WeightRule("model.norm.weight", "decoder.final_layernorm.weight", ("model",)),
)
O_PROJ = WeightRule(HF_ATTENTION + "o_proj.weight", OUR_ATTENTION + "linear_proj.weight", ("model", "heads"), Columns())


def branch_rules(
    kind: HeadKind, shape: ModelShape, options: HydraOptions, layout: HeadLayout, hf_prefix: str
) -> list[WeightRule]:
    """The tensors of one kind's heads in a layer."""
    heads, rules = layout.layer[kind.name], []
    blocks = {"head": len(heads), "group": len(layout.groups_of(heads)), "layer": 1}
    for parameter in kind.parameters(shape, options):
        stored = f"{OUR_ATTENTION}{kind.name}.{parameter.stored}"
        mapping = Whole() if parameter.part == (0, 1) else InEachBlock(*parameter.part)
        dims = parameter.hf_shape(blocks[parameter.per])
        rules.append(WeightRule(f"{HF_ATTENTION}{hf_prefix}{parameter.hf}", stored, dims, mapping))
    return rules


def teacher_attention(shape: ModelShape) -> list[WeightRule]:
    """The tensors of a pretrained layer's attention, all of whose heads are FA."""
    layout = HeadLayout(HeadsByKind.from_fa(range(shape.num_heads), shape.num_heads), shape.num_kv_groups)
    return [*branch_rules(KINDS[FA], shape, HydraOptions.teacher(), layout, ""), O_PROJ]
