# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Reading a Hugging Face model's config.json."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from hydra_mcore.config import ModelCard, ModelShape, teacher_card
from hydra_mcore.convert import hydra_family
from hydra_mcore.convert.families import (
    CONFIG_KEYS,
    FAMILIES,
    LARGEST,
    ROPE_KEYS,
    SHAPE_KEYS,
    Family,
)
from hydra_mcore.convert.hf_code import model_class
from hydra_mcore.convert.output_folder import HEAD_MAP_NAME
from hydra_mcore.errors import InputError
from hydra_mcore.files import checked, read_json, shown
from hydra_mcore.heads import HeadMap
from hydra_mcore.model.rotary import ROPE_TYPES, rotary_frequencies

CONFIG_NAME = "config.json"


class HuggingFaceError(InputError):
    """A Hugging Face directory that cannot be used."""


def read_config(hf_dir: str | Path) -> ModelCard:
    """What config.json says of a model, a teacher or a HydraHead; a teacher's fingerprint is not in it, so left empty.

    What it leaves out means what transformers' own class of the family takes for it.

    Raises:
        HuggingFaceError: no readable config.json, a family we do not know, a value that cannot be, or an option that we
            do not compute.
    """
    path = Path(hf_dir) / CONFIG_NAME
    raw = read_object(path)
    try:
        card = _card(raw)
    except KeyError as error:
        raise HuggingFaceError(f"{path}: key {error} is missing") from None
    except InputError as error:
        raise HuggingFaceError(f"{path}: {error}") from None
    return dataclasses.replace(card, source={"config": raw}, head_map=_head_map(Path(hf_dir), card))


def _card(raw: dict[str, Any]) -> ModelCard:
    """The card that a config.json describes; raises KeyError or InputError that do not name the file."""
    known = {**FAMILIES, hydra_family.MODEL_TYPE: hydra_family.FAMILY}
    model_type = checked(raw.get("model_type"), str, "model_type")
    if model_type not in known:
        raise InputError(f"model_type {model_type!r} is not supported; supported: {', '.join(known)}")
    family = known[model_type]
    for key, allowed in family.required_values.items():
        if key in raw and raw[key] not in allowed:
            raise InputError(f"{key} {shown(raw[key])} is not supported; it must be {allowed[0]!r}")
    own = (
        hydra_family.KEYS if family is hydra_family.FAMILY else {}
    )  # in another family's config.json they would mean nothing
    given = {key: checked(raw[key], hint, key) for key, hint in (CONFIG_KEYS | own).items() if key in raw}
    for key in ("rope_scaling", "rope_parameters"):
        for name in ROPE_KEYS.keys() & (given.get(key) or {}):
            given[key][name] = checked(given[key][name], ROPE_KEYS[name], f"{key}: {name}")
        rope = given.get(key) or {}
        if (rope_type := rope.get("rope_type", rope.get("type", "default"))) not in ("default", *ROPE_TYPES):
            raise InputError(
                f"{key} has rope_type {rope_type!r}; supported are {', '.join(ROPE_TYPES)}, so take another teacher"
            )
    for key in (*SHAPE_KEYS.values(), "head_dim"):
        if (value := given.get(key)) is not None and not 1 <= value <= LARGEST[key]:
            raise InputError(f"{key} is {value}; it must be a positive whole number up to {LARGEST[key]}")
    config = _completed(family, given)
    if other := sorted(set(getattr(config, "layer_types", None) or ()) - {"full_attention"}):
        raise InputError(
            f"layer_types {other[0]!r} is not supported; every layer must be 'full_attention' (see use_sliding_window)"
        )
    shape = _shape(config, family)
    rotary_frequencies(shape)
    return hydra_family.from_config(raw | given, shape) if own else teacher_card(shape, "")


def _completed(family: Family, given: dict[str, Any]) -> PreTrainedConfig:
    """What transformers makes of the keys of config.json that we read."""
    kind = model_class().config_class if family is hydra_family.FAMILY else CONFIG_MAPPING[family.model_type]
    try:
        return kind(**given)
    except Exception as error:  # whatever its checks run into
        raise InputError(f"transformers cannot use it ({str(error).strip().splitlines()[-1].strip()})") from None


def _head_map(hf_dir: Path, card: ModelCard) -> HeadMap:
    """The card's head map, with the provenance that the file beside config.json adds, if there is one."""
    path = hf_dir / HEAD_MAP_NAME
    if not path.is_file():
        return card.head_map
    head_map = HeadMap.load(path)
    if head_map.layers != card.head_map.layers:
        raise HuggingFaceError(f"{path}: its heads are not those of {CONFIG_NAME}; take both from one export")
    return head_map


def _shape(config: PreTrainedConfig, family: Family) -> ModelShape:
    values = {field: getattr(config, key) for field, key in SHAPE_KEYS.items()}
    num_heads, num_kv_groups, head_dim = values["num_heads"], values["num_kv_groups"], getattr(config, "head_dim", None)
    if head_dim is None:
        if values["hidden_size"] % num_heads:
            raise InputError(f"num_attention_heads {num_heads} does not divide hidden_size {values['hidden_size']}")
        head_dim = values["hidden_size"] // num_heads
    if num_heads % num_kv_groups:
        raise InputError(f"num_key_value_heads {num_kv_groups} does not divide num_attention_heads {num_heads}")
    if head_dim % 2:
        raise InputError(f"head_dim {head_dim} is odd; rotary positions need an even one")
    if not 0 < config.rms_norm_eps < 1:
        raise InputError(f"rms_norm_eps is {config.rms_norm_eps}; it must be a small positive number")
    theta, scaling = _rope(config.rope_parameters)
    return ModelShape(
        **values,
        head_dim=head_dim,
        rope_theta=theta,
        rope_scaling=scaling,
        norm_epsilon=config.rms_norm_eps,
        tied_embeddings=config.tie_word_embeddings,
        qk_norm=getattr(config, "qk_norm", family.qk_norm),
        qkv_bias=getattr(config, "qkv_bias", family.qkv_bias),
    )


def _rope(parameters: dict[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """The rotary base and the scaling, if any, as transformers puts them together from the keys of its versions."""
    rope = {key: value for key, value in parameters.items() if key != "type"}  # what rope_type was called
    theta, rope_type = rope.pop("rope_theta", None), rope.pop("rope_type", None)
    if not isinstance(theta, float | int) or theta <= 0:
        raise InputError(f"rope_theta is {theta!r}; it must be a positive number")
    if (partial := rope.pop("partial_rotary_factor", 1.0)) != 1.0:
        raise InputError(f"partial_rotary_factor {partial!r} is not supported; it must be 1.0")
    return float(theta), None if rope_type == "default" else {"rope_type": rope_type, **rope}


def read_object(path: Path) -> dict[str, Any]:
    """The keys and values of a JSON file in a model directory; raises HuggingFaceError where there is none."""
    if not path.is_file():
        raise HuggingFaceError(f"{path}: no such file; give a Hugging Face model directory")
    raw = read_json(path, HuggingFaceError)
    if not isinstance(raw, dict):
        raise HuggingFaceError(f"{path}: expected a JSON object")
    return checked(raw, dict[str, Any], str(path), HuggingFaceError)
