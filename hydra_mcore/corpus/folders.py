# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The files that a path, a folder or a glob stands for, and how many others were left out.

Links are followed, but a file counts once, whatever leads to it, and a link that leads back up is none of a folder's
own. Hidden files and folders inside a folder are left out; a hidden folder that is named itself is read.
"""

from __future__ import annotations

import fnmatch
import glob
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hydra_mcore.errors import InputError

PACKING = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
PACKED = ("", *PACKING)
TEXT, PARQUET = (".txt",), (".parquet",)
LINES = tuple(f".jsonl{packed}" for packed in PACKED)
SUFFIXES = TEXT + LINES + PARQUET
NAMED_LINES = tuple(
    f".json{packed}" for packed in PACKED
)  # a folder has other things than JSON Lines under this ending
HIDDEN, AGAIN, NO_FILE, TO_NOWHERE, BACK = (
    "hidden",
    "linked twice",
    "pipes or devices",
    "links to nowhere",
    "links that lead back up",
)
MOST_KINDS = 8  # that are said one by one


@dataclass
class Found:
    """Files in the order in which they are read, and how many of which kind were left out."""

    paths: list[Path] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)


def is_kind(path: Path, suffixes: tuple[str, ...]) -> bool:
    """Whether a name has one of the endings, in capitals or not."""
    return path.name.lower().endswith(suffixes)


def printable(path: Path) -> str:
    """A path as text that can be written anywhere: bytes that are not UTF-8 become escapes."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def find_files(inputs: Sequence[str]) -> Found:
    """The files that paths, folders and globs stand for; the order of these is kept, what each stands for is sorted.

    Raises:
        InputError: nothing found, a file that two of them stand for, a kind of file that is not known or cannot be read
            twice, a folder that cannot be listed.
    """
    found, known = Found(), {}
    for given in inputs:
        for path in _found(given, found.left_out):
            if (other := known.setdefault(os.path.realpath(path), path)) is not path:
                also = "" if other == path else f", once as {path}"
                raise InputError(f"--input names {other} twice{also}; its documents would be doubled")
            found.paths.append(path)
    return found


def listed(left_out: Counter[str]) -> str:
    """How many of which kind, the most frequent first; nothing where there is none."""
    counts = sorted(left_out.items(), key=lambda item: (-item[1], item[0]))
    words = [f"{kind} ({number})" for kind, number in counts[:MOST_KINDS]]
    if more := sum(number for _, number in counts[MOST_KINDS:]):
        words.append(f"other kinds ({more})")
    return ", ".join(words)


def files_below(folder: Path, left_out: Counter[str]) -> list[Path]:
    """All files of a folder at any depth, sorted. A file that a link leads to as well keeps its own name.

    Raises:
        InputError: a folder that cannot be listed.
    """
    own: list[Path] = []
    linked: list[Path] = []
    entered: set[str] = set()
    folders = [folder]
    for top in folders:  # grows by the links to folders
        for here, names, files in os.walk(top, onerror=_cannot_list):
            if (real := os.path.realpath(here)) in entered:
                names.clear()
                continue
            entered.add(real)
            left_out.update(HIDDEN for name in (*names, *files) if name.startswith("."))
            names[:] = sorted(name for name in names if not name.startswith("."))
            for link in (path for name in names if (path := Path(here, name)).is_symlink()):
                if Path(real).is_relative_to(os.path.realpath(link)):
                    left_out[BACK] += 1
                else:
                    folders.append(link)
            for path in (Path(here, name) for name in files if not name.startswith(".")):
                if path.is_file():
                    (linked if path.is_symlink() or top is not folder else own).append(path)
                else:
                    left_out[TO_NOWHERE if path.is_symlink() else NO_FILE] += 1
    return sorted(_once(own + sorted(linked), left_out))


def _found(given: str, left_out: Counter[str]) -> list[Path]:
    """What one input stands for."""
    here: Counter[str] = Counter()
    matches = [Path(given)] if given and os.path.lexists(given) else _matches(given)
    expanded: list[Path] = []
    for match in matches:
        expanded += _expanded(match, here)
    paths = _once(expanded, here)
    if not paths:
        others = f" (left out: {listed(here)})" if here else ""
        raise InputError(
            f"{given or 'an empty name'}: no data files{others}; give {', '.join(SUFFIXES)} files, globs or folders"
        )
    left_out.update(here)
    return paths


def _expanded(path: Path, left_out: Counter[str]) -> list[Path]:
    """The files of a folder that have a known ending, or the one file that is named."""
    if path.is_dir():
        files = files_below(path, left_out)
        left_out.update(_ending(file) for file in files if not is_kind(file, SUFFIXES))
        return [file for file in files if is_kind(file, SUFFIXES)]
    if not path.exists():
        raise InputError(f"{path}: a link to nowhere; remove it, or put its file back")
    if not is_kind(path, SUFFIXES + NAMED_LINES):
        raise InputError(
            f"{path}: not a kind of file that is read; give {', '.join(SUFFIXES)}, or a folder with such files"
        )
    if not path.is_file():
        raise InputError(f"{path}: a pipe or device, which cannot be read again; write it to a file")
    return [path]


def _matches(pattern: str) -> list[Path]:
    """What a glob matches, sorted. ``**`` goes through folders as ``files_below`` does; at its end it stands for the
    folders.
    """
    parts = Path(pattern).parts
    if "**" not in parts:
        return [Path(match) for match in sorted(glob.glob(pattern))]
    start = parts.index("**")
    tops = [Path(match) for match in sorted(glob.glob(str(Path(*parts[:start]))))]
    if start == len(parts) - 1:
        return tops
    found: list[Path] = []
    for top in filter(Path.is_dir, tops):
        below = files_below(top, Counter())
        found += [path for path in below if _fits(path.relative_to(top).parts, parts[start:])]
    return sorted(found, key=str)


def _fits(names: Sequence[str], parts: Sequence[str]) -> bool:
    if not parts or not names:
        return not parts and not names
    if parts[0] == "**":
        return _fits(names, parts[1:]) or _fits(names[1:], parts)
    return fnmatch.fnmatchcase(names[0], parts[0]) and _fits(names[1:], parts[1:])


def _once(paths: Iterable[Path], left_out: Counter[str]) -> list[Path]:
    """The paths, each file once: a path to a file that an earlier path names is left out and counted."""
    once: dict[str, Path] = {}
    for path in paths:
        if once.setdefault(os.path.realpath(path), path) is not path:
            left_out[AGAIN] += 1
    return list(once.values())


def _ending(path: Path) -> str:
    """.md, .tar.gz, or in words that there is none."""
    *_, before, last = ("", "", *(ending.lower() for ending in Path(printable(path)).suffixes))
    return (before if last in PACKED else "") + last or "without an ending"


def _cannot_list(error: OSError) -> None:
    raise InputError(
        f"{error.filename}: cannot be listed ({error.strerror}); make it readable, or leave it out"
    ) from None
