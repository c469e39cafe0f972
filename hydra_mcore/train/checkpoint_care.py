# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Care for the checkpoints of a stage: which one counts, which are kept, that there is room for the next.

A checkpoint counts when it is complete and the tracker names it; Megatron writes the tracker last (``compat.saving``:
whole or not at all). So a kill at any moment leaves the last one usable, and what remains of the killed save is
removed at the next start. docs/checkpoints.md tells it from the user's side.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import shutil
import sys
from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

import torch
from megatron.core import parallel_state as mpu
from megatron.core.models.gpt import GPTModel
from megatron.training import training
from megatron.training.models import GPTModelConfig
from torch.distributed.checkpoint.api import CheckpointException

from hydra_mcore.compat.saving import stop_writer
from hydra_mcore.config import ConfigError, ModelCard, StageOptions
from hydra_mcore.errors import InputError
from hydra_mcore.files import NO_ROOM, checked, read_json, write_json
from hydra_mcore.heads import first_difference
from hydra_mcore.model.checkpoints import (
    TRACKER,
    CutShort,
    check_complete,
    iterations,
    latest_iteration,
    readable,
    tracker_mark,
    write_tracker,
)
from hydra_mcore.model.runtime import from_first_rank

VERSIONS = "versions.json"
SHARED_MEMORY = Path("/dev/shm")  # where torch passes CPU tensors between processes
_REMOVING = "removing_"
_PACKAGES = ("hydra_mcore", "megatron-core", "torch")
_ADAM_BYTES = 12  # a trained parameter's float32 value and two moments


class SaveFailed(InputError):
    """A checkpoint cannot be written; the last complete one stays as it is."""


def resumable(save: Path) -> Path | None:
    """The checkpoint that a stage goes on from: the one its tracker names, else the newest complete one; None to start
    afresh.

    All ranks ask before they can talk to each other, while rank 0 may be in `tidy` already, which does not change the
    answer.

    Raises:
        ConfigError: a tracker names a checkpoint that is damaged, and there is no other.
    """
    try:
        return latest_iteration(save)
    except ConfigError as error:
        problem = error
    for _, folder in sorted(iterations(save).items(), reverse=True):
        with contextlib.suppress(ConfigError):
            check_complete(folder)
            return folder
    if tracker_mark(save):
        raise problem
    return None


def tidy(save: Path) -> None:
    """Before a stage starts, on rank 0: make the tracker name the checkpoint it goes on from, remove what killed runs
    left.
    """
    for leftover in save.glob(_REMOVING + "*"):
        shutil.rmtree(leftover)
    if (chosen := resumable(save)) is None:
        (save / TRACKER).unlink(missing_ok=True)
    else:
        try:
            latest_iteration(save)
        except ConfigError as error:
            print(f"{error}; going on from {chosen.name}, the newest complete checkpoint", flush=True)
            write_tracker(save, _iteration(chosen))
    for folder in iterations(save).values():
        try:
            check_complete(folder)
        except CutShort:
            print(f"{folder}: removed, its save was not finished", flush=True)
            _remove(folder)
        except ConfigError as error:
            print(f"{error}; left where it is", flush=True)


def prune(save: Path, keep_last: int, keep_every: int) -> Path | None:
    """Remove all but the newest ``keep_last`` checkpoints and those of a multiple of ``keep_every`` steps; returns the
    newest.

    The newest is the one to go on from; what is beyond it is being written, and left alone.
    """
    newest = None
    with contextlib.suppress(ConfigError):  # damaged by somebody while training runs: the next save makes a whole one
        newest = resumable(save)
    folders = {step: folder for step, folder in iterations(save).items() if newest and step <= _iteration(newest)}
    for step in list(folders)[:-keep_last]:
        if not keep_every or step % keep_every:
            _remove(folders[step])
    return newest


def note_versions(save: Path) -> None:
    """Write the versions of what trains beside the checkpoints, and say which differ from those that wrote them
    so far.
    """
    here = {name: _version(name) for name in _PACKAGES}
    there: dict[str, str] = {}
    if (save / VERSIONS).exists():
        try:
            there = checked(read_json(save / VERSIONS), dict[str, str], str(save / VERSIONS))
        except InputError as error:
            print(f"{error}; written anew", flush=True)
    for name, found in here.items():
        if there.get(name, found) != found:
            print(f"{save}: {name} was {there[name]} so far and is {found} now", flush=True)
    write_json(save / VERSIONS, here)


def difference(there: ModelCard, here: ModelCard) -> str:
    """The first fact in which two runs differ: shape, head map, options, teacher, stage; empty if none does."""
    for part in ("shape", "options"):
        mine, theirs = dataclasses.asdict(getattr(here, part)), dataclasses.asdict(getattr(there, part))
        for name, value in mine.items():
            if theirs[name] != value:
                return f"{name} is {theirs[name]!r} there, {value!r} here"
    for layer_idx, (theirs, mine) in enumerate(zip(there.head_map.layers, here.head_map.layers, strict=True)):
        if theirs != mine:
            return "layer {}: {} heads {} there, {} here".format(layer_idx, *first_difference(theirs, mine))
    if there.fingerprint != here.fingerprint:
        return f"the teacher's weights are {there.fingerprint[:12]} there, {here.fingerprint[:12]} here"
    return "" if there == here else f"stage {there.stage} there, {here.stage} here"


