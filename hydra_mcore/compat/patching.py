# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""What a patch is, and how one is put in place exactly once for the whole process.

A patch replaces one attribute of one module or class.  Nothing here is thread-local, so patches hold in every
thread, and a forked process inherits them.
"""

import functools
import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

_ORIGINALS: dict[str, Any] = {}
_APPLIED: dict[str, "Patch"] = {}


@dataclass(frozen=True)
class Patch:
    """One replaced attribute, with what a reader (and the canary test) needs to judge it.

    Attributes:
        target: what is replaced, as ``module:attribute`` or ``module:Class.attribute``.
        caller: a function of the pinned Megatron-Core that needs it, written the same way.
        marker: source text inside ``caller`` that shows the need.  The canary test looks for it.
        reason: what goes wrong without the patch.
        make: given the original attribute, returns its replacement.
        rebind: modules that imported the target by name, and so hold a reference of their own.
    """

    target: str
    caller: str
    marker: str
    reason: str
    make: Callable[[Any], Any]
    rebind: tuple[str, ...] = ()


def resolve(path: str) -> Any:
    """Return the object at ``module:attribute`` (dots inside classes).

    Raises:
        ImportError: the module does not exist.
        AttributeError: the module has no such attribute.
    """
    module, _, attributes = path.partition(":")
    return functools.reduce(getattr, attributes.split("."), importlib.import_module(module))


def apply(patches: Iterable[Patch]) -> None:
    """Put ``patches`` in place; one that is already in place is left alone.

    Raises:
        ImportError, AttributeError: the target is gone, so the package is not the pinned version.
    """
    for patch in patches:
        if patch.target in _APPLIED:
            continue
        module_name, _, attributes = patch.target.partition(":")
        *owners, name = attributes.split(".")
        holder = functools.reduce(getattr, owners, importlib.import_module(module_name))
        original = getattr(holder, name)
        replacement = patch.make(original)
        setattr(holder, name, replacement)
        for importer in patch.rebind:
            module = importlib.import_module(importer)
            if getattr(module, name) is original:
                setattr(module, name, replacement)
        _ORIGINALS[patch.target] = original
        _APPLIED[patch.target] = patch


def original(target: str) -> Any:
    """Return what stood at ``target`` before it was patched, or what stands there if it never was."""
    return _ORIGINALS[target] if target in _ORIGINALS else resolve(target)


def applied() -> tuple[Patch, ...]:
    """Return the patches in place, in the order they were put there."""
    return tuple(_APPLIED.values())
