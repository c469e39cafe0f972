# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""What Megatron's checkpoint saving lacks when a process is killed, a signal comes, or the background writer dies.

Small files are written whole or not at all, and metadata.json holds the checksum of the index. A background save runs
in a process of its own (``--async-save --use-persistent-ckpt-worker``, started by a fork server): it must not outlive
its trainer and write into a restarted run's files, must not die of a signal that asks the trainer to save, and its
death must not make the trainer wait forever.
"""

import builtins
import contextlib
import dataclasses
import functools
import hashlib
import json
import multiprocessing
import os
import queue
import select
import signal
import sys
import threading
import types
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import Any, TextIO

import torch

from hydra_mcore.commands import end_with_parent
from hydra_mcore.compat.patching import Patch, original
from hydra_mcore.files import replacing

_STRATEGIES = "megatron.core.dist_checkpointing.strategies"
_WRITER = f"{_STRATEGIES}.async_utils:PersistentAsyncCaller"
_ASYNC = "megatron.training.async_utils"
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)  # what asks a trainer to stop
_POLL_S = 1.0
INDEX_CHECKSUM = "index_sha256"  # a key of metadata.json


@contextlib.contextmanager
def _write_whole(path: str | Path) -> Iterator[TextIO]:
    """A text file that appears under its name when it is written to the disk: beside, then rename."""
    with replacing(path, alone=True) as beside, open(beside, "w") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def _open(path: str | os.PathLike[str], mode: str = "r", **keywords: Any) -> Any:
    return _write_whole(path) if mode == "w" else builtins.open(path, mode, **keywords)


def _make_getattr(original: Callable[[Any, str], Any]) -> Callable[[Any, str], Any]:
    @functools.wraps(original)
    def lookup(self: Any, name: str) -> Any:
        """The original, its local ``open`` replaced by one that writes text whole."""
        found = original(self, name)
        return _open if found is builtins.open else found

    return lookup


def _make_save_config(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def save_config(config: Any, checkpoint_dir: str | os.PathLike[str]) -> None:
        """The original, with the checksum of the index beside it; tensors have their own where they lie."""
        with open(Path(checkpoint_dir) / ".metadata", "rb") as index:
            checksum = hashlib.file_digest(index, "sha256").hexdigest()
        with _write_whole(Path(checkpoint_dir) / "metadata.json") as file:
            json.dump({**dataclasses.asdict(config), INDEX_CHECKSUM: checksum}, file)

    return save_config


def _queue_in_process(original: Callable[..., None]) -> Callable[..., None]:
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    @functools.wraps(original)
    def save(self: Any, sharded_state_dict: Any, checkpoint_dir: Any) -> None:
        """The original, a synchronous save: this process both fills and empties the queue of write results."""
        shared, filesystem_async._results_queue = filesystem_async._results_queue, queue.Queue()
        try:
            original(self, sharded_state_dict, checkpoint_dir)
        finally:
            filesystem_async._results_queue = shared

    return save


def _make_results_queue(original: Callable[[str], Any]) -> Callable[[str], Any]:
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    @functools.wraps(original)
    def get_write_results_queue(mp_mode: str = "spawn") -> Any:
        """The original, its manager ending with this process."""
        if filesystem_async._results_queue is None:
            manager = SyncManager(ctx=multiprocessing.get_context(mp_mode))
            manager.start(end_with_parent, (signal.SIGKILL,))
            filesystem_async._results_queue = manager.Queue()
        return original(mp_mode)

    return get_write_results_queue


def _make_start(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def init_persistent_async_worker(*args: Any, **keywords: Any) -> None:
        """The original; the processes that it starts inherit a mask, so no signal to the whole job ends a save
        midway.
        """
        resource_tracker.ensure_running()  # it would lift the mask when it starts
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        main, sys.modules["__main__"] = (
            sys.modules["__main__"],
            types.ModuleType("__main__"),
        )  # a writer imports it: all of training
        try:
            original(*args, **keywords)
        finally:
            sys.modules["__main__"] = main
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    return init_persistent_async_worker


def write_until_parent_dies(*args: Any) -> None:
    """Megatron's loop of the background writer, in that process; ends at once when the trainer does, however it
    does.
    """
    threading.Thread(target=_follow, args=(multiprocessing.parent_process().pid,), daemon=True).start()
    from hydra_mcore import compat

    compat.install()
    original(f"{_WRITER}.async_loop")(*args)


def _follow(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        select.select(
            [os.pidfd_open(pid)], [], []
        )  # not parent.join(): what it waits for, others that the trainer forked hold open
    os._exit(1)


def _make_get_process(original: Callable[..., Any]) -> Any:
    @functools.wraps(original)
    def get_process(cls: Any, *args: Any, **keywords: Any) -> Any:
        """The original; who waits for the process it starts notices when that dies, or never gets what it was sent."""
        starts = cls._persistent_process is None
        process = original(*args, **keywords)
        if starts:
            _watch(process, cls._persistent_queue, cls._persistent_preload_q, cls._persistent_comp_q)
        return process

    return classmethod(get_process)


def _watch(process: Any, requests: Any, staged: Any, done: Any) -> None:
    lost: list[BaseException] = []

    def check() -> None:
        from torch.distributed.checkpoint.api import CheckpointException

        if lost or not process.is_alive():
            cause = lost[0] if lost else OSError(f"the background writer died (exit status {process.exitcode})")
            raise CheckpointException("write", {torch.distributed.get_rank(): (cause, None)})

    def join() -> None:
        with staged._cond:
            while not staged._unfinished_tasks._semlock._is_zero():
                staged._cond.wait(_POLL_S)
                check()

    def poll(get: Callable[[], Any] = done.get_nowait) -> Any:
        try:
            return get()
        except queue.Empty:
            check()
            raise

    requests._on_queue_feeder_error = lambda error, _request: lost.append(error)
    staged.join, done.get_nowait = join, poll


def stop_writer() -> None:
    """End the background writer if it runs; what it was writing does not count."""
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller
    from megatron.training import async_utils

    if async_utils._async_calls_queue is not None:
        async_utils._async_calls_queue.close(abort=True)
    if (process := PersistentAsyncCaller._persistent_process) is not None:  # it was never given anything to write
        process.kill()
        PersistentAsyncCaller._persistent_process = None


PATCHES = (
    Patch(
        target="megatron.core.msc_utils:MaybeMultiStorageClient.__getattr__",
        caller="megatron.training.checkpointing:save_checkpoint",
        marker="with maybe_msc.open(tracker_filename, 'w') as f:",
        reason=(
            "The tracker is truncated, then written: a kill in between leaves a folder of complete checkpoints that no "
            "run goes on from. The same holds for metadata.json."
        ),
        make=_make_getattr,
    ),
    Patch(
        target="megatron.core.dist_checkpointing.core:save_config",
        caller="megatron.core.dist_checkpointing.core:save_config",
        marker="json.dump(asdict(config), f)",
        reason="A flipped bit in the index gives a tensor another type, place or name, and nothing tells.",
        make=_make_save_config,
        rebind=("megatron.core.dist_checkpointing.serialization",),
    ),
    Patch(
        target=f"{_STRATEGIES}.torch:TorchDistSaveShardedStrategy.save",
        caller=f"{_STRATEGIES}.filesystem_async:get_write_results_queue",
        marker="ctx.Manager().Queue()",
        reason=(
            "The first synchronous save of every rank spawns a process that imports torch and the main script again, "
            "seconds and half a gigabyte each, and that stays when the rank is killed."
        ),
        make=_queue_in_process,
    ),
    Patch(
        target=f"{_STRATEGIES}.filesystem_async:get_write_results_queue",
        caller=f"{_STRATEGIES}.filesystem_async:get_write_results_queue",
        marker="ctx.Manager().Queue()",
        reason="The manager's process stays when its rank is killed, holding the rank's output open.",
        make=_make_results_queue,
    ),
    Patch(
        target=f"{_ASYNC}:init_persistent_async_worker",
        caller="megatron.training.initialize:initialize_megatron",
        marker="init_persistent_async_worker(args.rank, 'forkserver')",
        reason=(
            "SLURM sends its signals to every process of a job: the writer dies of the SIGTERM at which the trainer"
            " saves."
        ),
        make=_make_start,
        rebind=("megatron.training.initialize",),
    ),
    Patch(
        target=f"{_WRITER}.async_loop",
        caller=f"{_WRITER}._get_process",
        marker="target=PersistentAsyncCaller.async_loop",
        reason=(
            "A writer holds both ends of its queues, so it stays when its trainer is killed: for good, with its GPU "
            "memory, and finishing a file that the restarted run may be writing as well."
        ),
        make=lambda _original: write_until_parent_dies,
    ),
    Patch(
        target=f"{_WRITER}._get_process",
        caller=f"{_WRITER}.schedule_async_call",
        marker="self._persistent_preload_q.join()",
        reason="When the writer dies, or a tensor cannot be handed to it, the trainer waits for it forever.",
        make=_make_get_process,
    ),
)
