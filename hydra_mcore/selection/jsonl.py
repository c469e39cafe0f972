# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""A counterfactual pair, and the pairs that a user brings in a JSONL file."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hydra_mcore.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

KEYS = ("clean", "corrupt", "answer", "distractor")


@dataclass(frozen=True, eq=False)
class Pair:
    """Two prompts of s tokens that differ in the source of the answer, and the p tokens that continue each of them.

    Raises:
        ValueError: the two prompts, or the two answers, are empty, the same, or of different lengths.
    """

    clean_ids: np.ndarray  # int64 [s]
    corrupt_ids: np.ndarray  # int64 [s]
    answer_ids: np.ndarray  # int64 [p], continues clean: a+ of Eq 9
    distractor_ids: np.ndarray  # int64 [p], continues corrupt: a- of Eq 9
    source: np.ndarray | None = (
        None  # int64 [p], where in the prompt the answer is copied from; None where it is not copied
    )

    def __post_init__(self) -> None:
        for one, two in (("clean", "corrupt"), ("answer", "distractor")):
            ids, other_ids = getattr(self, f"{one}_ids"), getattr(self, f"{two}_ids")
            for name, given in ((one, ids), (two, other_ids)):
                if not len(given):
                    raise ValueError(f"{name} has no tokens; give it some text")
            if len(ids) != len(other_ids):
                raise ValueError(
                    f"{one} and {two} have {len(ids)} and {len(other_ids)} tokens; reword one until both have as many"
                )
            if np.array_equal(ids, other_ids):
                raise ValueError(f"{one} and {two} are the same tokens; make them differ")

    @classmethod
    def of(cls, true: np.ndarray, other: np.ndarray, swapped: np.ndarray) -> Pair:
        """A pair whose answer begins with the first token that tells it from its distractor.

        Args:
            true: int64 [n], the clean prompt and its answer.
            other: int64 [n], the clean prompt and the distractor.
            swapped: int64 [n], the corrupt prompt and the clean one's answer.

        Raises:
            ValueError: the prompts have different lengths, or as the class.
        """
        start = _first_difference(true, other)
        if not np.array_equal(true[start:], swapped[start:]):
            raise ValueError("the two prompts have different lengths")
        clean, corrupt, answer, distractor = true[:start], swapped[:start], true[start:], other[start:]
        first = _first_difference(clean, corrupt)
        last = first + len(answer)
        parts = ((clean[first:last], answer), (corrupt[first:last], distractor), (clean[last:], corrupt[last:]))
        copied = all(np.array_equal(*part) for part in parts)
        return cls(clean, corrupt, answer, distractor, np.arange(first, last) if copied else None)


def _first_difference(one: np.ndarray, two: np.ndarray) -> int:
    size = min(len(one), len(two))
    return int(np.argmax(np.append(one[:size] != two[:size], True)))


def encode(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """Token ids [n] of a text, without special tokens and without warnings about its length."""
    return np.asarray(tokenizer.encode(text, add_special_tokens=False, verbose=False), dtype=np.int64)


def load_pairs(tokenizer: Tokenizer, path: str | Path) -> list[Pair]:
    """The pairs of a JSONL file, one object a line with the texts of ``KEYS``; empty lines are skipped.

    Prompt and answer are encoded separately, so the user decides where a space between them belongs.

    Raises:
        InputError: the file cannot be read or holds no pair, or a line is none; names the line.
    """
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as error:
        raise InputError(f"probe file {path}: {error.strerror}") from None
    pairs = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            pairs.append(Pair(*(encode(tokenizer, text) for text in _texts(line))))
        except ValueError as error:
            raise InputError(f"probe file {path}, line {number}: {error}") from None
    if not pairs:
        raise InputError(f"probe file {path}: no pair in it; give an object a line with the keys {', '.join(KEYS)}")
    return pairs


def _texts(line: bytes) -> list[str]:
    """The four texts of a line in the order of ``KEYS``; ValueError if it has others."""
    try:
        fields = json.loads(line.decode("utf-8-sig"))  # editors on Windows open a file with a byte order mark
    except UnicodeDecodeError:
        raise ValueError("not UTF-8 text; save the file as UTF-8") from None
    except RecursionError:
        raise ValueError("not JSON that can be read (nested too deeply)") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno}); write one object a line") from None
    if not isinstance(fields, dict):
        raise ValueError(f"a JSON {type(fields).__name__}; write an object with the keys {', '.join(KEYS)}")
    for fault, keys in (("lacks", KEYS - fields.keys()), ("has the unknown", fields.keys() - KEYS)):
        if keys:
            raise ValueError(f"the object {fault} key {min(keys)!r}; give {', '.join(KEYS)} and nothing else")
    for key in KEYS:
        if not isinstance(fields[key], str):
            raise ValueError(f"{key} is no text; put it in quotes")
        if re.search("[\ud800-\udfff]", fields[key]):  # JSON can write it, no tokenizer can read it
            raise ValueError(f"{key} holds half of a surrogate pair; write the whole character")
    return [fields[key] for key in KEYS]
