# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Small files: read with one-line errors, written whole or not at all. Values in them: checked against a dataclass."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import re
import shutil
import types
import typing
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from hydra_mcore.errors import InputError

NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})  # a full disk, a quota, a limit on files
_NOT_OURS = {errno.EROFS, errno.EACCES, errno.EPERM}
_WRONG_KIND = {errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY}
_GONE = {errno.ENOENT, errno.ESTALE}
_FIXES = {
    **dict.fromkeys(NO_ROOM, "make room"),
    **dict.fromkeys(_NOT_OURS, "check its permissions, or choose another folder"),
    **dict.fromkeys(
        _WRONG_KIND, "a file stands where a folder is needed, or a folder where a file is: choose another name"
    ),
    **dict.fromkeys(_GONE, "was it removed? give the command again"),
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "correct the links in its path",
    errno.EIO: "check the disk",
}
LARGEST_INT = 2**53  # what every JSON reader keeps exact; no size of a model, no count of tokens comes near it
DEEPEST = 50  # lists and objects inside each other where anything may stand: what is written and compared calls itself
LONGEST_NAME = 200  # characters of a name that consoles, tables and figures show


def read_json(path: str | Path, error: type[InputError] = InputError, what: str = "") -> Any:
    """What a JSON file holds.

    Args:
        error: the class to raise.
        what: what the file is to the user, as the error names it ("head map").

    Raises:
        InputError: of class ``error``: no such file, not UTF-8, not JSON, nested too deeply, half of a surrogate pair
            (which nothing could print or write again), a number of thousands of digits.
    """
    name = f"{what} {path}".lstrip()
    try:
        return parse_json(Path(path).read_bytes(), name, error)
    except OSError as problem:
        raise error(f"{name}: {problem.strerror}") from None


def parse_json(text: str | bytes, name: str, error: type[InputError] = InputError) -> Any:
    """The value of a JSON text that errors call ``name``; raises as ``read_json`` does."""
    try:
        text = text if isinstance(text, str) else text.decode("utf-8")
        value = json.loads(text)
        if "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        return value
    except RecursionError:
        raise error(f"{name}: not JSON that can be read (nested too deeply)") from None
    except UnicodeEncodeError:
        raise error(f"{name}: not JSON that can be written again (half of a surrogate pair)") from None
    except ValueError as problem:
        raise error(f"{name}: not JSON ({problem})") from None


