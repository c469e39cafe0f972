# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""What every check is made of: lines with a verdict, and a process of its own with a time-out."""

import contextlib
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

GIB = 1 << 30
_ABANDON_S = 1.0  # a killed process that is stuck in the kernel (a dead network filesystem) is left behind


@dataclass(frozen=True)
class Line:
    """One line of the report.

    Attributes:
        verdict: ok | warn (works, worse than it could) | fail (what needs it will not run).
        what: the thing looked at.
        found: what was found, on one line.
        fix: what to do about it; empty when ok.
    """

    verdict: str
    what: str
    found: str
    fix: str = ""


def ok(what: str, found: str) -> Line:
    return Line("ok", what, found)


def warn(what: str, found: str, fix: str) -> Line:
    return Line("warn", what, found, fix)


def fail(what: str, found: str, fix: str) -> Line:
    return Line("fail", what, found, fix)


@dataclass(frozen=True)
class Check:
    """A function that yields lines, the topic they stand under, and the name it goes by when it gives no answer."""

    topic: str
    name: str
    run: Callable[[], Iterator[Line]]


def examine(check: Check, limit_s: float) -> Iterator[Line]:
    """Run a check in a forked process and yield its lines.

    Whatever a broken installation does there (raise, crash, hang) ends as one more line, ``fail``.

    Args:
        check: its process must not need threads of this one.
        limit_s: seconds after which the process and what it started are killed.
    """
    sys.stdout.flush()
    with tempfile.TemporaryFile() as answers, tempfile.TemporaryFile() as said:
        pid = os.fork()
        if not pid:
            _be_examined(check, answers.fileno(), said.fileno())
        in_time = _ended(pid, limit_s)
        answers.seek(0)
        said.seek(0)
        found = [json.loads(line) for line in answers.read().splitlines()]
        last_words = last_line(said.read().decode(errors="replace")) or "without a word: a crash, or out of memory"
    yield from (Line(**line) for line in found if line)
    if not in_time:
        fix = "it hangs or is slow here: --limit gives it more seconds"
        yield fail(check.name, f"no answer within {limit_s:g} s", fix)
    elif None not in found:
        fix = "reinstall the package that this check is about"
        yield fail(check.name, f"its process died ({last_words})", fix)


def _be_examined(check: Check, answers: int, said: int) -> None:
    """The forked process of a check; does not return."""
    try:
        os.setpgid(0, 0)  # what it starts can be killed with it
        os.dup2(said, 1)
        os.dup2(said, 2)
        for line in _lines(check):
            os.write(answers, (json.dumps(line and asdict(line)) + "\n").encode())
    finally:
        os._exit(0)


def _lines(check: Check) -> Iterator[Line | None]:
    """The lines of a check, one more if it raises, and None for the end."""
    try:
        yield from check.run()
    except Exception as error:
        traceback.print_exc()
        yield fail(check.name, one_line(error), "the check itself stopped: see the package or path it names")
    yield None


def _ended(pid: int, limit_s: float) -> bool:
    """Wait for a process, kill it and what it started, and tell whether it ended by itself."""
    deadline = time.monotonic() + limit_s
    while not (ended := os.waitpid(pid, os.WNOHANG)[0]) and time.monotonic() < deadline:
        time.sleep(0.005)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    deadline = time.monotonic() + _ABANDON_S
    while not (ended or os.waitpid(pid, os.WNOHANG)[0]) and time.monotonic() < deadline:
        time.sleep(0.005)
    return bool(ended)


def answer_of(*command: str, limit_s: float = 8.0) -> str:
    """What a program prints.

    Raises:
        OSError: with its last line, when it fails, is missing, or takes longer than ``limit_s`` seconds.
    """
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=limit_s, errors="replace"
        )
    except subprocess.TimeoutExpired as late:
        said = last_line((late.stderr or b"").decode(errors="replace"))  # bytes, also in text mode
        raise OSError(f"{command[0]} gave no answer within {limit_s:g} s" + (f": {said}" if said else "")) from None
    if done.returncode:
        raise OSError(last_line(done.stderr or done.stdout) or f"{command[0]} ended with status {done.returncode}")
    return done.stdout


def one_line(error: BaseException) -> str:
    """An exception as one line: its kind and the first line of what it says."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (f": {error.filename}" if error.filename else "")
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0]}"


def last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1].strip()


def version_of(distribution: str) -> str | None:
    """The installed version of a distribution, None if there is none; its code is not imported."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
