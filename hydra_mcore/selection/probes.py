# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Counterfactual pairs for head selection: needle prompts, and the same prompts with another value in the haystack.

In the corrupt prompt the queried needle holds a distractor as long as the true value; every other token, the
teacher-forced answer included, stays (symmetric token replacement, paper section 2 point 1).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer
from transformers import PreTrainedTokenizerBase as Tokenizer

from hydra_mcore.heads import InputError
from hydra_mcore.selection.needles import RULER_FORMAT, NeedleFormat, build_prompts

EVALUATION_SEEDS = 1_000_000  # the first of them: selection stays below, so no map is chosen on prompts it is judged by
TOKENS_A_FORWARD = 16_384  # pairs are cut into batches of about this many tokens


@dataclass(frozen=True, eq=False)
class ProbeBatch:
    """Pairs of one sub-probe, all of one length; the answer runs from ``answer_start`` to the end (p tokens)."""

    task: str
    clean_bs: Tensor  # int64
    corrupt_bs: Tensor  # int64, the queried value replaced in the haystack
    answer_start: int
    answer_bp: Tensor  # int64, a+ of Eq 9
    distractor_bp: Tensor  # int64, a- of Eq 9


def check_seed(seed: int) -> None:
    """Raise InputError for a seed that belongs to evaluation."""
    if not 0 <= seed < EVALUATION_SEEDS:
        raise InputError(f"seed {seed}: selection uses 0 to {EVALUATION_SEEDS - 1}; larger ones are kept for evaluation")


def probe_batches(
    task: str, fmt: NeedleFormat, tokenizer: Tokenizer, haystack_ids: np.ndarray, length: int, pairs: int, seed: int
) -> Iterator[ProbeBatch]:
    """The pairs of one sub-probe, in batches that bound a forward's memory; the same seed gives the same pairs.

    Args:
        task: name in ``needles.TASKS``.
        haystack_ids: [n] real text, see ``read_haystack``.
        length: tokens of each prompt, the answer included.

    Raises:
        InputError: a seed of evaluation, no pairs, or prompts that cannot be built (too short, too little text).
    """
    check_seed(seed)
    if pairs < 1:
        raise InputError(f"{pairs} pairs a sub-probe: at least 1 is needed")
    if length < 1:
        raise InputError(f"{length} tokens a prompt: give a positive length")
    try:
        prompts = build_prompts(task, fmt, tokenizer, haystack_ids, length, pairs, seed)
    except ValueError as error:
        raise InputError(f"probe {task} with {length} tokens: {error}") from None
    size = max(1, TOKENS_A_FORWARD // length)
    for start in range(0, pairs, size):
        part = prompts[start : start + size]
        yield ProbeBatch(
            task=task,
            clean_bs=_stack([prompt.ids for prompt in part]),
            corrupt_bs=_stack([prompt.with_value(prompt.distractor) for prompt in part]),
            answer_start=part[0].answer_start,
            answer_bp=_stack([prompt.answer for prompt in part]),
            distractor_bp=_stack([prompt.distractor for prompt in part]),
        )


def _stack(rows: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(rows))


def load_tokenizer(checkpoint_dir: str | Path) -> Tokenizer:
    """The tokenizer that import put beside a checkpoint; raises InputError when there is none that loads."""
    folder = Path(checkpoint_dir) / "tokenizer"
    if not folder.is_dir():
        raise InputError(f"{folder}: no tokenizer beside the checkpoint; copy the Hugging Face tokenizer files there")
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: the tokenizer does not load ({str(error).splitlines()[0]})") from None


def load_format(checkpoint_dir: str | Path, path: str | Path | None = None) -> NeedleFormat:
    """The wording of needles: a file, else the checkpoint's own ``tokenizer/needles.json``, else RULER's.

    Raises:
        InputError: the file is missing or no needle format.
    """
    own = Path(checkpoint_dir) / "tokenizer" / "needles.json"
    if path is None and not own.is_file():
        return RULER_FORMAT
    try:
        return NeedleFormat.load(path or own)
    except OSError as error:
        raise InputError(f"needle format {path or own}: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"needle format: {error}") from None


def read_haystack(tokenizer: Tokenizer, path: str | Path | None = None) -> np.ndarray:
    """Token ids [n] of the text that needles are hidden in: a UTF-8 file, else the language reference of this Python.

    Raises:
        InputError: the file cannot be read, is not UTF-8 or is empty.
    """
    if path is None:
        from pydoc_data.topics import topics  # half a megabyte of English prose that every Python brings along

        text = "\n\n".join(topics[name] for name in sorted(topics))
    else:
        try:
            text = Path(path).read_text(encoding="utf-8")
        except OSError as error:
            raise InputError(f"haystack {path}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise InputError(f"haystack {path}: not UTF-8 text") from None
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if not ids:
        raise InputError(f"haystack {path}: no text in it")
    return np.asarray(ids, dtype=np.int64)
