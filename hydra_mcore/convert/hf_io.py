# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Reading a Hugging Face model directory: config.json, and safetensors one tensor at a time."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from hydra_mcore.config import ModelCard, ModelShape
from hydra_mcore.convert import hydra_family
from hydra_mcore.convert.families import FAMILIES, SHAPE_KEYS, Family
from hydra_mcore.convert.target import HEAD_MAP_NAME
from hydra_mcore.errors import InputError
from hydra_mcore.heads import HeadMap
from hydra_mcore.model.build import teacher_card
from hydra_mcore.model.rotary import rotary_frequencies

CONFIG_NAME = "config.json"
SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # safetensors' names of what we read


class HuggingFaceError(InputError):
    """A Hugging Face directory that cannot be used."""


def read_config(hf_dir: str | Path) -> ModelCard:
    """What config.json says of a model, a teacher or a HydraHead; a teacher's fingerprint is not in it, so left empty.

    Raises:
        HuggingFaceError: no readable config.json, a family we do not know, or an option that we do not compute.
    """
    path = Path(hf_dir) / CONFIG_NAME
    raw = _read_json(path)
    family = hydra_family.FAMILY if raw.get("model_type") == hydra_family.MODEL_TYPE else FAMILIES.get(raw.get("model_type"))
    if family is None:
        known = ", ".join([*FAMILIES, hydra_family.MODEL_TYPE])
        raise HuggingFaceError(f"{path}: model_type {raw.get('model_type')!r} is not supported; supported: {known}")
    for key, allowed in family.required_values.items():
        if key in raw and raw[key] not in allowed:
            raise HuggingFaceError(f"{path}: {key} {raw[key]!r} is not supported; it must be {allowed[0]!r}")
    other = sorted(set(raw.get("layer_types") or ()) - {"full_attention"})
    if other:
        raise HuggingFaceError(f"{path}: layer_types {other[0]!r} is not supported; every layer must be 'full_attention'")
    shape = _shape(path, raw, family)
    try:
        rotary_frequencies(shape)
        card = hydra_family.from_config(raw, shape) if family is hydra_family.FAMILY else teacher_card(shape, "")
    except KeyError as error:
        raise HuggingFaceError(f"{path}: key {error} is missing") from None
    except (TypeError, ValueError) as error:
        raise HuggingFaceError(f"{path}: {error}") from None
    return dataclasses.replace(card, source={"config": raw}, head_map=_head_map(Path(hf_dir), card))


def _head_map(hf_dir: Path, card: ModelCard) -> HeadMap:
    """The card's head map, with the provenance that the file beside config.json adds, if there is one."""
    path = hf_dir / HEAD_MAP_NAME
    if not path.is_file():
        return card.head_map
    head_map = HeadMap.load(path)
    if head_map.layers != card.head_map.layers:
        raise HuggingFaceError(f"{path}: its heads are not the fa_heads of {CONFIG_NAME}; take both from one export")
    return head_map


def _shape(path: Path, raw: dict[str, Any], family: Family) -> ModelShape:
    given = {"num_key_value_heads": raw.get("num_attention_heads"), **raw}  # configs older than grouped queries lack it
    values = {field: _required(path, given, key) for field, key in SHAPE_KEYS.items()}
    values["head_dim"] = raw.get("head_dim") or family.head_dim
    for field in SHAPE_KEYS:
        _check_positive(path, SHAPE_KEYS[field], values[field])
    if values["head_dim"] is None:
        if values["hidden_size"] % values["num_heads"]:
            raise HuggingFaceError(f"{path}: num_attention_heads {values['num_heads']} does not divide hidden_size {values['hidden_size']}")
        values["head_dim"] = values["hidden_size"] // values["num_heads"]
    _check_positive(path, "head_dim", values["head_dim"])
    theta, scaling = _rope(path, raw)
    own = raw if family is hydra_family.FAMILY else {}  # keys of ours: in another family's config.json they would mean nothing
    shape = ModelShape(
        **values,
        rope_theta=theta,
        rope_scaling=scaling,
        norm_epsilon=raw.get("rms_norm_eps", 1e-6),
        tied_embeddings=raw.get("tie_word_embeddings", False),
        qk_norm=own.get("qk_norm", family.qk_norm),
        qkv_bias=own.get("qkv_bias", family.qkv_bias),
    )
    if shape.num_heads % shape.num_kv_groups:
        raise HuggingFaceError(f"{path}: num_key_value_heads {shape.num_kv_groups} does not divide num_attention_heads {shape.num_heads}")
    if shape.head_dim % 2:
        raise HuggingFaceError(f"{path}: head_dim {shape.head_dim} is odd; rotary positions need an even one")
    return shape


def _check_positive(path: Path, key: str, value: Any) -> None:
    if type(value) is not int or value < 1:
        raise HuggingFaceError(f"{path}: {key} is {value!r}; it must be a positive whole number")


