# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The folder that a conversion writes: checked before any work, filled with what belongs beside the weights."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from hydra_mcore.heads import InputError
from hydra_mcore.model.build import TRACKER

TOKENIZER_DIR = "tokenizer"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "needles.json",
)


def check_target(checkpoint_dir: str | Path) -> None:
    """Raise InputError when a checkpoint cannot or must not be written here, before anything has been done."""
    root = Path(checkpoint_dir)
    if (root / TRACKER).exists():
        raise InputError(f"{root}: already holds a checkpoint; choose another folder or remove it")
    above = next(path for path in (root, *root.absolute().parents) if path.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise InputError(f"{root}: cannot be written, {above} is not a writable folder")


def copy_tokenizer(source_dir: str | Path, checkpoint_dir: str | Path) -> None:
    """Copy the tokenizer's files that ``source_dir`` has into the checkpoint's own tokenizer folder."""
    target = Path(checkpoint_dir) / TOKENIZER_DIR
    present = [Path(source_dir) / name for name in TOKENIZER_FILES if (Path(source_dir) / name).is_file()]
    if present:
        target.mkdir(parents=True, exist_ok=True)
    for path in present:
        shutil.copyfile(path, target / path.name)
