# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The folder that a conversion writes: checked before any work, complete or not there at all."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from hydra_mcore.commands import sole_writer
from hydra_mcore.errors import InputError
from hydra_mcore.model.checkpoints import TRACKER

HEAD_MAP_NAME = "head_map.json"


def check_target(target_dir: str | Path, num_bytes: int = 0) -> None:
    """Raise InputError when a folder cannot or must not be written here, before anything has been done."""
    root = Path(target_dir)
    if (root / TRACKER).exists():
        raise InputError(f"{root}: already holds a checkpoint; choose another folder or remove it")
    above = next(path for path in (root, *root.absolute().parents) if path.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise InputError(f"{root}: cannot be written, {above} is not a writable folder")
    if above == root and any(root.iterdir()):
        raise InputError(f"{root}: is not empty; choose another folder or remove it")
    if (free := shutil.disk_usage(above).free) < num_bytes:
        raise InputError(
            f"{root}: needs {num_bytes / 1e9:.2f} GB, the disk has {free / 1e9:.2f} GB free; choose another disk"
        )


@contextlib.contextmanager
def new_folder(target_dir: str | Path, num_bytes: int = 0) -> Iterator[Path]:
    """A folder to fill beside the target, which takes the target's name once the block ends well; else nothing is left.

    Raises:
        InputError: the target cannot be written (``check_target``, for ``num_bytes``), another process fills it, or a
            write fails half-way.
    """
    check_target(target_dir, num_bytes)
    target = Path(target_dir)
    beside = target.with_name(target.name + ".partial")
    try:
        with sole_writer(target):
            shutil.rmtree(beside, ignore_errors=True)  # of an attempt that was killed
            try:
                beside.mkdir()
                yield beside
                beside.replace(target)
            finally:
                shutil.rmtree(beside, ignore_errors=True)
    except OSError as error:
        raise InputError(f"{target}: cannot be written, {error.strerror or error}; nothing is left of it") from None
