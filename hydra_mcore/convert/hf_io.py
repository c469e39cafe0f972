# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Reading a Hugging Face model directory: config.json, and safetensors one tensor at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from hydra_mcore.config import ModelShape
from hydra_mcore.convert.families import FAMILIES, Family
from hydra_mcore.heads import InputError

CONFIG_NAME = "config.json"
SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"


class HuggingFaceError(InputError):
    """A Hugging Face directory that cannot be used."""


def read_config(hf_dir: str | Path) -> tuple[Family, ModelShape]:
    """Family and shape of a model directory.

    Raises:
        HuggingFaceError: no readable config.json, a family we do not know, or an option that we do not compute.
    """
    path = Path(hf_dir) / CONFIG_NAME
    raw = _read_json(path)
    family = FAMILIES.get(raw.get("model_type"))
    if family is None:
        raise HuggingFaceError(f"{path}: model_type {raw.get('model_type')!r} is not supported; supported: {', '.join(FAMILIES)}")
    for key, allowed in family.required_values.items():
        if key in raw and raw[key] not in allowed:
            raise HuggingFaceError(f"{path}: {key} {raw[key]!r} is not supported; it must be {allowed[0]!r}")
    other = sorted(set(raw.get("layer_types") or ()) - {"full_attention"})
    if other:
        raise HuggingFaceError(f"{path}: layer_types {other[0]!r} is not supported; every layer must be 'full_attention'")
    return family, _shape(path, raw, family)


def _shape(path: Path, raw: dict[str, Any], family: Family) -> ModelShape:
    values = {field: _required(path, raw, key) for field, key in family.shape_keys.items()}
    values |= {field: raw.get(key, default) for field, (key, default) in family.shape_defaults.items()}
    for field in (*family.shape_keys, "head_dim"):
        if type(values[field]) is not int or values[field] < 1:
            key = family.shape_keys.get(field, field)
            raise HuggingFaceError(f"{path}: {key} is {values[field]!r}; it must be a positive whole number")
    shape = ModelShape(**values, rope_theta=_rope_theta(path, raw))
    if shape.num_heads % shape.num_kv_groups:
        raise HuggingFaceError(f"{path}: num_key_value_heads {shape.num_kv_groups} does not divide num_attention_heads {shape.num_heads}")
    if shape.head_dim % 2:
        raise HuggingFaceError(f"{path}: head_dim {shape.head_dim} is odd; rotary positions need an even one")
    return shape


def _rope_theta(path: Path, raw: dict[str, Any]) -> float:
    """The rotary base: a key of its own before transformers 5, inside ``rope_parameters`` since."""
    rope = raw.get("rope_parameters") or {}
    for key, allowed in (("rope_type", "default"), ("partial_rotary_factor", 1.0)):
        if rope.get(key, allowed) != allowed:
            raise HuggingFaceError(f"{path}: rope_parameters.{key} {rope[key]!r} is not supported; it must be {allowed!r}")
    theta = _required(path, {**raw, **rope}, "rope_theta")
    if not isinstance(theta, int | float) or theta <= 0:
        raise HuggingFaceError(f"{path}: rope_theta is {theta!r}; it must be a positive number")
    return float(theta)


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
    """The tensors of a model directory, single-file or sharded; opened at once, each tensor read when asked for.

    Raises:
        HuggingFaceError: no weights, a missing or broken file, a tensor stored twice or not where the index says.
    """

    def __init__(self, hf_dir: str | Path) -> None:
        self.root = Path(hf_dir)
        self._file_of: dict[str, Any] = {}
        index = self._index()
        for file_name in sorted(set(index.values())) if index else [SINGLE_NAME]:
            self._open(file_name)
        for name in sorted(set(index or ()) - set(self._file_of)):
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

    def _open(self, file_name: str) -> None:
        path = self.root / file_name
        try:
            file = safe_open(str(path), framework="pt")
        except OSError:
            raise HuggingFaceError(f"{path}: the file is missing or cannot be read") from None
        except SafetensorError as error:
            raise HuggingFaceError(f"{path}: cut short or not safetensors ({error}); copy it again") from None
        for name in file.keys():  # noqa: SIM118  a safetensors handle is no dict
            if name in self._file_of:
                raise HuggingFaceError(f"{path}: tensor {name} is stored in another file too; keep one")
            self._file_of[name] = file

    def names(self) -> list[str]:
        """All tensor names, sorted."""
        return sorted(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the file's header alone."""
        return tuple(self._file_of[name].get_slice(name).get_shape())

    def read(self, name: str) -> Tensor:
        """One tensor on the CPU, as stored.

        Raises:
            HuggingFaceError: not of a floating-point type, or holds NaN or infinity.
        """
        try:
            tensor = self._file_of[name].get_tensor(name)
        except SafetensorError as error:
            raise HuggingFaceError(f"{self.root}: tensor {name} cannot be read ({error})") from None
        if not tensor.is_floating_point():
            raise HuggingFaceError(f"{self.root}: tensor {name} is {tensor.dtype}, not floating point; give unquantised weights")
        if not tensor.isfinite().all():
            raise HuggingFaceError(f"{self.root}: tensor {name} holds NaN or infinity")
        return tensor
