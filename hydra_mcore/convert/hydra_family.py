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
    projections,
    qk_norms,
)
from hydra_mcore.convert.hf_code import AUTO_MAP
from hydra_mcore.files import checked
from hydra_mcore.heads import HeadMap, LayerHeads

MODEL_TYPE = "hydra_head"
FAMILY = Family(MODEL_TYPE, qk_norm=True, qkv_bias=False, required_values=UNSUPPORTED_UNLESS)
KEYS = {
    **dict.fromkeys(("qk_norm", "qkv_bias"), bool),
    "fa_heads": list[list[int]],
    **typing.get_type_hints(HydraOptions),
    "teacher": dict[str, str],
    "stage": str,
    "stages": list[dict[str, Any]],
}
"""As ``families.CONFIG_KEYS``: what no other family has."""
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def hydra_attention(options: HydraOptions, heads: LayerHeads, shape: ModelShape) -> tuple[WeightRule, ...]:
    """The tensors of a HydraHead layer's attention; a branch without heads has none."""
    normed = options.fusion != "none" and options.fusion_norm_weight == "branch"
    own, bias = "qkv" if options.qkv == "separate" else "q", shape.qkv_bias
    rules = [O_PROJ]
    if options.qkv == "shared":
        rules += projections("", "", "", "groups", bias, "kv")
    if heads.fa:
        rules += projections("fa.", "fa.", "fa", "fa_groups", bias, own)
        rules += qk_norms("fa.", "fa.") if shape.qk_norm else ()
        rules += _gate("fa", options.fa_gate)
        rules += [_rule("fa_norm.weight", "fusion.norms.fa.weight", "head")] if normed else []
    if heads.gdn:
        rules += projections("gdn.", "gdn.", "gdn", "gdn" if options.gdn_kv == "per_head" else "gdn_groups", bias, own)
        rules += qk_norms("gdn.", "gdn.") if options.gdn_qk_norm == "rms" else ()
        rules += [_rule("gdn.conv.weight", "gdn.conv.weight", "gdn_qkv", 1, "taps")] if options.gdn_conv_kernel else []
        rules += _linear("gdn.decay_proj", "gdn.linear_decay", "num_gdn") + _linear(
            "gdn.write_proj", "gdn.linear_write", "num_gdn"
        )
        rules += [_rule("gdn.A_log", "gdn.A_log.weight", "num_gdn")]
        rules += _gate("gdn", options.gdn_gate)
        rules += [_rule("gdn_norm.weight", "fusion.norms.gdn.weight", "head")] if normed else []
    if options.fusion in ("scale", "competition"):
        rules.append(_rule("scale", "fusion.scale.weight", "num_heads"))
    if options.fusion == "competition":
        rules.append(_rule("competition.weight", "fusion.competition", "num_heads", "model"))
    return tuple(rules)


def _rule(hf: str, stored: str, *dims: str | int) -> WeightRule:
    return WeightRule(HF_ATTENTION + hf, OUR_ATTENTION + stored, dims)


def _linear(hf: str, stored: str, rows: str) -> list[WeightRule]:
    return [_rule(hf + ".weight", stored + ".weight", rows, "model"), _rule(hf + ".bias", stored + ".bias", rows)]


def _gate(branch: str, granularity: str) -> list[WeightRule]:
    rows = {"elementwise": branch, "headwise": "num_" + branch}
    return [] if granularity == "none" else _linear(branch + ".gate_proj", branch + ".gate.linear", rows[granularity])


def to_config(card: ModelCard, dtype: str) -> dict[str, Any]:
    """The config.json of a HydraHead model whose tensors are mostly of ``dtype``."""
    shape, source = card.shape, card.source.get("config", {})
    return {
        "model_type": MODEL_TYPE,
        "architectures": [AUTO_MAP["AutoModelForCausalLM"].split(".")[1]],
        "auto_map": AUTO_MAP,
        "dtype": dtype,
        **{key: getattr(shape, field) for field, key in SHAPE_KEYS.items()},
        "head_dim": shape.head_dim,
        "rms_norm_eps": shape.norm_epsilon,
        "tie_word_embeddings": shape.tied_embeddings,
        "hidden_act": "silu",
        "rope_parameters": {"rope_type": "default", **(shape.rope_scaling or {}), "rope_theta": shape.rope_theta},
        "qk_norm": shape.qk_norm,
        "qkv_bias": shape.qkv_bias,
        **{key: source[key] for key in _TOKEN_IDS if key in source},
        "fa_heads": [list(layer.fa) for layer in card.head_map.layers],
        **dataclasses.asdict(card.options),
        "teacher": {"model_type": teacher_type(card), "fingerprint": card.fingerprint},
        "stage": card.stage,
        "stages": card.stages,
        "use_cache": True,
    }


def teacher_type(card: ModelCard) -> str:
    """The model_type of the pretrained model that a checkpoint descends from; empty where it is not known."""
    source = card.source.get("config", {})
    return (
        source.get("teacher", {}).get("model_type", "")
        if source.get("model_type") == MODEL_TYPE
        else source.get("model_type", "")
    )


def from_config(raw: dict[str, Any], shape: ModelShape) -> ModelCard:
    """The model card behind a HydraHead config.json that transformers takes, the types of its values checked.

    Raises:
        KeyError, InputError: a key is missing, or a value is not one that ``to_config`` writes.
    """
    fa_heads = [(layer_idx, head_idx) for layer_idx, heads in enumerate(raw["fa_heads"]) for head_idx in heads]
    checked(raw["stages"], list[Training], "stages")
    return ModelCard(
        shape=shape,
        head_map=HeadMap.from_fa(fa_heads, shape.num_layers, shape.num_heads, shape.num_kv_groups),
        options=HydraOptions(**{item.name: raw[item.name] for item in dataclasses.fields(HydraOptions)}),
        fingerprint=raw["teacher"]["fingerprint"],
        stage=raw["stage"],
        stages=raw["stages"],
    )
