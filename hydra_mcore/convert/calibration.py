# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Calibration tokens for the student's start, from a text file and the checkpoint's own tokenizer."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from hydra_mcore.config import ModelCard
from hydra_mcore.convert.tokenizer_files import TOKENIZER_DIR
from hydra_mcore.errors import InputError
from hydra_mcore.tokenizer import has_tokenizer, open_tokenizer

MAX_LENGTH = 512
SCALE_TOKENS, FIT_TOKENS = 4096, 16_384  # for the fusion scales alone, and for a fitted start
CHARACTERS_A_TOKEN = 64  # far more than any text has


def calibration_tokens(text_file: str | Path, checkpoint_dir: str | Path, num_tokens: int = SCALE_TOKENS) -> Tensor:
    """The text's first tokens, up to ``num_tokens``, as [b, s] with s = min(native length, 512).

    Raises:
        InputError: the text cannot be read or is shorter than one sequence, or the checkpoint has no tokenizer.
    """
    length = min(ModelCard.load(checkpoint_dir).shape.native_length, MAX_LENGTH)
    try:
        with open(text_file, encoding="utf-8") as file:
            text = file.read(CHARACTERS_A_TOKEN * num_tokens)
    except OSError as error:
        raise InputError(f"text {text_file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"text {text_file}: not UTF-8 text") from None
    folder = Path(checkpoint_dir) / TOKENIZER_DIR
    if not has_tokenizer(folder):
        raise InputError(f"{folder}: no tokenizer there; import a directory that has its tokenizer files")
    token_ids = open_tokenizer(folder)(text, verbose=False)["input_ids"]
    num_sequences = min(len(token_ids), num_tokens) // length
    if not num_sequences:
        raise InputError(f"text {text_file}: {len(token_ids)} tokens; give at least {length}")
    return torch.tensor(token_ids[: num_sequences * length]).view(num_sequences, length)