@contextlib.contextmanager
def checkpoint_care(save: Path, options: StageOptions, args: Namespace, config: GPTModelConfig) -> Iterator[None]:
    """While a stage trains: room is looked for at the start and before each save, old checkpoints go, a failed save
    stops it.

    Raises:
        ConfigError: the checkpoint to go on from is damaged.
        SaveFailed: no room for a checkpoint, or a write failed; nothing of that save is left, the one before is.
    """
    stock, stock_load = training.save_checkpoint, training.load_checkpoint

    def save_checkpoint(iteration: int, *rest: Any, **keywords: Any) -> None:
        from_first_rank(partial(_make_room, save, iteration, options))
        stock(iteration, *rest, **keywords)

    def load_checkpoint(*rest: Any, **keywords: Any) -> Any:
        with readable(save):
            return stock_load(*rest, **keywords)

    config.pre_wrap_hooks.append(partial(_look_for_room, save, args))
    training.save_checkpoint, training.load_checkpoint = save_checkpoint, load_checkpoint
    try:
        yield
    except CheckpointException as error:  # torch's, a BaseException
        _fail(save, args.rank, next((cause for cause, _ in error.failures.values()), None))
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        _fail(save, args.rank, error)
    finally:
        training.save_checkpoint, training.load_checkpoint = stock, stock_load
        stop_writer()
        if args.rank == 0:
            prune(save, options.keep_last, options.keep_every)


def _make_room(save: Path, iteration: int, options: StageOptions) -> None:
    """Before a save: remove what is old, or left under its name from before a step back; raises SaveFailed when that is
    not enough.
    """
    if folder := iterations(save).get(iteration):
        _remove(folder)
    if (last := prune(save, options.keep_last, options.keep_every)) is None:
        return
    needed, free = _size(last), shutil.disk_usage(save).free
    if free < needed:
        raise SaveFailed(
            f"{save}: a checkpoint takes {_readable(needed)} and {_readable(free)} are free, so step {iteration} is not"
            f" saved; make room or lower keep-last (step {_iteration(last)} is complete)"
        )


def _look_for_room(save: Path, args: Namespace, models: list[GPTModel]) -> list[GPTModel]:
    """At the start: the disk must hold one checkpoint more, and shared memory the optimizer's state that a writer is
    handed.
    """
    needed = torch.tensor(_checkpoint_bytes(models, args), device=torch.cuda.current_device())
    torch.distributed.all_reduce(needed, group=mpu.get_model_parallel_group())
    from_first_rank(partial(_check_disk, save, int(needed)))
    if args.async_save:
        fits = torch.tensor(int(shutil.disk_usage(SHARED_MEMORY).free >= needed), device=torch.cuda.current_device())
        torch.distributed.all_reduce(fits, op=torch.distributed.ReduceOp.MIN)
        if not fits:
            args.async_save = False
            if args.rank == 0:
                print(
                    f"{SHARED_MEMORY} has less room than a checkpoint needs, {_readable(int(needed))}: saves are"
                    " synchronous",
                    flush=True,
                )
    return models


def _check_disk(save: Path, needed: int) -> None:
    if (free := shutil.disk_usage(save).free) < needed:
        raise SaveFailed(
            f"{save}: a checkpoint will take about {_readable(needed)} and {_readable(free)} are free; make room first"
        )


def _checkpoint_bytes(models: list[GPTModel], args: Namespace) -> int:
    """What this rank's share of a checkpoint takes: parameters, and the optimizer's state of the trained ones."""
    state = 0 if args.no_save_optim else _ADAM_BYTES
    parameters = itertools.chain.from_iterable(model.parameters() for model in models)
    return sum(p.numel() * (args.params_dtype.itemsize + (state if p.requires_grad else 0)) for p in parameters)


def _fail(save: Path, rank: int, cause: BaseException | None) -> NoReturn:
    """Remove what the failed save wrote, and say why it failed; ranks that only heard of it have no cause."""
    free = shutil.disk_usage(save).free
    if rank == 0:
        tidy(save)
    last = resumable(save)
    kept = f"step {_iteration(last)} is complete" if last else "none is complete yet"
    message = f"{save}: a checkpoint cannot be written, is the disk full? {_readable(free)} are free ({cause}); {kept}"
    if rank and cause:
        print(f"rank {rank}: {message}", file=sys.stderr, flush=True)  # the first rank may not have heard
    raise SaveFailed(message) from None


def _remove(folder: Path) -> None:
    """Remove a checkpoint; killed midway, what is left of it does not look like one."""
    aside = folder.with_name(_REMOVING + folder.name)
    if aside.exists():
        shutil.rmtree(aside)
    shutil.rmtree(folder.rename(aside))


def _iteration(folder: Path) -> int:
    return int(folder.name.removeprefix("iter_"))


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def _readable(size: int) -> str:
    power = min(int(math.log10(max(size, 1))) // 3, 4)
    return f"{size / 1000**power:.1f} {('bytes', 'kB', 'MB', 'GB', 'TB')[power]}"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
