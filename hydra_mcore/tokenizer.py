# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The one place that loads a tokenizer. Code that a folder or the hub brings along is never run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hydra_mcore.errors import InputError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")  # files of which a tokenizer has one at least


def has_tokenizer(folder: str | Path) -> bool:
    """Whether the files of a tokenizer lie in a folder."""
    return any((Path(folder) / name).is_file() for name in VOCABULARIES)


def open_tokenizer(name: str | Path, local_files_only: bool = False) -> PreTrainedTokenizerBase:
    """A Hugging Face tokenizer: of a folder, or of a name on the hub.

    Args:
        local_files_only: what is not on this machine is not asked for.

    Raises:
        InputError: none there, one that does not load, or one that needs code of its own.
    """
    from transformers import AutoTokenizer, logging  # not at the top: a worker that tokenizes starts without them

    logging.set_verbosity_error()  # a command has its own output, and its refusals are one line
    reason = ""
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(name), trust_remote_code=False, local_files_only=local_files_only)
    except Exception as error:  # of broken files transformers and its libraries raise whatever they run into
        reason = first_line(error)
    if "custom code" in reason or (not reason and tokenizer.init_kwargs.get("auto_map")):
        raise InputError(
            f"tokenizer {name}: needs code of its own, which is never run; convert it to a tokenizer.json without"
            " auto_map"
        )
    if reason:
        raise InputError(f"tokenizer {name}: does not load ({reason}); give a folder with its files")
    return tokenizer


def load_tokenizer(checkpoint_dir: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer that import put beside a checkpoint; raises InputError when there is none that loads."""
    folder = Path(checkpoint_dir) / "tokenizer"
    if not folder.is_dir():
        raise InputError(f"{folder}: no tokenizer beside the checkpoint; copy the Hugging Face tokenizer files there")
    return open_tokenizer(folder)
