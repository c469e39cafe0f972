# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The index of a checkpoint, a pickle: tricks of pickles, and indices that promise what cannot be."""

from __future__ import annotations

import random
import resource
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import MetadataIndex

from hydra_mcore.compat.index import read_index
from hydra_mcore.config import ConfigError
from hydra_mcore.errors import InputError
from hydra_mcore.model.checkpoints import latest_iteration
from tests.support.planted_code import INDEX, raw_index, small_checkpoint, write_index


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return small_checkpoint(tmp_path)


def by_name(module: str, name: str, *rest: bytes) -> bytes:
    """A pickle of protocol 4 that asks for ``module.name``, then goes on."""
    texts = b"".join(b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, name))
    return b"\x80\x04" + texts + b"\x93" + (b"".join(rest) or b".")


TEXT = b"\x8c\x04echo"
METADATA = "torch.distributed.checkpoint.metadata"
TRICKS = {
    "stack-global": by_name("os", "system", TEXT, b"\x85R."),
    "getattr": by_name("builtins", "getattr", TEXT, TEXT, b"\x86R."),
    "dotted": by_name(METADATA, "os.system", TEXT, b"\x85R."),
    "dotted-torch": by_name("torch", "serialization.load", TEXT, b"\x85R."),
    "same-module-other-name": by_name(METADATA, "os"),
    "unpickles-again": by_name("torch.storage", "_load_from_bytes", b"C\x01.", b"\x85R."),
    "numpy": by_name("numpy._core.multiarray", "_reconstruct"),
    "global": b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00echo\x85R.",
    "inst": b"(X\x04\x00\x00\x00echoios\nsystem\n.",
    "obj": b"(cos\nsystem\nX\x04\x00\x00\x00echoo.",
    "extension": b"\x80\x02\x82\x01.",
    "persistent": b"Pname\n.",
    "persistent-on-stack": b"\x80\x04K\x01Q.",
    "class-changed": by_name(METADATA, "Metadata", b"N}\x8c\x08__init__K\x01s\x86b."),
    "size-changed": by_name("torch", "Size", b"N}\x8c\x07__new__K\x01s\x86b."),
    "keywords": by_name(METADATA, "Metadata", b")}\x92."),
    "memo-of-64-GB": b"\x80\x02Nr\xff\xff\xff\xff.",
    "memo-in-text": b"\x80\x02Np4294967294\n.",
    "bytes-of-1-TB": b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b".",
    "bytearray-of-1-TB": b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b".",
    "number-of-2-GB": b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b".",
    "text-of-4-GB": b"\x80\x02X" + struct.pack("<I", 2**32 - 1) + b".",
    "frame": b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"N.",
    "deep": b"\x80\x04" + b"]" * 300_000 + b"a" * 299_999 + b".",
    "no-index": b"\x80\x04K\x01.",
    "more-behind-the-end": b"\x80\x04K\x01..",
    "empty": b"",
    "zeros": bytes(1000),
    "noise": random.Random(3).randbytes(1000),
}


@pytest.mark.parametrize("trick", TRICKS)
def test_tricks_of_pickles_in_an_index(tmp_path: Path, trick: str) -> None:
    (tmp_path / INDEX).write_bytes(TRICKS[trick])
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises(InputError, match="damaged or no index") as error:
        read_index(tmp_path / INDEX)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400 + len(str(tmp_path))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000 and time.monotonic() - start < 20


def first_tensor(index: Any) -> Any:
    return index.state_dict_metadata["w"]


def first_place(index: Any) -> Any:
    return index.storage_data[MetadataIndex("w", [0, 0])]


def huge(index: Any) -> None:
    first_tensor(index).size = first_tensor(index).chunks[0].sizes = torch.Size([10**15])


WRONG_INDICES: dict[str, Callable[[Any], Any]] = {
    "a-tensor-of-a-petabyte": huge,
    "larger-than-its-parts": lambda index: setattr(first_tensor(index), "size", torch.Size([4, 10**12])),
    "more-axes": lambda index: setattr(first_tensor(index), "size", torch.Size([4, 6, 10**4])),
    "no-type": lambda index: setattr(first_tensor(index).properties, "dtype", "float32"),
    "a-file-outside": lambda index: setattr(first_place(index), "relative_path", "../../etc/passwd"),
    "a-file-anywhere": lambda index: setattr(first_place(index), "relative_path", "/dev/zero"),
    "no-file": lambda index: setattr(first_place(index), "relative_path", ""),
    "a-name-of-two-ends": lambda index: setattr(first_place(index), "relative_path", "__0_0.distcp\0"),
    "a-name-that-is-none": lambda index: setattr(first_place(index), "relative_path", 3),
    "before-the-file": lambda index: setattr(first_place(index), "offset", -8),
    "nowhere": lambda index: setattr(first_place(index), "offset", True),
    "no-length": lambda index: setattr(first_place(index), "length", -1),
    "compressed": lambda index: setattr(first_place(index), "transform_descriptors", ["zstd"]),
    "twice": lambda index: index.storage_data.update({MetadataIndex("u"): first_place(index)}),
    "stored-nowhere": lambda index: index.storage_data.clear(),
    "no-places": lambda index: setattr(index, "storage_data", None),
    "no-tensors": lambda index: setattr(index, "state_dict_metadata", []),
    "no-parts": lambda index: setattr(first_tensor(index), "chunks", []),
    "parts-of-nothing": lambda index: setattr(first_tensor(index), "chunks", [None]),
    "a-name-of-bytes": lambda index: index.state_dict_metadata.update({1: first_tensor(index)}),
    "other-things": lambda index: index.state_dict_metadata.update(w=[1, 2]),
}


@pytest.mark.parametrize("wrong", WRONG_INDICES)
def test_indices_that_say_what_cannot_be(small: Path, wrong: str) -> None:
    index = raw_index(small)
    WRONG_INDICES[wrong](index)
    write_index(small, index)
    with pytest.raises(ConfigError, match=r"damaged or no index .* \(remove it and name an earlier one"):
        latest_iteration(small.parent)


def test_a_list_of_parts_in_many_tensors_does_not_grow(small: Path) -> None:
    index = raw_index(small)
    part = first_tensor(index).chunks[0]
    first_tensor(index).chunks = [part] * 2000
    index.state_dict_metadata.update({f"w{number}": first_tensor(index) for number in range(2000)})
    write_index(small, index)
    start = time.monotonic()
    with pytest.raises(InputError):
        read_index(small / INDEX)
    assert time.monotonic() - start < 5


def test_an_index_without_end(small: Path) -> None:
    with (small / INDEX).open("ab") as file:
        file.truncate(2**40)  # takes no room on the disk
    with pytest.raises(InputError, match="no index is that large"):
        read_index(small / INDEX)


def test_a_long_name_is_still_an_index(small: Path) -> None:
    index = raw_index(small)
    index.storage_meta.checkpoint_id = "x" * 70_000  # written with another instruction than short names
    write_index(small, index)
    assert set(read_index(small / INDEX).state_dict_metadata) == {"w", "v"}
