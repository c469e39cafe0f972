# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""What every check of tools/doctor.py is made of: lines with a verdict, and a process of its own with a time-out.

Only the standard library, and nothing newer than Python 3.8: the doctor must speak where the installation is broken.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

GIB = 1 << 30
_ABANDON_S = 1.0  # a killed process that is stuck in the kernel (a dead network filesystem) is left behind


@dataclass(frozen=True)
class Line:
    """One line of the report.

    Attributes:
        verdict: ok | warn (works, worse than it could) | fail (what needs it will not run).
        what: the thing looked at.
        found: what was found, on one line.
        mend: what to do about it; empty when ok.
    """

    verdict: str
    what: str
    found: str
    mend: str = ""


def ok(what: str, found: str) -> Line:
    return Line("ok", what, found)


def warn(what: str, found: str, mend: str) -> Line:
    return Line("warn", what, found, mend)


def fail(what: str, found: str, mend: str) -> Line:
    return Line("fail", what, found, mend)


@dataclass(frozen=True)
class Check:
    """A function that yields lines, the topic they stand under, and the name it goes by when it gives no answer."""

    topic: str
    name: str
    run: Callable[[], Iterator[Line]]


def examine(check: Check, limit_s: float) -> Iterator[Line]:
    """Run a check in a forked process and yield its lines as they come.

    Whatever a broken installation does there (raise, crash, hang) ends as one more line, ``fail``.

    Args:
        check: its process must not need threads of this one.
        limit_s: seconds after which the process and what it started are killed.
    """
    reader, writer = os.pipe()
    sys.stdout.flush()
    with tempfile.TemporaryFile() as said:
        pid = os.fork()
        if not pid:
            os.close(reader)
            _be_examined(check, writer, said.fileno())
        os.close(writer)
        deadline, buffered, done = time.monotonic() + limit_s, b"", False
        try:
            while not done:
                if not select.select([reader], [], [], max(0.0, deadline - time.monotonic()))[0]:
                    yield fail(
                        check.name,
                        f"no answer within {limit_s:g} s",
                        "it hangs or is slow here: --limit gives it more seconds",
                    )
                    return
                part = os.read(reader, 1 << 16)
                *complete, buffered = (buffered + part).split(b"\n")
                for text in complete:
                    answer = json.loads(text)
                    done = answer is None
                    if not done:
                        yield Line(**answer)
                if not part:
                    said.seek(0)
                    last_words = (
                        last_line(said.read().decode(errors="replace")) or "without a word: a crash, or out of memory"
                    )
                    yield fail(
                        check.name, f"its process died ({last_words})", "reinstall the package that this check is about"
                    )
                    return
        finally:
            os.close(reader)
            _end(pid)


def _be_examined(check: Check, writer: int, said: int) -> None:
    """The forked process of a check; does not return."""
    try:
        os.setsid()  # what it starts can be killed with it
        os.dup2(said, 1)
        os.dup2(said, 2)
        for line in _lines(check):
            os.write(writer, (json.dumps(line and asdict(line)) + "\n").encode())
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


def _end(pid: int) -> None:
    """Kill the process and what it started, and collect it, unless it cannot die."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:  # it has no group of its own yet
        os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + _ABANDON_S
    while not os.waitpid(pid, os.WNOHANG)[0] and time.monotonic() < deadline:
        time.sleep(0.005)


def answer_of(*command: str, limit_s: float = 8.0) -> str:
    """What a program prints; raises OSError with its last line when it fails, is missing, or takes longer than
    ``limit_s`` seconds.
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


def release(version: str) -> tuple[int, ...]:
    """The leading numbers of a version, without zeros at the end.

    Pre-releases count as the release itself: containers ship builds such as 2.9.0a0+nv25.10 that are good for
    ``>=2.9``.
    """
    match = re.match(r"\d+(\.\d+)*", version)
    numbers = [int(part) for part in match.group().split(".")] if match else []
    while numbers and not numbers[-1]:
        numbers.pop()
    return tuple(numbers)


def allows(specifier: str, version: str) -> bool:
    """Tell whether a version is in a range such as ``>=4.0,<6`` or ``~=3.9.0`` (packaging, which knows all of it, may
    be missing).
    """
    found = release(version)
    for part in filter(None, re.split(r"[,\s]+", re.sub(r"([<>=!~])\s+", r"\1", specifier))):
        operator, bound = re.match(r"([<>=!~]*)(.*)", part).groups()
        limit, width = release(bound), bound.count(".")
        fits: dict[str, Any] = {
            "==": version.split("+")[0] == bound.split("+")[0],
            "!=": found != limit,
            ">=": found >= limit,
            "<=": found <= limit,
            ">": found > limit,
            "<": found < limit,
            "~=": found >= limit and (found + (0,) * width)[:width] == (limit + (0,) * width)[:width],
        }
        if not fits[operator]:
            return False
    return True