def write_json(path: str | Path, value: Any, indent: int | None = 1) -> None:
    """Write a JSON file, whole or not at all. A kill leaves at most ``NAME.partial``."""
    with replacing(path, alone=True) as beside:
        beside.write_text(json.dumps(value, indent=indent) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all; others may write it at the same time."""
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")


def disk_problem(error: OSError) -> str:
    """One line for a write or a read that the disk refused."""
    return f"{error.filename or 'a file'}: {error.strerror}; {_FIXES[error.errno]}"


def disk_refusal(error: BaseException) -> OSError | None:
    """What the disk said, where an error comes from a disk that refuses; None where it does not.

    Libraries wrap it: as a cause, in the failures of a torch checkpoint, in words where they are written in Rust.
    """
    if isinstance(error, OSError) and error.errno in _FIXES:
        return error
    for said in re.findall(r"\b(?:os error|Errno) (\d+)", str(error)):
        if (number := int(said)) in NO_ROOM | _NOT_OURS:
            where = error.args[0][0][1] if isinstance(error, shutil.Error) else None
            return OSError(number, os.strerror(number), where)
    failures = [failure for failure, _ in getattr(error, "failures", {}).values()]
    causes = [
        error.__cause__,
        error.__context__ if isinstance(error.__context__, OSError) and error.__context__.errno in NO_ROOM else None,
    ]
    return next((refusal for cause in (*failures, *causes) if cause and (refusal := disk_refusal(cause))), None)


@contextlib.contextmanager
def named(path: Path) -> Iterator[None]:
    """Give what the disk says of a write that file's name: the system names it only where a file cannot be opened."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:  # one that a library made of words is shown as those words
            error.filename = error.filename or str(path)
        raise


def check_writable(folder: str | Path, what: str, error: type[InputError] = InputError) -> None:
    """Refuse a folder that nobody could write to, or make; nothing is written to find out.

    Raises:
        InputError: of class ``error``, naming the folder, what it is (``what``) and what stands in the way.
    """
    path, problem = Path(folder), ""
    try:
        there = next(part for part in (path.absolute(), *path.absolute().parents) if part.exists() or part.is_symlink())
        if not there.is_dir():
            problem = f"{there} is {'a link to nothing' if there.is_symlink() and not there.exists() else 'no folder'}"
        elif not os.access(there, os.W_OK | os.X_OK, effective_ids=True):
            problem = f"{there} cannot be written"
    except OSError as found:  # a name that is too long, a folder on the way that may not be searched
        problem = found.strerror or str(found)
    if problem:
        raise error(f"{what} {path}: {problem}; change its permissions, or choose another folder")


@contextlib.contextmanager
def replacing(path: str | Path, alone: bool = False) -> Iterator[Path]:
    """A name beside a file to write to, renamed onto it at the end: whoever reads the file sees the old or the new one.

    Args:
        alone: nobody else writes this file now, so that the name is always the same and what kills leave does not pile
            up; else every writer has a name of its own.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.partial" if alone else f"{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        with named(path):
            yield beside
            beside.replace(path)
    finally:
        with contextlib.suppress(OSError):  # a disk that refuses this too has said so already
            beside.unlink(missing_ok=True)


def from_fields[T](cls: type[T], raw: Any, name: str, error: type[InputError] = InputError) -> T:
    """A dataclass of the values in a JSON object, each of the type that its field says.

    ``true`` is no number, a whole number is a float too, no number may be NaN, infinite or beyond 2**53. Lists become
    tuples where the field is a tuple, texts paths, objects dataclasses. What else holds of a value is for the dataclass
    itself (``__post_init__``).

    Args:
        name: what errors call the object.

    Raises:
        InputError: of class ``error``: not an object, a key that is missing or unknown, a value of another type, or one
            that the dataclass refuses with a ValueError.
    """
    if not isinstance(raw, dict):
        raise error(f"{name}: a list of keys and values is expected, not {shown(raw)}")
    hints, fields = typing.get_type_hints(cls), {field.name: field for field in dataclasses.fields(cls) if field.init}
    if unknown := [key for key in raw if key not in fields]:
        raise error(f"{name}: unknown key {shown(unknown[0])}; written by another version?")
    for key, field in fields.items():
        if key not in raw and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise error(f"{name}: key {key!r} is missing")
    values = {key: checked(value, hints[key], f"{name}: {key}", error) for key, value in raw.items()}
    try:
        return cls(**values)
    except ValueError as problem:
        raise error(f"{name}: {problem}") from None


def checked(value: Any, hint: Any, name: str, error: type[InputError] = InputError) -> Any:
    """A value from a file as what a type hint asks for; raises ``error`` where it is something else (see
    ``from_fields``).
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        if _deeper(value, DEEPEST):
            raise error(f"{name}: lists are nested too deeply")
        return value
    if dataclasses.is_dataclass(hint):
        return from_fields(hint, value, name, error)
    if hint is Path and isinstance(value, str) and "\0" not in value:
        return Path(value)
    if origin in (typing.Union, types.UnionType):
        return _one_of(value, args, name, error)
    if origin is Literal:
        if value in args and any(type(value) is type(choice) for choice in args):
            return value
        raise error(f"{name} is {shown(value)}; choose one of {', '.join(map(repr, args))}")
    if origin in (list, tuple) and isinstance(value, list | tuple):
        if origin is tuple and args[-1] is not Ellipsis and len(value) != len(args):
            raise error(f"{name} has {len(value)} values instead of {len(args)}")
        kinds = [args[0]] * len(value) if origin is list or args[-1] is Ellipsis else args
        return origin(
            checked(item, kind, f"{name}[{index}]", error)
            for index, (item, kind) in enumerate(zip(value, kinds, strict=True))
        )
    if origin is dict and isinstance(value, dict):
        return {key: checked(item, args[1], f"{name}[{shown(key)}]", error) for key, item in value.items()}
    if hint in (int, float) and isinstance(value, int | float) and not isinstance(value, bool):
        if not abs(value) <= LARGEST_INT or (hint is int and value != int(value)):  # so written, NaN is refused too
            raise error(
                f"{name} is {shown(value)}, which is no {'whole number' if hint is int else 'number'} that can be used"
                " here"
            )
        return hint(value)
    if hint in (bool, str, types.NoneType) and isinstance(value, hint):
        return value
    raise error(f"{name} is {shown(value)}; expected {_KINDS.get(origin or hint, hint)}")


def _one_of(value: Any, hints: tuple[Any, ...], name: str, error: type[InputError]) -> Any:
    """The value, checked against several types. If none fits, the error is that of the last type that is not None."""
    problem = error(f"{name} is {shown(value)}")
    for hint in sorted(hints, key=lambda hint: hint is not types.NoneType):
        try:
            return checked(value, hint, name, error)
        except error as found:
            problem = found
    raise problem


def _deeper(value: Any, levels: int) -> bool:
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels == 0 or any(_deeper(item, levels - 1) for item in items)


def shown(value: Any) -> str:
    """A value from a file as an error shows it: in a few characters, whatever it is."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def is_name(text: str) -> bool:
    """Whether a text is one short line, as what tables and figures show must be."""
    return len(text) <= LONGEST_NAME and text.isprintable()


_KINDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    list: "a list",
    tuple: "a list",
    dict: "keys and values",
    Path: "a path",
    types.NoneType: "null",
}
