# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Reading the safetensors of a Hugging Face model directory, one tensor at a time."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from hydra_mcore.convert.families import (
    EMBEDDING,
    OUTPUT_LAYER,
)
from hydra_mcore.convert.hf_config import HuggingFaceError, read_object
from hydra_mcore.files import shown

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # safetensors' names of what we read
BUFFERS = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")  # computed anew by every version


class _Header(NamedTuple):
    """Where a tensor is, and what it is: its name in that file, its dtype by safetensors' name."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


class HfWeights:
    """The tensors of a model directory, single-file or sharded: all headers are read at once, each tensor when asked
    for.

    No file stays open: what has been read of one would count as this process's memory until it is closed. Buffers of
        old
    versions, which hold no weights, are left out.

    Args:
        tied: the output layer is the embedding: where it alone is stored, it counts as the embedding.

    Raises:
        HuggingFaceError: no weights, a missing or broken file, a tensor stored twice or not where the index says.
    """

    def __init__(self, hf_dir: str | Path, tied: bool) -> None:
        self.root = Path(hf_dir)
        self._headers: dict[str, _Header] = {}
        index = self._index()
        for file_name in sorted(set(index.values())) if index else [SINGLE_NAME]:
            self._read_header(self.root / file_name)
        for name in sorted(set(index or ()) - set(self._headers)):
            raise HuggingFaceError(
                f"{self.root}: tensor {name} is missing from {index[name]}, where {INDEX_NAME} puts it"
            )
        self._headers = {name: header for name, header in self._headers.items() if not name.endswith(BUFFERS)}
        if tied and EMBEDDING.hf not in self._headers and OUTPUT_LAYER.hf in self._headers:
            self._headers[EMBEDDING.hf] = self._headers.pop(OUTPUT_LAYER.hf)

    def _index(self) -> dict[str, str]:
        """Tensor name -> file name of a sharded directory; empty for a single file."""
        if (self.root / SINGLE_NAME).is_file():
            return {}
        if not (self.root / INDEX_NAME).is_file():
            raise HuggingFaceError(f"{self.root}: no weights; expected {SINGLE_NAME} or {INDEX_NAME} with its shards")
        index = read_object(self.root / INDEX_NAME).get("weight_map")
        if not isinstance(index, dict) or not index or not all(isinstance(name, str) for name in index.values()):
            raise HuggingFaceError(f"{self.root / INDEX_NAME}: no weight_map from tensors to files")
        if strange := [
            name
            for name in index.values()
            if not name.endswith(".safetensors") or "\0" in name or Path(name).name != name
        ]:
            raise HuggingFaceError(f"{self.root / INDEX_NAME}: {shown(strange[0])} is no safetensors file beside it")
        return index

    def _read_header(self, path: Path) -> None:
        try:
            with safe_open(str(path), framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  a safetensors handle is no dict
                    if name in self._headers:
                        raise HuggingFaceError(f"{path}: tensor {name} is stored in another file too; keep one")
                    header = file.get_slice(name)
                    self._headers[name] = _Header(path, name, tuple(header.get_shape()), header.get_dtype())
        except OSError:
            raise HuggingFaceError(f"{path}: the file is missing or cannot be read") from None
        except SafetensorError as error:
            raise HuggingFaceError(f"{path}: cut short or not safetensors ({error}); copy it again") from None

    def names(self) -> list[str]:
        """All tensor names, sorted."""
        return sorted(self._headers)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the file's header alone."""
        return self._headers[name].shape

    def dtype(self, name: str) -> str:
        """Torch's name of a tensor's dtype, from the file's header alone.

        Raises:
            HuggingFaceError: not one of ``DTYPES``.
        """
        stored = self._headers[name].dtype
        if stored not in DTYPES:
            raise HuggingFaceError(
                f"{self.root}: tensor {name} is {stored}; give unquantised weights, {', '.join(DTYPES.values())}"
            )
        return DTYPES[stored]

    def read(self, name: str) -> Tensor:
        """One tensor on the CPU, as stored.

        Raises:
            HuggingFaceError: it cannot be read, or holds NaN or infinity.
        """
        try:
            header = self._headers[name]
            with safe_open(str(header.file), framework="pt") as file:
                tensor = file.get_tensor(header.name)
        except (OSError, SafetensorError) as error:
            raise HuggingFaceError(f"{self.root}: tensor {name} cannot be read ({error})") from None
        if not tensor.isfinite().all():
            raise HuggingFaceError(f"{self.root}: tensor {name} holds NaN or infinity")
        return tensor
