# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Run a function on several ranks, by forking this process: torch and Megatron-Core are imported only once.

::

    def worker(rank, scale):
        with model_parallel(tp=2):
            ...
        return losses

    assert run_ranks(worker, 2, 0.5) == [...]

The ranks talk through gloo.  The parent must not have started CUDA or OpenMP threads (conftest.py sees to it).
"""

import contextlib
import faulthandler
import gc
import itertools
import logging
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from hydra_mcore.commands import end_with_parent

_POLL_S = 0.01
_GRACE_S = 1.0  # a rank that fails takes its peers down: wait this long to see who failed first
_STACKS_S = 0.3
_LOG_CHARS = 8000
_INITIALISATIONS = itertools.count()  # forked ranks count alike


class RankError(AssertionError):
    """A rank raised, died or did not finish in time; the message holds its traceback and its last output."""


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120.0, **kwargs: Any) -> list[Any]:
    """Run ``fn(rank, *args, **kwargs)`` on ``world_size`` forked ranks and return what they return, by rank.

    Args:
        fn: any callable, closures included.  Its result must pickle.  ``sys.exit(0)`` counts as returning None.
        world_size: number of ranks.
        timeout: seconds after which all ranks are killed.

    Raises:
        RankError: a rank failed; the other ranks are killed.
        RuntimeError: this process has process groups of its own.
    """
    _drop_groups()
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        reader, writer = os.pipe()
        pids = [_fork(fn, rank, world_size, Path(folder), reader, writer, args, kwargs) for rank in range(world_size)]
        os.close(reader)
        try:
            # The parent hosts the store: it picks a free port by itself, and no rank's end takes the store away.
            # It is started after the forks, so that no rank inherits its thread.
            store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            os.write(writer, f"{store.port:06d}".encode() * world_size)
            problem = _wait(pids, time.monotonic() + timeout)
        finally:
            os.close(writer)
            _kill(pids)
        if problem is not None:
            raise RankError(_report(Path(folder), world_size, problem))
        return [pickle.loads((Path(folder) / f"{rank}.result").read_bytes()) for rank in range(world_size)]


@contextlib.contextmanager
def model_parallel(
    tp: int = 1, pp: int = 1, cp: int = 1, vpp: int | None = None, seed: int = 1234, timeout: float = 60.0
) -> Iterator[None]:
    """Initialise torch.distributed (gloo) and Megatron-Core's groups and generators, and destroy them at the end.

    Args:
        tp, pp, cp, vpp: sizes of tensor, pipeline, context and virtual pipeline parallelism; the rest is data
            parallel.
        seed: of Megatron-Core's generators and of torch.
        timeout: seconds after which a collective raises.
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    limit = timedelta(seconds=timeout)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=limit)
    # A second initialisation by the same ranks must not read what the first one left in the store.
    fresh = dist.PrefixStore(f"initialisation_{next(_INITIALISATIONS)}", store)
    dist.init_process_group("gloo", store=fresh, rank=rank, world_size=world_size, timeout=limit)
    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            virtual_pipeline_model_parallel_size=vpp,
            context_parallel_size=cp,
        )
        torch.manual_seed(seed)
        model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
        yield
        dist.barrier()  # a rank that is done early must not close the connections of the others
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def _drop_groups() -> None:
    """Make this process fit to be forked.

    A process group that a rank inherits and drops hangs it: the destructor joins threads that only the parent has.
    Megatron's destroy_model_parallel() forgets some groups, so they go here; gc.freeze() keeps the rank from
    collecting what else the parent holds.
    """
    if dist.is_initialized():
        raise RuntimeError("run_ranks() forks: destroy the process groups of this process first")
    state = sys.modules.get("megatron.core.parallel_state")
    for name, value in list(vars(state).items()) if state else ():
        if isinstance(value, dist.ProcessGroup):
            setattr(state, name, None)


