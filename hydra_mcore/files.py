# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Small files: read with one-line errors, written whole or not at all. Values in them: checked against a dataclass."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import types
import typing
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from hydra_mcore.errors import InputError

NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})  # a full disk, a quota, a limit on files
DISK_REFUSES = NO_ROOM | {errno.EROFS, errno.EACCES, errno.EPERM}  # or a disk or folder that is not ours to write
LARGEST_INT = 2**53  # what every JSON reader keeps exact; no size of a model, no count of tokens comes near it
DEEPEST = 50  # lists and objects inside each other where anything may stand: what is written and compared calls itself


def read_json(path: str | Path, error: type[InputError] = InputError, what: str = "") -> Any:
    """What a JSON file holds.

    Args:
        error: the class to raise.
        what: what the file is to the user, as the error names it ("head map").

    Raises:
        InputError: of class ``error``: no such file, not UTF-8, not JSON, nested too deeply, half of a surrogate pair (which
            nothing could print or write again), a number of thousands of digits.
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
    """Write a JSON file atomically: beside the target, then rename. A kill leaves at most ``NAME.partial``."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(target.name + ".partial")
    try:
        beside.write_text(json.dumps(value, indent=indent) + "\n")
        beside.replace(target)
    finally:
        beside.unlink(missing_ok=True)


def disk_problem(error: OSError) -> str:
    """One line for a write or a read that the disk refused."""
    fix = "make room" if error.errno in NO_ROOM else "check its permissions, or choose another folder"
    return f"{error.filename or 'a file'}: {error.strerror}; {fix}"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside a file to write to, renamed onto it at the end; every writer has a name of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        yield beside
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def from_fields[T](cls: type[T], raw: Any, name: str, error: type[InputError] = InputError) -> T:
    """A dataclass of the values in a JSON object, each of the type that its field says.

    ``true`` is no number, a whole number is a float too, no number may be NaN, infinite or beyond 2**53. Lists become tuples where
    the field is a tuple. What else holds of a value is for the dataclass itself (``__post_init__``).

    Args:
        name: what errors call the object.

    Raises:
        InputError: of class ``error``: not an object, a key that is missing or unknown, a value of another type.
    """
    if not isinstance(raw, dict):
        raise error(f"{name}: a list of keys and values is expected, not {shown(raw)}")
    hints, fields = typing.get_type_hints(cls), {field.name: field for field in dataclasses.fields(cls) if field.init}
    if unknown := [key for key in raw if key not in fields]:
        raise error(f"{name}: unknown key {shown(unknown[0])}; written by another version?")
    for key, field in fields.items():
        if key not in raw and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise error(f"{name}: key {key!r} is missing")
    return cls(**{key: checked(value, hints[key], f"{name}: {key}", error) for key, value in raw.items()})


def checked(value: Any, hint: Any, name: str, error: type[InputError] = InputError) -> Any:
    """A value from a file as what a type hint asks for; raises ``error`` where it is something else (see ``from_fields``)."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        if _deeper(value, DEEPEST):
            raise error(f"{name}: lists are nested too deeply")
        return value
    if origin in (typing.Union, types.UnionType):
        return _one_of(value, args, name, error)
    if origin is Literal:
        if value in args and any(type(value) is type(choice) for choice in args):
            return value
        raise error(f"{name} is {shown(value)}; choose one of {', '.join(map(repr, args))}")
    if origin in (list, tuple) and isinstance(value, list):
        if origin is tuple and args[-1] is not Ellipsis and len(value) != len(args):
            raise error(f"{name} has {len(value)} values instead of {len(args)}")
        kinds = [args[0]] * len(value) if origin is list or args[-1] is Ellipsis else args
        return origin(checked(item, kind, f"{name}[{index}]", error) for index, (item, kind) in enumerate(zip(value, kinds, strict=True)))
    if origin is dict and isinstance(value, dict):
        return {key: checked(item, args[1], f"{name}[{shown(key)}]", error) for key, item in value.items()}
    if hint in (int, float) and isinstance(value, int | float) and not isinstance(value, bool):
        if not abs(value) <= LARGEST_INT or (hint is int and value != int(value)):  # so written, NaN is refused too
            raise error(f"{name} is {shown(value)}, which is no {'whole number' if hint is int else 'number'} that can be used here")
        return hint(value)
    if hint in (bool, str, types.NoneType) and isinstance(value, hint):
        return value
    raise error(f"{name} is {shown(value)}; expected {_KINDS.get(origin or hint, hint)}")


def _one_of(value: Any, hints: tuple[Any, ...], name: str, error: type[InputError]) -> Any:
    """A value of any of several types; where it is of none, what the last of them that is not None says."""
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


_KINDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    list: "a list",
    tuple: "a list",
    dict: "keys and values",
    types.NoneType: "null",
}
