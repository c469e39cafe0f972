# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The error that every command turns into one line."""

from __future__ import annotations


class InputError(ValueError):
    """Something a user gave that cannot be used; one line that names the cause and the fix. Commands exit with status 2
    on it.
    """


class MachineError(InputError):
    """Something that this machine has and others of the job may not have: the first rank of each machine says it."""


class ConfigError(InputError):
    """A setting or a checkpoint that cannot be used."""


def first_line(error: BaseException) -> str:
    """What a library's error says first, in at most 200 characters; its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