def _fork(
    fn: Callable[..., Any],
    rank: int,
    world_size: int,
    folder: Path,
    reader: int,
    writer: int,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> int:
    """Fork one rank and return its process id.  The child does not return."""
    sys.stdout.flush()
    sys.stderr.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # pytest-timeout and tqdm keep threads; none holds a lock
        pid = os.fork()
    if pid:
        return pid
    os.close(writer)
    _be_rank(fn, rank, world_size, folder, reader, args, kwargs)


def _be_rank(
    fn: Callable[..., Any],
    rank: int,
    world_size: int,
    folder: Path,
    reader: int,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> NoReturn:
    """Run ``fn`` as one rank, leave its result or its traceback in ``folder`` and end the process."""
    code = 1
    gc.freeze()
    try:
        os.setpgid(0, 0)  # so that its own children are killed with it
        end_with_parent(signal.SIGKILL)  # nobody collects a rank whose parent was killed
        signal.setitimer(signal.ITIMER_REAL, 0)  # the parent's time-out is not ours
        log = os.open(folder / f"{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.stdout, sys.stderr = (open(fd, "w", buffering=1, closefd=False) for fd in (1, 2))  # noqa: SIM115
        logging.getLogger().handlers.clear()  # pytest's write to the parent's streams
        faulthandler.register(signal.SIGUSR1, file=sys.stderr)
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(world_size),
            LOCAL_WORLD_SIZE=str(world_size),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(int(os.read(reader, 6))),
            TORCHELASTIC_USE_AGENT_STORE="True",
        )
        torch.set_num_threads(1)
        try:
            result = fn(rank, *args, **kwargs)
        except SystemExit as stop:
            if stop.code not in (0, None):
                raise
            result = None
        (folder / f"{rank}.result").write_bytes(pickle.dumps(result))
        code = 0
    except BaseException:
        (folder / f"{rank}.error").write_text(traceback.format_exc())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wait(pids: list[int], deadline: float) -> str | None:
    """Wait for all ranks; return None, or what went wrong.  Finished ranks are zeroed in ``pids``."""
    problem = None
    while any(pids):
        for rank, pid in enumerate(pids):
            if not pid or os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                continue
            code = _collect(pid)
            pids[rank] = 0
            if code and problem is None:
                problem = f"rank {rank} failed" if code > 0 else f"rank {rank} died of {signal.Signals(-code).name}"
                deadline = min(deadline, time.monotonic() + _GRACE_S)
        if time.monotonic() > deadline:
            running = [rank for rank, pid in enumerate(pids) if pid]
            _ask_where(pids)
            return problem or f"time-out: ranks {running} did not finish"
        time.sleep(_POLL_S)
    return problem


def _ask_where(pids: list[int]) -> None:
    """Let the ranks that still run write their stacks to their output."""
    for pid in filter(None, pids):
        os.kill(pid, signal.SIGUSR1)
    time.sleep(_STACKS_S)


def _kill(pids: list[int]) -> None:
    """Kill the ranks that still run, with their children, and collect them."""
    for rank, pid in enumerate(pids):
        if pid:
            os.kill(pid, signal.SIGKILL)
            _collect(pid)
            pids[rank] = 0


def _collect(pid: int) -> int:
    """Kill what a rank has started and left running, collect the rank, and return its exit code.

    In this order: until it is collected, no other process can get its number.
    """
    with contextlib.suppress(ProcessLookupError):  # it died before it made its group
        os.killpg(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _report(folder: Path, world_size: int, problem: str) -> str:
    """Return ``problem``, then the tracebacks, the oldest first, then the end of every rank's output."""
    errors = sorted(folder.glob("*.error"), key=lambda path: path.stat().st_mtime_ns)
    parts = [problem, *(f"--- rank {path.stem}\n{path.read_text()}" for path in errors)]
    for rank in range(world_size):
        log = folder / f"{rank}.log"
        text = log.read_text(errors="replace")[-_LOG_CHARS:] if log.exists() else ""
        if text.strip():
            parts.append(f"--- output of rank {rank}\n{text}")
    return "\n".join(parts)
