# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The index of a checkpoint (``.metadata``, a pickle) read without doing what it says.

A pickle is a program for a small machine, and torch runs it as it is. Here its instructions must be those that torch
writes into an index, by which the machine cannot be made to take memory that the file does not have. The objects that
they make are inert records, which are checked and only then made into torch's own.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import math
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo

from hydra_mcore.errors import InputError, first_line

LARGEST = 2**31  # bytes; a trained model of 32B parameters has an index of 50 MB


class _Record:
    """Stands for an object in an index, whose class it has as its name."""

    __slots__ = ("state",)

    def __init__(self, *_args: Any) -> None: ...

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Size(tuple):
    """Stands for a torch.Size."""

    __slots__ = ()

    def __new__(cls, values: Any) -> _Size:
        if any(type(value) is not int or value < 0 for value in values):
            raise ValueError("a size that is none")
        return super().__new__(cls, values)

    def __setstate__(self, state: Any) -> None:
        raise TypeError("a size has no state")


_CLASSES = {
    "torch.distributed.checkpoint.metadata": (
        "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "TensorProperties", "ChunkStorageMetadata",
        "MetadataIndex",
        "StorageMeta", "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.distributed.checkpoint.planner": ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData",
        "BytesIOWriteData"),
    "torch.serialization": ("_get_layout",),
    "pathlib": ("PosixPath",),
    "pathlib._local": ("PosixPath",),  # as Python 3.13 calls it
}  # fmt: skip


def _stand_ins() -> dict[tuple[str, str], Any]:
    found: dict[tuple[str, str], Any] = {}
    for module, names in _CLASSES.items():
        found |= {(module, name): type(name, (_Record,), {"__slots__": ()}) for name in names}
    return found


