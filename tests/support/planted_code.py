# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Checkpoints with a program in them, as somebody could send them."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from hydra_mcore.compat.patching import original
from hydra_mcore.compat.saving import INDEX_CHECKSUM
from hydra_mcore.model.checkpoints import write_tracker

INDEX = ".metadata"


class Program:
    """Unpickled, it makes the file ``marker``."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


def small_checkpoint(root: Path) -> Path:
    """A checkpoint of a few hundred bytes of tensors, for many thousand damages; its index has no checksum."""
    folder = root / "iter_0000002"
    state = {"w": torch.arange(24.0).view(4, 6), "v": torch.arange(5, dtype=torch.bfloat16)}
    dcp.save(state, storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
    (folder / "metadata.json").write_text("{}")
    write_tracker(root, 2)
    return folder


def raw_index(folder: Path) -> Any:
    """The index of a checkpoint that we wrote ourselves, as torch reads it."""
    with (folder / INDEX).open("rb") as file:
        return pickle.load(file)


def write_index(folder: Path, index: Any) -> None:
    """Replace the index, its checksum too: who can do the one can do the other."""
    data = pickle.dumps(index, protocol=4)
    (folder / INDEX).write_bytes(data)
    (folder / "metadata.json").write_text(
        json.dumps({"sharded_backend": "torch_dist", INDEX_CHECKSUM: hashlib.sha256(data).hexdigest()})
    )


def saved(value: Any) -> bytes:
    """The bytes that torch.save writes."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def replace_entry(folder: Path, name: str, data: bytes) -> None:
    """Have the index name other bytes for every stored part of ``name`` (a start of its full name)."""
    index = raw_index(folder)
    parts = [(key, place) for key, place in index.storage_data.items() if key.fqn.startswith(name)]
    assert parts, f"{folder} holds no {name}"
    for _, place in parts:
        with (folder / place.relative_path).open("ab") as file:
            place.offset, place.length = file.tell(), len(data)
            file.write(data)
    write_index(folder, index)


def plant(folder: Path, place: str, marker: Path) -> None:
    """Put a program into a checkpoint (an ``iter_*`` folder): into its index, a ``common.pt``, or an entry of this
    name.
    """
    if place == INDEX:
        index = raw_index(folder)
        index.planner_data = Program(marker)
        write_index(folder, index)
    elif place == "common.pt":
        (folder / place).write_bytes(saved({"iteration": Program(marker)}))
    else:
        replace_entry(folder, place, saved([Program(marker), torch.zeros(1 << 14)]))  # no smaller than what it replaces


def unprotected_load(data: bytes) -> Any:
    """What torch itself does with an entry: the proof that a planted program runs where nobody stops it."""
    planner = type("Planner", (), {"flatten_state_dict": False, "state_dict": {}})()
    request = type("Request", (), {"dest_index": type("Index", (), {"fqn": "x"})()})()
    original("torch.distributed.checkpoint.default_planner:DefaultLoadPlanner.load_bytes")(
        planner, request, io.BytesIO(data)
    )
    return planner.state_dict["x"]
