# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Every Hugging Face tensor of a model and where a checkpoint stores it: the families' tables, filled in for one
model.
"""

from __future__ import annotations

from dataclasses import dataclass

from hydra_mcore.config import HydraOptions, ModelCard, ModelShape
from hydra_mcore.convert.families import LAYER, OUTPUT_LAYER, TRUNK, WeightRule, teacher_attention
from hydra_mcore.convert.hydra_family import hydra_attention
from hydra_mcore.convert.mapping import WeightMapping
from hydra_mcore.kinds import FA


@dataclass(frozen=True)
class TensorRule:
    """One tensor of one model: its name and shape in Hugging Face, its name in a checkpoint, and the way between."""

    hf: str
    stored: str
    shape: tuple[int, ...]
    mapping: WeightMapping


def is_teacher(card: ModelCard) -> bool:
    """Whether the model is of its teacher's own family: every head FA, and nothing added."""
    return card.options == HydraOptions.teacher() and all(set(layer) == {FA} for layer in card.head_map.layers)


def tensor_rules(card: ModelCard) -> dict[str, TensorRule]:
    """The rule of every tensor that the model has in Hugging Face, by its name there; layer by layer."""
    shape, trunk = card.shape, [rule for rule in TRUNK if LAYER not in rule.hf]
    rules = [_filled(rule, None, _model_dimensions(shape)) for rule in trunk]
    for layer_idx, heads in enumerate(card.head_map.layers):
        attention = teacher_attention(shape) if is_teacher(card) else hydra_attention(shape, card.options, heads)
        in_layer = [rule for rule in (*TRUNK, *attention) if LAYER in rule.hf]
        rules += [_filled(rule, layer_idx, _model_dimensions(shape)) for rule in in_layer]
    if not shape.tied_embeddings:
        rules.append(_filled(OUTPUT_LAYER, None, _model_dimensions(shape)))
    return {rule.hf: rule for rule in rules}


def output_layer_rule(shape: ModelShape) -> TensorRule:
    """The output layer's own tensor, which a tied model may store as well."""
    return _filled(OUTPUT_LAYER, None, _model_dimensions(shape))


def _filled(rule: WeightRule, layer_idx: int | None, sizes: dict[str, int]) -> TensorRule:
    hf, stored = (name.replace(LAYER, str(layer_idx)) for name in (rule.hf, rule.stored))
    return TensorRule(hf, stored, tuple(sizes[dim] if isinstance(dim, str) else dim for dim in rule.dims), rule.mapping)


def _model_dimensions(shape: ModelShape) -> dict[str, int]:
    return {
        "vocab": shape.vocab_size,
        "model": shape.hidden_size,
        "ffn": shape.ffn_hidden_size,
        "head": shape.head_dim,
        "heads": shape.num_heads * shape.head_dim,
        "groups": shape.num_kv_groups * shape.head_dim,
        "num_heads": shape.num_heads,
    }
