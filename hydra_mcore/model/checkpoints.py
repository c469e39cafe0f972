# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""A model's weights to and from a checkpoint folder.

A checkpoint folder is Megatron's own (``latest_checkpointed_iteration.txt`` names the complete one, ``iter_*``
hold torch_dist files) with the model card beside it. It can be read under any tensor and pipeline layout.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.transformer.module import MegatronModule
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from hydra_mcore.compat.index import read_index
from hydra_mcore.compat.saving import INDEX_CHECKSUM
from hydra_mcore.config import ConfigError, ModelCard
from hydra_mcore.errors import InputError, first_line
from hydra_mcore.files import read_json, write_text

TRACKER = "latest_checkpointed_iteration.txt"
_INDEX = ".metadata"
_DIGITS = 18  # of a step, at most: what fits 64 bits, as Megatron sends it
_FIX = f"remove it and name an earlier one in {TRACKER}"


class CutShort(ConfigError):
    """A checkpoint whose save was not finished, or that lost files since."""


def latest_iteration(checkpoint_dir: str | Path) -> Path:
    """The folder of the newest complete checkpoint; raises ConfigError when there is none or it is cut short."""
    root = Path(checkpoint_dir)
    mark = tracker_mark(root)
    if mark is None:
        raise ConfigError(f"{root}: no complete checkpoint ({TRACKER} is missing)")
    if not _is_step(mark):
        raise ConfigError(f"{root}: {TRACKER} names {mark!r}, which is no iteration; name one")
    folder = root / f"iter_{int(mark):07d}"
    check_complete(folder)
    return folder


def tracker_mark(checkpoint_dir: str | Path) -> str | None:
    """What a folder's tracker says (at most its first characters), None where there is none that can be read."""
    try:
        with (Path(checkpoint_dir) / TRACKER).open("rb") as file:
            return file.read(2 * _DIGITS).decode("utf-8", "backslashreplace").strip()
    except OSError:
        return None