_KNOWN = _stand_ins()
_KNOWN |= {("torch", name): value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
_KNOWN["torch", "Size"] = _Size


def _sized(longest: int) -> bytes:
    """A pattern of a byte that counts, and so many bytes after it."""
    return b"(?:" + b"|".join(re.escape(bytes([length])) + b".{%d}" % length for length in range(longest + 1)) + b")"


_LONG_TEXT = b"X"  # the only one whose length a pattern cannot tell: four bytes
_INSTRUCTIONS = re.compile(
    b"(?:"
    rb"[\x94N\x88\x89)\x85\x86\x87t(\]ae}su\x93\x81Rb]|[hK].|M..|[jJ].{4}"
    rb"|\x8c" + _sized(255) + rb"|\x8a" + _sized(9) + rb"|\x95.{8}|\x80."
    b")*+",
    re.DOTALL,
)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            raise pickle.UnpicklingError(
                f"it asks for {f'{module}.{name}'[:80]!r}, which has no place in it and could run code"
            )
        return _KNOWN[module, name]


def read_index(path: Path, sha256: str = "") -> dcp.Metadata:
    """The index at ``path``: which tensors and objects there are, and where their bytes lie.

    What torch notes for its own next save (plans) is left out.

    Args:
        sha256: its checksum, empty where it is not known.

    Raises:
        InputError: not the index of a checkpoint, a damaged one, or one made to do harm: it asks for a class or an
            instruction that has no place there, names files outside its folder, or tensors larger than their files.
    """
    try:
        if path.stat().st_size > LARGEST:
            raise ValueError("no index is that large")
        data = path.read_bytes()
        if sha256 and hashlib.sha256(data).hexdigest() != sha256:
            raise ValueError("its checksum is another")
        _check_instructions(data)
        return _Index(_Unpickler(io.BytesIO(data)).load(), len(data)).metadata()
    except OSError as error:
        raise InputError(f"{path}: the checkpoint's index cannot be read ({error.strerror})") from None
    except Exception as error:  # a damaged pickle raises anything
        raise InputError(f"{path}: the checkpoint's index is damaged or no index ({first_line(error)})") from None


def _check_instructions(data: bytes) -> None:
    end = _INSTRUCTIONS.match(data).end()
    while data[end : end + 1] == _LONG_TEXT:
        length = int.from_bytes(data[end + 1 : end + 5], "little")
        end = _INSTRUCTIONS.match(data, end + 5 + length).end()
    if data[end:] != b".":
        raise ValueError(f"its byte {end} is no instruction that an index holds")


class _Index:
    """An unpickled index of so many bytes, checked; any error means that it is damaged."""

    def __init__(self, root: Any, num_bytes: int) -> None:
        self.root, self.num_bytes, self.chunks = _fields(root, "Metadata"), num_bytes, 0
        self.stored = dict(_stored(key, info) for key, info in self.root["storage_data"].items())
        _check_overlap(self.stored)

    def metadata(self) -> dcp.Metadata:
        entries = {
            _of(name, str): self._entry(name, record) for name, record in self.root["state_dict_metadata"].items()
        }
        return dcp.Metadata(entries, storage_data=self.stored, storage_meta=dcp.StorageMeta())

    def _entry(self, name: str, record: Any) -> dcp.TensorStorageMetadata | dcp.BytesStorageMetadata:
        if type(record).__name__ == "BytesStorageMetadata":
            return dcp.BytesStorageMetadata()
        fields = _fields(record, "TensorStorageMetadata")
        properties, size, chunks = _properties(fields["properties"]), _size(fields["size"]), _of(fields["chunks"], list)
        self.chunks += len(chunks)  # a list can stand in many tensors
        if self.chunks > self.num_bytes:
            raise ValueError("more parts of tensors than it has bytes")
        parts = {chunk.offsets: chunk for chunk in map(_chunk, chunks)}
        for offsets, chunk in parts.items():
            if (
                math.prod(chunk.sizes) * properties.dtype.itemsize
                > self.stored[dcp.MetadataIndex(name, offsets)].length
            ):
                raise ValueError(f"a part of {name[:80]} is larger than its bytes")
        if math.prod(size) > sum(math.prod(chunk.sizes) for chunk in parts.values()):
            raise ValueError(f"{name[:80]} is larger than its parts")
        return dcp.TensorStorageMetadata(properties, size, list(parts.values()))


def _fields(record: Any, name: str) -> dict[str, Any]:
    if type(record).__name__ != name or not isinstance(record.state, dict):
        raise ValueError(f"{type(record).__name__} where {name} belongs")
    return record.state


def _of[T](value: Any, kind: type[T]) -> T:
    if type(value) is not kind:
        raise ValueError(f"{type(value).__name__} where {kind.__name__} belongs")
    return value


def _size(record: Any) -> torch.Size:
    return torch.Size(_of(record, _Size))


def _properties(record: Any) -> dcp.TensorProperties:
    """Only the dtype counts: torch has deprecated the others, and all that we write are plain."""
    return dcp.TensorProperties(dtype=_of(record.state[0], torch.dtype))


def _chunk(record: Any) -> dcp.ChunkStorageMetadata:
    fields = _fields(record, "ChunkStorageMetadata")
    return dcp.ChunkStorageMetadata(offsets=_size(fields["offsets"]), sizes=_size(fields["sizes"]))


def _stored(key: Any, info: Any) -> tuple[dcp.MetadataIndex, _StorageInfo]:
    index, place = _fields(key, "MetadataIndex"), _fields(info, "_StorageInfo")
    name, offset, length = _of(place["relative_path"], str), _of(place["offset"], int), _of(place["length"], int)
    if not name or Path(name).name != name or "\0" in name:
        raise ValueError(f"{name[:80]!r} is no file of its folder")
    if min(offset, length) < 0 or place.get("transform_descriptors"):
        raise ValueError(f"no plain bytes in {name[:80]}")
    offsets, number = index.get("offset"), index.get("index")
    where = dcp.MetadataIndex(
        _of(index["fqn"], str),
        None if offsets is None else _size(offsets),
        None if number is None else _of(number, int),
    )
    return where, _StorageInfo(name, offset, length)


def _check_overlap(stored: dict[dcp.MetadataIndex, _StorageInfo]) -> None:
    """Nothing is stored twice, so that what is read is no more than what the files hold."""
    places = sorted((info.relative_path, info.offset, info.length) for info in stored.values())
    for (name, offset, length), (next_name, next_offset, _) in itertools.pairwise(places):
        if name == next_name and offset + length > next_offset:
            raise ValueError(f"two entries share bytes of {name[:80]}")
