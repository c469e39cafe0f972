# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""What reading a checkpoint lacks where its files are damaged, or were made to do harm; on every machine.

A checkpoint travels between people. torch runs its index and its small objects (common state, random numbers, ...) as
pickles, and copies a tensor's bytes without looking at the CRC-32 that its writer put beside them.
"""

from __future__ import annotations

import functools
import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch._weights_only_unpickler import get_globals_in_pkl
from torch.distributed.checkpoint._nested_dict import set_element
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.utils import _ReaderView

from hydra_mcore.compat.index import read_index
from hydra_mcore.compat.patching import Patch
from hydra_mcore.errors import InputError, first_line

SMALL = 2**20  # an entry up to so many bytes is read at once

# The classes in torch.save's files that our checkpoints hold, beside those of Megatron's settings.
_PLAIN = frozenset({
    "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3", "torch._utils._rebuild_parameter",
    "torch.Size", "torch.device",
    "torch.storage.UntypedStorage", "numpy._core.multiarray._reconstruct", "numpy.ndarray", "numpy.dtype",
    "_codecs.encode",
    "collections.OrderedDict", "builtins.set",
})  # fmt: skip


@functools.cache
def _megatron_classes() -> list[type]:
    from megatron.core.safe_globals import SAFE_GLOBALS
    from megatron.core.transformer.enums import LayerType
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    return [*SAFE_GLOBALS, LayerType, PipelineParallelLayerLayout]


@functools.cache
def _allowed() -> frozenset[str]:
    """The full names of all classes and functions that a part of a checkpoint may ask for."""
    storages = {f"torch.{kind.__name__}" for kind in torch._storage_classes}
    dtypes = {str(value) for value in vars(torch).values() if isinstance(value, torch.dtype)}
    return _PLAIN | storages | dtypes | {f"{kind.__module__}.{kind.__qualname__}" for kind in _megatron_classes()}


class _Entry(_ReaderView):
    """The bytes of one entry in a file of several; torch's own view counts a position from the end the wrong way."""

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        if whence == io.SEEK_END:
            offset, whence = self.len + offset, io.SEEK_SET
        super().seek(offset, whence)
        return self.tell()


def check_entry(entry: io.IOBase, num_bytes: int) -> None:
    """Raise an exception unless ``entry`` is a file of torch.save's, uncompressed, whole, and of known classes
    alone.
    """
    with zipfile.ZipFile(entry) as archive:
        records = archive.infolist()
        if any(record.compress_type for record in records) or sum(record.file_size for record in records) > num_bytes:
            raise ValueError("compressed")
        if wrong := archive.testzip():
            raise ValueError(f"the checksum of its {wrong.rpartition('/')[2][:80]} is another")
        (pickled,) = (record for record in records if record.filename.endswith("/data.pkl"))
        asked = get_globals_in_pkl(io.BytesIO(archive.read(pickled)))
    if unknown := sorted(asked - _allowed()):
        raise ValueError(f"it asks for {unknown[0][:80]!r}, which has no place in it and could run code")


def _checked_slice(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def slice_file(_self: Any, file: Any, place: _StorageInfo) -> io.IOBase:
        """The entry at the place that the index names, checked before anything is loaded from it; raises InputError if
        it is damaged.
        """
        entry: io.IOBase = _Entry(file, place.offset, place.length)
        if place.length <= SMALL:
            entry = io.BytesIO(entry.read())
        try:
            check_entry(entry, place.length)
        except Exception as error:  # a damaged zip or pickle raises anything
            raise InputError(f"{file.name}: damaged at byte {place.offset} ({first_line(error)})") from None
        entry.seek(0)
        return entry

    return slice_file


def _restricted_index(original: Callable[..., Metadata]) -> Callable[..., Metadata]:
    @functools.wraps(original)
    def read_metadata(self: Any, *_args: Any, **keywords: Any) -> Metadata:
        metadata = read_index(Path(self._get_metadata_path(keywords.get("rank"))))
        metadata.storage_meta.load_id = self.load_id
        return metadata

    return read_metadata


def _restricted_bytes(original: Callable[..., None]) -> Callable[..., None]:
    torch.serialization.add_safe_globals(_megatron_classes())  # Megatron itself adds all but two

    @functools.wraps(original)
    def load_bytes(self: Any, read_item: Any, value: io.BytesIO) -> None:
        found = torch.load(value, map_location="cpu", weights_only=True)
        if self.flatten_state_dict:
            set_element(self.original_state_dict, self.mappings[read_item.dest_index.fqn], found)
        else:
            self.state_dict[read_item.dest_index.fqn] = found

    return load_bytes


def _refuse_common(original: Callable[[str], Any]) -> Callable[[str], NoReturn]:
    @functools.wraps(original)
    def load_common(checkpoint_dir: str) -> NoReturn:
        raise InputError(
            f"{checkpoint_dir}: common.pt has no place in a checkpoint of ours and could run code; remove it"
        )

    return load_common


_FILES = "torch.distributed.checkpoint.filesystem:FileSystemReader"
_SERIALIZATION = "megatron.core.dist_checkpointing.serialization"

PATCHES = (
    Patch(
        target=f"{_FILES}.read_metadata",
        caller=f"{_FILES}.read_metadata",
        marker="metadata = pickle.load(metadata_file)",
        reason="The index is unpickled without restriction: opening a checkpoint runs what its writer put there.",
        make=_restricted_index,
    ),
    Patch(
        target=f"{_FILES}._slice_file",
        caller=f"{_FILES}.read_data",
        marker="self._slice_file(stream, item_md)",
        reason=(
            "Nobody compares checksums, so a flipped byte becomes a weight; a compressed record takes any amount of"
            " memory."
        ),
        make=_checked_slice,
    ),
    Patch(
        target="torch.distributed.checkpoint.default_planner:DefaultLoadPlanner.load_bytes",
        caller="torch.distributed.checkpoint.default_planner:DefaultLoadPlanner.load_bytes",
        marker="weights_only=False",
        reason="Objects (common state, random numbers, layers' extra state) are unpickled without restriction.",
        make=_restricted_bytes,
    ),
    Patch(
        target="megatron.core.dist_checkpointing.strategies.common:load_common",
        caller=f"{_SERIALIZATION}:load_common_state_dict",
        marker="return load_common(checkpoint_dir)",
        reason=(
            "A pickle that no checkpoint of ours holds, and that an environment variable of torch's would let run code."
        ),
        make=_refuse_common,
        rebind=(_SERIALIZATION,),
    ),
)