def _rope(path: Path, raw: dict[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """The rotary base and the scaling, if any: two keys before transformers 5, both inside ``rope_parameters`` since."""
    rope = {"rope_theta": raw.get("rope_theta"), **(raw.get("rope_scaling") or {}), **(raw.get("rope_parameters") or {})}
    theta, rope_type = rope.pop("rope_theta"), rope.pop("type", "default")
    rope_type = rope.pop("rope_type", rope_type)
    if theta is None:
        raise HuggingFaceError(f"{path}: key 'rope_theta' is missing")
    if not isinstance(theta, int | float) or theta <= 0:
        raise HuggingFaceError(f"{path}: rope_theta is {theta!r}; it must be a positive number")
    if (partial := rope.pop("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0))) != 1.0:
        raise HuggingFaceError(f"{path}: partial_rotary_factor {partial!r} is not supported; it must be 1.0")
    return float(theta), None if rope_type == "default" else {"rope_type": rope_type, **rope}


def _required(path: Path, raw: dict[str, Any], key: str) -> Any:
    if key not in raw:
        raise HuggingFaceError(f"{path}: key {key!r} is missing")
    return raw[key]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text())
    except OSError as error:
        raise HuggingFaceError(f"{path}: {error.strerror}; give a Hugging Face model directory") from None
    except ValueError as error:
        raise HuggingFaceError(f"{path}: not JSON ({error})") from None
    if not isinstance(raw, dict):
        raise HuggingFaceError(f"{path}: expected a JSON object")
    return raw


class HfWeights:
    """The tensors of a model directory, single-file or sharded: all headers are read at once, each tensor when asked for.

    No file stays open: what has been read of one would count as this process's memory until it is closed.

    Raises:
        HuggingFaceError: no weights, a missing or broken file, a tensor stored twice or not where the index says.
    """

    def __init__(self, hf_dir: str | Path) -> None:
        self.root = Path(hf_dir)
        self._headers: dict[str, tuple[Path, tuple[int, ...], str]] = {}
        index = self._index()
        for file_name in sorted(set(index.values())) if index else [SINGLE_NAME]:
            self._read_header(self.root / file_name)
        for name in sorted(set(index or ()) - set(self._headers)):
            raise HuggingFaceError(f"{self.root}: tensor {name} is missing from {index[name]}, where {INDEX_NAME} puts it")

    def _index(self) -> dict[str, str]:
        """Tensor name -> file name of a sharded directory; empty for a single file."""
        if (self.root / SINGLE_NAME).is_file():
            return {}
        if not (self.root / INDEX_NAME).is_file():
            raise HuggingFaceError(f"{self.root}: no weights; expected {SINGLE_NAME} or {INDEX_NAME} with its shards")
        index = _read_json(self.root / INDEX_NAME).get("weight_map")
        if not isinstance(index, dict) or not index or not all(isinstance(name, str) for name in index.values()):
            raise HuggingFaceError(f"{self.root / INDEX_NAME}: no weight_map from tensors to files")
        return index

    def _read_header(self, path: Path) -> None:
        try:
            with safe_open(str(path), framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  a safetensors handle is no dict
                    if name in self._headers:
                        raise HuggingFaceError(f"{path}: tensor {name} is stored in another file too; keep one")
                    header = file.get_slice(name)
                    self._headers[name] = (path, tuple(header.get_shape()), header.get_dtype())
        except OSError:
            raise HuggingFaceError(f"{path}: the file is missing or cannot be read") from None
        except SafetensorError as error:
            raise HuggingFaceError(f"{path}: cut short or not safetensors ({error}); copy it again") from None

    def names(self) -> list[str]:
        """All tensor names, sorted."""
        return sorted(self._headers)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the file's header alone."""
        return self._headers[name][1]

    def dtype(self, name: str) -> str:
        """Torch's name of a tensor's dtype, from the file's header alone.

        Raises:
            HuggingFaceError: not one of ``DTYPES``.
        """
        stored = self._headers[name][2]
        if stored not in DTYPES:
            raise HuggingFaceError(f"{self.root}: tensor {name} is {stored}; give unquantised weights, {', '.join(DTYPES.values())}")
        return DTYPES[stored]

    def read(self, name: str) -> Tensor:
        """One tensor on the CPU, as stored.

        Raises:
            HuggingFaceError: it cannot be read, or holds NaN or infinity.
        """
        try:
            with safe_open(str(self._headers[name][0]), framework="pt") as file:
                tensor = file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise HuggingFaceError(f"{self.root}: tensor {name} cannot be read ({error})") from None
        if not tensor.isfinite().all():
            raise HuggingFaceError(f"{self.root}: tensor {name} holds NaN or infinity")
        return tensor