def _is_step(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= _DIGITS


def iterations(checkpoint_dir: str | Path) -> dict[int, Path]:
    """The checkpoints in a folder, complete or not, oldest first: steps trained -> folder."""
    folders = {path.name.removeprefix("iter_"): path for path in Path(checkpoint_dir).glob("iter_*") if path.is_dir()}
    return {int(step): folders[step] for step in sorted(filter(_is_step, folders), key=int)}


def check_complete(folder: Path) -> None:
    """Look at a checkpoint (an ``iter_*`` folder) as far as its index, and names and lengths of files tell.

    Raises:
        CutShort: it is not complete.
        ConfigError: its index is damaged, or could run code.
    """
    if not (folder / "metadata.json").is_file() or not (folder / _INDEX).is_file():
        raise CutShort(f"{folder}: the checkpoint is cut short ({_FIX})")
    if (folder / "common.pt").exists():
        raise ConfigError(f"{folder}: common.pt has no place in a checkpoint of ours and could run code; remove it")
    index, notes = folder / _INDEX, read_json(folder / "metadata.json", ConfigError)
    checksum = notes.get(INDEX_CHECKSUM) if isinstance(notes, dict) else None  # none where an older version saved
    for name, size in _needed_lengths(
        index, str(checksum or ""), index.stat().st_mtime_ns, index.stat().st_size
    ).items():
        path = folder / name
        if not path.is_file() or path.stat().st_size < size:
            raise CutShort(f"{path}: the checkpoint is cut short ({_FIX})")


def write_tracker(checkpoint_dir: str | Path, iteration: int) -> None:
    """Name the checkpoint of ``iteration`` as the one that counts: beside, then rename."""
    write_text(Path(checkpoint_dir) / TRACKER, str(iteration))


def trainings(card: ModelCard, checkpoint_dir: str | Path) -> list[dict[str, Any]]:
    """The trainings behind a checkpoint, the last one with the iterations that it has seen (those planned stand on its
    card).
    """
    seen = int(
        latest_iteration(checkpoint_dir).name.removeprefix("iter_")
    )  # 0 in what a conversion wrote: not trained here
    return [*card.stages[:-1], *(stage | ({"iterations": seen} if seen else {}) for stage in card.stages[-1:])]


@functools.lru_cache(maxsize=64)  # a training looks before and after each save, and an index can have a million entries
def _needed_lengths(index: Path, checksum: str, _modified: int, _size: int) -> dict[str, int]:
    """Name of each file that an index names -> the bytes that it must have."""
    try:
        stored = read_index(index, checksum).storage_data
    except InputError as error:
        raise ConfigError(f"{error} ({_FIX})") from None
    needed: dict[str, int] = {}
    for item in stored.values():
        needed[item.relative_path] = max(needed.get(item.relative_path, 0), item.offset + item.length)
    return needed


@contextlib.contextmanager
def readable(folder: Path) -> Iterator[None]:
    """While a checkpoint is read: whatever torch and Megatron raise on its files becomes a ConfigError of one line."""
    try:
        yield
    except (Exception, CheckpointException) as error:  # damaged files raise anything
        raise _unreadable(folder, error) from None


def _unreadable(folder: Path, error: BaseException) -> BaseException:
    """What to raise in place of an error that came while a checkpoint was read; torch wraps the cause, Ctrl-C too."""
    failures = error.failures if isinstance(error, CheckpointException) else {}
    cause = next((cause for cause, _ in failures.values()), error)
    if not isinstance(cause, Exception):
        return cause
    what = f"{cause} ({_FIX})" if isinstance(cause, InputError) else f"{folder}: cannot be loaded ({first_line(cause)})"
    if (rank := os.environ.get("RANK", "0")) != "0":
        print(
            f"rank {rank}: {what}", file=sys.stderr, flush=True
        )  # the first rank reads other parts, and may find them whole
    return ConfigError(what)


def _sharded_state(models: list[MegatronModule]) -> dict[str, Any]:
    return {f"model{index}": model.sharded_state_dict() for index, model in enumerate(models)}


def load_weights(models: list[MegatronModule], checkpoint_dir: str | Path) -> None:
    """Fill this rank's model chunks from a checkpoint folder, whatever layout wrote it.

    Raises:
        ConfigError: no complete checkpoint, or one whose tensors do not fit the model.
    """
    folder = latest_iteration(checkpoint_dir)
    try:
        state = dist_checkpointing.load(_sharded_state(models), str(folder))
    except (Exception, CheckpointException) as error:  # damaged files raise anything
        if not (misfit := _misfit(models, folder)):
            raise _unreadable(folder, error) from None
        problem = f"cannot be loaded into this model, so its files are from another head map or shape ({misfit})"
        raise ConfigError(f"{folder}: {problem}") from None
    for index, model in enumerate(models):
        model.load_state_dict(state.get(f"model{index}", {}))  # a pipeline stage may hold no parameter at all


def _misfit(models: list[MegatronModule], folder: Path) -> str:
    """The first of the models' tensors that a checkpoint lacks, or has with another shape; heads are blocks: [heads,
    ...].
    """
    stored, state = read_index(folder / _INDEX).state_dict_metadata, _sharded_state(models)
    apply_factories(state)
    for tensor in nested_values(state):
        if isinstance(tensor, ShardedTensor):
            if not isinstance(there := stored.get(tensor.key), TensorStorageMetadata):
                return f"no tensor {tensor.key} there"
            if list(there.size) != (here := list(tensor.global_shape)):
                return f"{tensor.key} is {list(there.size)} there, {here} here"
    return ""


def save_weights(models: list[MegatronModule], card: ModelCard, checkpoint_dir: str | Path) -> None:
    """Write a checkpoint folder of these model chunks.

    Raises:
        ConfigError: the folder already holds a checkpoint, or a write failed.
    """
    try:
        write_checkpoint(_sharded_state(models), card, checkpoint_dir)
    except CheckpointException as error:  # Megatron's writer keeps the cause to itself
        reason = str(error).strip().splitlines()[-1][:200]
        raise ConfigError(f"{checkpoint_dir}: the checkpoint cannot be written, is the disk full? ({reason})") from None


def write_checkpoint(
    state: dict[str, Any],
    card: ModelCard,
    checkpoint_dir: str | Path,
    sharded_strategy: TorchDistSaveShardedStrategy | None = None,
) -> None:
    """Write a checkpoint folder: tensors first, then the card, the tracker last (a folder without it is no checkpoint).

    Raises:
        ConfigError: the folder already holds a checkpoint.
    """
    root = Path(checkpoint_dir)
    if (root / TRACKER).exists():
        raise ConfigError(f"{root}: already holds a checkpoint; choose another folder or remove it")
    folder = root / "iter_0000000"
    folder.mkdir(parents=True, exist_ok=True)
    common = {"iteration": 0, "checkpoint_version": 3.0}
    dist_checkpointing.save({**common, **state}, str(folder), sharded_strategy, validate_access_integrity=True)
    if torch.distributed.get_rank() == 0:
        card.save(root)
        write_tracker(root, 0)
    torch.distributed.barrier()
