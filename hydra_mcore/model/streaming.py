# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Checkpoints tensor by tensor: written and read without ever holding the model in memory.

Megatron describes what a checkpoint must hold (names, head blocks, its own small objects); the values of each tensor
are asked for when it is written. The result is an ordinary checkpoint, for any layout.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    mcore_to_pyt_state_dict,
)
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

from hydra_mcore.config import ConfigError, ModelCard
from hydra_mcore.model.build import build_model
from hydra_mcore.model.checkpoints import latest_iteration, readable, write_checkpoint

Read = Callable[[str, tuple[int, ...]], Tensor]


def save_streamed(card: ModelCard, dtype: torch.dtype, read: Read, checkpoint_dir: str | Path) -> None:
    """Write a model's checkpoint, asking ``read`` for each of its tensors, once; needs process groups of one rank.

    ``read`` is given a name and a shape, and gives the tensor as it is stored: every head by itself, [heads, ...], in
    Hugging Face order.

    Raises:
        OSError: a write failed.
        ValueError: what ``read`` raised.
    """
    with WithoutMemory():
        model = build_model(card, dtype=dtype, initialize=False)
        state = model.sharded_state_dict()
    try:
        write_checkpoint(state, card, checkpoint_dir, sharded_strategy=_StreamedSave(read))
    except dcp.api.CheckpointException as error:
        raise _cause(error) from None


class WithoutMemory(TorchFunctionMode):
    """What is made within has a shape and a dtype but no values and no memory, also where a device is named.

    ``torch.device("meta")`` would leave named devices alone, and FakeTensorMode starts threads of autograd, after which
    no forked process can run backward.
    """

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        on_meta = {"device": "meta"} if func in _device_constructors() else {}
        return func(*args, **{**(kwargs or {}), **on_meta})


def _cause(failure: dcp.api.CheckpointException) -> BaseException:
    """What went wrong underneath: torch's writer reports a full disk as a file that is not where it thought it was."""
    for error, _ in failure.failures.values():
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, OSError | ValueError):
                return cause
            cause = cause.__context__
    return failure


class _StreamedSave(TorchDistSaveShardedStrategy):
    """Megatron's format, written by one process without staging what it writes."""

    def __init__(self, read: Read) -> None:
        super().__init__()
        self.read = read

    def save(self, sharded_state_dict: ShardedStateDict, checkpoint_dir: Path) -> None:
        by_key: dict[str, list[Any]] = {}
        for item in nested_values(sharded_state_dict):
            by_key.setdefault(item.key if isinstance(item, ShardedTensor) else item.unique_key, []).append(item)
        planner, writer = _StreamedPlanner(self.read), _FilePerTensor(checkpoint_dir)
        with _alone():
            dcp.save(mcore_to_pyt_state_dict(by_key), storage_writer=writer, planner=planner, no_dist=True)


class _StreamedPlanner(MCoreSavePlanner):
    """Gives the writer each block's values when it comes to write them."""

    def __init__(self, read: Read) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.read, self.name, self.tensor = read, "", torch.empty(0)

    def resolve_data(self, write_item: WriteItem) -> Any:
        if write_item.type is WriteItemType.BYTE_IO:
            return super().resolve_data(write_item)
        data = write_item.tensor_data
        if self.name != write_item.index.fqn:
            self.tensor = torch.empty(0)  # let go of the last one before the next is read
            self.name, self.tensor = write_item.index.fqn, self.read(write_item.index.fqn, tuple(data.size))
        block = self.tensor
        for axis, (offset, size) in enumerate(zip(data.chunk.offsets, data.chunk.sizes, strict=True)):
            block = block.narrow(axis, offset, size)
        return block.to(data.properties.dtype)


class _FilePerTensor(dcp.FileSystemWriter):
    """Torch's writer keeps all that it has put into a file until the file is finished: so, one file for each tensor."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> torch.futures.Future[list[Any]]:
        by_name: dict[str, list[WriteItem]] = {}
        for item in plan.items:
            by_name.setdefault(item.index.fqn, []).append(item)
        results: list[Any] = []
        for number, items in enumerate(by_name.values()):
            prefix = dataclasses.replace(plan.storage_data, prefix=f"__0_{number}_")
            results += super().write_data(dataclasses.replace(plan, items=items, storage_data=prefix), planner).wait()
        done: torch.futures.Future[list[Any]] = torch.futures.Future()
        done.set_result(results)
        return done


class StoredTensors:
    """The tensors of the newest complete checkpoint in a folder, each read when asked for; layouts do not show in them.

    Raises:
        ConfigError: no complete checkpoint.
    """

    def __init__(self, checkpoint_dir: str | Path) -> None:
        self.folder = latest_iteration(checkpoint_dir)
        self._reader = _ReaderOfOneIndex(self.folder)
        index = self._reader.read_metadata().state_dict_metadata
        self._tensors = {name: entry for name, entry in index.items() if isinstance(entry, TensorStorageMetadata)}

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, heads as blocks: [heads, ...]; raises ConfigError if there is no such tensor."""
        return tuple(self._entry(name).size)

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor; raises ConfigError if there is no such tensor."""
        return self._entry(name).properties.dtype

    def read(self, name: str) -> Tensor:
        """A whole tensor on the CPU; raises ConfigError if there is no such tensor, or its bytes are damaged."""
        tensor = torch.empty(self.shape(name), dtype=self.dtype(name))
        with _alone(), readable(self.folder):
            dcp.load({name: tensor}, storage_reader=self._reader, no_dist=True)
        return tensor

    def _entry(self, name: str) -> TensorStorageMetadata:
        if name not in self._tensors:
            raise ConfigError(
                f"{self.folder}: the checkpoint has no tensor {name}, so it is not of the model that its card describes"
            )
        return self._tensors[name]


class _ReaderOfOneIndex(dcp.FileSystemReader):
    """Reads the checkpoint's index once, not for every tensor."""

    _index: dcp.Metadata | None = None

    def read_metadata(self) -> dcp.Metadata:
        if self._index is None:
            self._index = super().read_metadata()
        return self._index


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Silence torch's warnings that a single process saves or loads, which is intended here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\.distributed\.checkpoint")
        yield
