# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Damaged files: what bad disks, editors, other programs and attackers make of a valid one, and what a reader may say
to them.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import random
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hydra_mcore.errors import InputError
from hydra_mcore.files import disk_refusal

DEEP, LONE = "@deep@", "@lone@"  # stand for what json.dumps does not write
ODD = (
    *(None, True, False, "x", "", [], {}, [[1]], {"x": 1}, 0, -1, 1.5, 1e15, 1e19, 10**400),
    *(float("nan"), float("inf"), -float("inf"), DEEP, LONE, "a" * 200_000, "\0", "../../x", "$\\frac{$", "a\n<b>"),
)
MEMORY = 1 << 30  # bytes beyond what the process has: no damaged file may make a reader want more


def as_text(value: Any) -> str:
    nested = "[" * 10_000 + "]" * 10_000
    return json.dumps(value).replace(json.dumps(DEEP), nested).replace(json.dumps(LONE), '"\\ud800"')


def damaged_values(value: Any) -> Iterator[Any]:
    """A JSON value with one thing wrong: a key dropped or added, a value replaced by each odd one, an item doubled or
    left out.
    """
    for path in _paths(value):
        for odd in ODD:
            yield _with(value, path, odd)
        here = _at(value, path)
        if isinstance(here, dict):
            yield _with(value, path, here | {"unknown": 1})
            for key in here:
                yield _with(value, path, {name: item for name, item in here.items() if name != key})
        if isinstance(here, list) and here:
            yield _with(value, path, here[:-1])
            yield _with(value, path, [*here, here[-1]])


def damaged_bytes(content: bytes, seed: int = 0, count: int = 40) -> Iterator[bytes]:
    """A file's bytes cut off, with flipped bits, with a stretch of zeros or of something else; and what is no such file
    at all.
    """
    rng = random.Random(seed)
    yield from (b"", b"\0" * len(content), b"\xff\xfe\x00", b"[" * 100_000, content + content, b"\n" + content)
    for _ in range(count):
        at = rng.randrange(len(content))
        yield content[:at]
        yield content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]
        yield content[:at] + b"\0" * min(16, len(content) - at) + content[at + 16 :]
        yield content[:at] + rng.randbytes(8) + content[at + 8 :]


def damaged_texts(content: str, sample: int | None = None, seed: int = 0) -> list[bytes]:
    """All damaged forms of a JSON file, or a sample of them, the same for the same seed."""
    values = (as_text(value).encode() for value in damaged_values(json.loads(content)))
    every = list(itertools.chain(values, damaged_bytes(content.encode(), seed)))
    return every if sample is None or sample >= len(every) else random.Random(seed).sample(every, sample)


def survey(path: Path, contents: list[bytes], use: Callable[[], Any]) -> list[str]:
    """Put each content in a file's place, then a folder and nothing, and use it. What was wrong with the outcome, if
    anything.

    A use ends well, or in one InputError of one short line, or with what the disk says; memory is bounded. At the end
    the file is what it was.
    """
    valid, problems = path.read_bytes(), []
    for content in contents:
        path.write_bytes(content)
        if problem := outcome(use):
            problems.append(f"{problem} <- {content[:300]!r}")
    for what, make in (("no file", lambda: None), ("a folder", path.mkdir)):
        path.unlink(missing_ok=True)
        make()
        if problem := outcome(use):
            problems.append(f"{problem} <- {what}")
    if path.is_dir():
        shutil.rmtree(path)
    path.write_bytes(valid)
    return problems


def outcome(use: Callable[[], Any]) -> str:
    """What is wrong with how a use ends; empty where nothing is."""
    try:
        with bounded_memory():
            use()
    except InputError as error:
        said = str(error)
        if "\n" in said or len(said) >= 400 or not said.isprintable():
            return f"not one short line: {said[:500]!r}"
        said.encode()
    except OSError as error:
        return "" if disk_refusal(error) else f"{type(error).__name__}: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    return ""


@contextlib.contextmanager
def bounded_memory(more: int = MEMORY) -> Iterator[None]:
    """Who asks for more than this beyond what the process has gets a MemoryError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON value; of a list the first and the last item."""
    yield path
    if isinstance(value, dict):
        for key in value:
            yield from _paths(value[key], (*path, key))
    elif isinstance(value, list):
        for index in sorted({0, len(value) - 1} if value else ()):
            yield from _paths(value[index], (*path, index))


def _at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def _with(value: Any, path: tuple[Any, ...], odd: Any) -> Any:
    if not path:
        return odd
    changed = copy.deepcopy(value)
    _at(changed, path[:-1])[path[-1]] = odd
    return changed
