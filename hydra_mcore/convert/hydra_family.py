# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The HydraHead family in Hugging Face: its tensors, and its config.json from a model card and back.

The names are those of ``hf_model/modeling_hydra_head.py``, which travels with an exported model.
"""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

from hydra_mcore.config import HydraOptions, ModelCard, ModelShape, Training
from hydra_mcore.convert.families import (
    HF_ATTENTION,
    O_PROJ,
    OUR_ATTENTION,
    SHAPE_KEYS,
    UNSUPPORTED_UNLESS,
    Family,
    WeightRule,
    branch_rules,
)
from hydra_mcore.convert.hf_code import AUTO_MAP
from hydra_mcore.convert.mapping import InEachBlock, WeightMapping, Whole
from hydra_mcore.files import checked
from hydra_mcore.heads import HeadLayout, HeadMap, HeadsByKind
from hydra_mcore.kinds import KINDS
from hydra_mcore.kinds.kind import linear

MODEL_TYPE = "hydra_head"
FAMILY = Family(MODEL_TYPE, qk_norm=True, qkv_bias=False, required_values=UNSUPPORTED_UNLESS)
OPTIONS = typing.get_type_hints(HydraOptions)
KEYS = {
    **dict.fromkeys(("qk_norm", "qkv_bias"), bool),
    "heads": list[dict[str, list[int]]],
    "fa_heads": list[list[int]],  # of exports before format 3 of head maps: all other heads are GDN
    **OPTIONS,
    "teacher": dict[str, str | int],
    "stage": str,
    "stages": list[dict[str, Any]],
}
"""As ``families.CONFIG_KEYS``: what no other family has."""
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def hydra_attention(shape: ModelShape, options: HydraOptions, heads: HeadsByKind) -> list[WeightRule]:
    """The tensors of a HydraHead layer's attention; a kind without heads has none."""
    layout, rules = HeadLayout(heads, shape.num_kv_groups), [O_PROJ]
    if options.qkv == "shared":
        for index, name in enumerate(("k_proj", "v_proj")):
            for parameter in linear("linear_kv", name, "group", shape.head_dim, shape.hidden_size, bias=shape.qkv_bias):
                dims = parameter.hf_shape(shape.num_kv_groups)
                rules.append(_rule(parameter.hf, parameter.stored, *dims, mapping=InEachBlock(index, 2)))
    for kind in heads:
        rules += branch_rules(KINDS[kind], shape, options, layout, f"{kind}.")
        if options.fusion != "none" and options.fusion_norm_weight == "branch":
            rules.append(_rule(f"{kind}_norm.weight", f"fusion.norms.{kind}.weight", "head"))
    if options.fusion in ("scale", "competition"):
        rules.append(_rule("scale", "fusion.scale.weight", "num_heads"))
    if options.fusion == "competition":
        rules.append(_rule("competition.weight", "fusion.competition", "num_heads", "model"))
    return rules


def _rule(hf: str, stored: str, *dims: str | int, mapping: WeightMapping | None = None) -> WeightRule:
    return WeightRule(HF_ATTENTION + hf, OUR_ATTENTION + stored, dims, mapping or Whole())


def to_config(card: ModelCard, dtype: str) -> dict[str, Any]:
    """The config.json of a HydraHead model whose tensors are mostly of ``dtype``."""
    shape, source = card.shape, card.source.get("config", {})
    return {
        "model_type": MODEL_TYPE,
        "architectures": [AUTO_MAP["AutoModelForCausalLM"].split(".")[1]],
        "auto_map": AUTO_MAP,
        "dtype": dtype,
        **{key: getattr(shape, field) for field, key in SHAPE_KEYS.items()},
        SHAPE_KEYS["native_length"]: card.longest_trained,  # engines serve no longer text unless told to
        "head_dim": shape.head_dim,
        "rms_norm_eps": shape.norm_epsilon,
        "tie_word_embeddings": shape.tied_embeddings,
        "hidden_act": "silu",
        "rope_parameters": {"rope_type": "default", **(shape.rope_scaling or {}), "rope_theta": shape.rope_theta},
        "qk_norm": shape.qk_norm,
        "qkv_bias": shape.qkv_bias,
        **{key: source[key] for key in _TOKEN_IDS if key in source},
        "heads": [{kind: list(heads) for kind, heads in layer.items()} for layer in card.head_map.layers],
        **dataclasses.asdict(card.options),
        "teacher": {**teacher_facts(card), "fingerprint": card.fingerprint, "native_length": shape.native_length},
        "stage": card.stage,
        "stages": card.stages,
        "use_cache": True,
    }


def teacher_facts(card: ModelCard) -> dict[str, str]:
    """model_type, name, revision and license of the pretrained model that a checkpoint descends from; empty where not
    known.
    """
    config = card.source.get("config", {})
    if config.get("model_type") == MODEL_TYPE:
        known = config.get("teacher", {})
    else:
        known = card.source | {"model_type": config.get("model_type", "")}
    return {key: known.get(key, "") for key in ("model_type", "name", "revision", "license")}


def from_config(raw: dict[str, Any], shape: ModelShape) -> ModelCard:
    """The model card behind a HydraHead config.json that transformers takes, the types of its values checked.

    An option that is not there, as one of a kind that came later, has its default, as in transformers.

    Raises:
        KeyError, InputError: a key is missing, or a value is not one that ``to_config`` writes.
    """
    checked(raw["stages"], list[Training], "stages")
    if "fa_heads" in raw and "heads" not in raw:
        layers = [HeadsByKind.from_fa(heads, shape.num_heads) for heads in raw["fa_heads"]]
    else:
        layers = [HeadsByKind(**heads) for heads in raw["heads"]]
    teacher = raw["teacher"]
    if "native_length" in teacher:  # the model itself may have been trained on longer text
        shape = dataclasses.replace(shape, native_length=checked(teacher["native_length"], int, "native_length"))
    return ModelCard(
        shape=shape,
        head_map=HeadMap(num_heads=shape.num_heads, num_kv_groups=shape.num_kv_groups, layers=tuple(layers)),
        options=HydraOptions(**{name: raw[name] for name in OPTIONS if name in raw}),
        fingerprint=checked(teacher["fingerprint"], str, "fingerprint"),
        stage=raw["stage"],
        stages=raw["stages"],
    )
