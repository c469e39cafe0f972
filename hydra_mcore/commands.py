# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""What every command does at its edges: one line for bad input and Ctrl-C, and one writer at a time.

It imports nothing heavy, so commands import it first.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from hydra_mcore.errors import InputError, MachineError
from hydra_mcore.files import disk_problem, disk_refusal, named

INTERRUPTED = 130  # a shell's status for Ctrl-C: 128 + SIGINT
_HELD = frozenset({errno.EACCES, errno.EAGAIN})
_NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL})
_POLL_S = 0.2
_PR_SET_PDEATHSIG = 1  # of Linux's prctl()


@contextlib.contextmanager
def one_line_errors(command: str) -> Iterator[None]:
    """Turn bad input and a disk that refuses into one line on stderr and exit status 2, Ctrl-C into one and 130.

    Other errors keep their traceback. Of several ranks that see the same bad input, the first one says it; what is
    wrong with a machine, its own first one. It decorates a command's ``main``, so that it holds for the seconds of
    imports too. Whatever a Ctrl-C ends in counts as one (an import or a network that it broke raise errors of their
    own); a second one ends the process at once.
    """
    first_rank = int(os.environ.get("RANK", "0")) == 0
    with _noticing_ctrl_c() as pressed:
        try:
            yield
        except BaseException as error:
            line = None
            if pressed or isinstance(error, KeyboardInterrupt):
                line, status = "stopped by Ctrl-C", INTERRUPTED
            elif isinstance(error, InputError):
                line, status = str(error), 2
                if isinstance(error, MachineError):
                    first_rank = first_of_machine()
            elif not isinstance(error, SystemExit) and (refusal := disk_refusal(error)):
                line, status, first_rank = disk_problem(refusal), 2, True
            if line is None:
                raise
            if first_rank:
                print(f"{command}: {_one_line(line)}", file=sys.stderr)
            sys.exit(status)


def check_inputs(**paths: str | Path | Iterable[str | Path] | None) -> None:
    """Refuse a file or folder that is missing at once: before the imports, which take seconds.

    Args:
        paths: by the name of a flag, what the command is to read; None where the flag was not given.

    Raises:
        InputError: the first one that is missing, or cannot be looked at.
    """
    for name, given in paths.items():
        for path in [given] if isinstance(given, str | Path) else given or ():
            try:
                os.stat(path)
            except OSError as error:
                what = name.replace("_", " ")
                raise InputError(f"{what} {path}: {error.strerror}; correct the path, or make it first") from None


def first_of_machine() -> bool:
    """Tell whether this process speaks for the machine that it runs on."""
    return int(os.environ.get("LOCAL_RANK", "0")) == 0


def _one_line(text: str) -> str:
    """The text with what a name of a file may hold, but no line, as escapes: newlines, control characters, no UTF-8."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


@contextlib.contextmanager
def _noticing_ctrl_c() -> Iterator[list[int]]:
    """The list fills with the Ctrl-Cs that come: the first one raises KeyboardInterrupt, the second ends the
    process.
    """
    pressed: list[int] = []

    def press(number: int, _frame: object) -> None:
        pressed.append(number)
        if len(pressed) > 1:
            os._exit(INTERRUPTED)
        raise KeyboardInterrupt

    ours = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    if ours:  # not where somebody else answers it, or nobody (a job in a script's background)
        signal.signal(signal.SIGINT, press)
    try:
        yield pressed
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def deaf_children() -> Iterator[None]:
    """Processes that are started meanwhile never see a Ctrl-C, which a terminal sends to all of them: their parent
    answers it, and not before the end, as a process that is started halfway would show a traceback.
    """
    from multiprocessing import resource_tracker

    resource_tracker.ensure_running()  # it would lift the mask when it starts
    came: list[tuple[int, Any]] = []
    handler = signal.getsignal(signal.SIGINT)
    waits = callable(handler) and threading.current_thread() is threading.main_thread()
    if waits:  # beside the mask, which is this thread's: any other one may take the signal for the process
        signal.signal(signal.SIGINT, lambda *press: came.append(press))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        if waits:
            signal.signal(signal.SIGINT, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if came:
            handler(*came[0])


@contextlib.contextmanager
def sole_writer(path: str | Path, wait_s: float = 0.0) -> Iterator[None]:
    """While open, nobody else who asks writes to ``path``: this process holds the lock of the file ``PATH.lock``.

    The kernel ends the lock with the process, however that ends; an orderly end removes the file too. It is a POSIX
    lock: no child inherits it, so a data loader that outlives a killed trainer for seconds does not hold it, and NFS
    (with its lock service) and Lustre (mounted with ``flock``) know it on all nodes. Where a file system refuses locks,
    a line says so and
    the command goes on: it is as safe as without.

    Args:
        wait_s: seconds to wait, with a line, for somebody who may be ending.

    Raises:
        InputError: somebody else holds it; the line says who.
        OSError: the folder cannot be written.
    """
    place = Path(f"{path}.lock")
    place.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + wait_s
    waiting = False
    while (file := _locked(place)) is None:
        holder = _holder(place)
        if time.monotonic() >= deadline:
            raise InputError(f"{path}: is being written by {holder}; wait for its end, or stop it")
        if not waiting:
            print(
                f"{path}: is being written by {holder}; waiting up to {wait_s:g} seconds for its end",
                file=sys.stderr,
                flush=True,
            )
        waiting = True
        time.sleep(_POLL_S)
    with file:
        try:
            with named(place):
                file.truncate(0)
                file.write(_this_process().encode() + b"\n")
            yield
        finally:
            place.unlink(missing_ok=True)


def _locked(place: Path) -> BinaryIO | None:
    """The lock's file, locked; None while somebody else has it."""
    while True:
        file = place.open("ab", buffering=0)  # nothing is left to be written, and to fail, when it is closed
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _HELD:
                file.close()
                return None
            if error.errno not in _NO_LOCKS:
                raise
            line = (
                f"{place}: this file system knows no locks ({error.strerror}), so nothing stops a second writer; see"
                " tools/doctor.py"
            )
            print(line, file=sys.stderr, flush=True)
            return file
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), place.stat()):
                return file
        file.close()  # its holder removed it between our two calls


def _this_process() -> str:
    job = f", SLURM job {os.environ['SLURM_JOB_ID']}" if "SLURM_JOB_ID" in os.environ else ""
    return f"process {os.getpid()} on {socket.gethostname()}{job}, since {time.strftime('%F %T %Z')}"


def _holder(place: Path) -> str:
    with contextlib.suppress(OSError, ValueError):
        if said := place.read_text()[:200].strip():
            return said
    return "another process"


def python_command(words: Iterable[object], ranks: int = 1) -> list[str]:
    """Python with these arguments, on as many ranks."""
    launcher = ("-m", "hydra_mcore.torchrun", "--standalone", "--nproc-per-node", str(ranks)) if ranks > 1 else ()
    return [sys.executable, *launcher, *map(str, words)]


def end_with_parent(by: int = signal.SIGTERM) -> None:
    """First thing in a process that this one starts: it gets this signal when this process ends, even by SIGKILL.

    By SIGTERM a stage of training saves and ends. Left alone, it would train on and hold its folder.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, by)
