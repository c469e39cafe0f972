# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""What needles are hidden in: real text, or one line over and over."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.random import Generator
from transformers import PreTrainedTokenizerBase as Tokenizer

from hydra_mcore.errors import InputError
from hydra_mcore.ruler.breaks import CHARACTER, NOTHING, SENTENCE, WORD, what_ends
from hydra_mcore.ruler.pieces import Pieces

LONGEST_SENTENCE = 1000  # tokens on average: a text of longer ones counts as one without sentences
ASTRAY = 0.025  # of a prompt: where no sentence ends within so much of a depth, a needle stands between words


@dataclass(frozen=True, eq=False)
class Haystack:
    """Text as token ids, and where its sentences and words end."""

    ids: np.ndarray
    """int32 [n]."""
    ends: np.ndarray
    """uint8 [n]: what ends with each token, as ``what_ends`` says."""
    text: str
    """What the ids say: no answer may stand in it."""
    repeat: bool
    """Whether a prompt may be longer than the text."""

    @classmethod
    def of(cls, tokenizer: Tokenizer, ids: np.ndarray, repeat: bool = False) -> Haystack:
        """The text that int [n] token ids say."""
        ids = ids.astype(np.int32)
        ends = what_ends(Pieces(tokenizer), ids)
        for smaller in (WORD, CHARACTER):
            if np.count_nonzero(ends == SENTENCE) * LONGEST_SENTENCE < len(ids):
                ends[ends == smaller] = SENTENCE
        return cls(ids, ends, tokenizer.decode(ids, clean_up_tokenization_spaces=False), repeat)

    @cached_property
    def digest(self) -> str:
        """sha256 over ids and ``repeat``."""
        return hashlib.sha256(self.ids.astype("<i4").tobytes() + bytes([self.repeat])).hexdigest()

    def part(self, size: int, rng: Generator) -> tuple[np.ndarray, np.ndarray]:
        """``size`` tokens from the start of a random sentence on, and uint8 [size]: what ends before each of them.

        Raises:
            InputError: the text is shorter, and may not repeat.
        """
        starts = np.concatenate([[0], np.flatnonzero(self.ends[:-1] == SENTENCE) + 1])
        if not self.repeat:
            if size > len(self.ids):
                raise InputError(
                    f"the text has {len(self.ids)} tokens, a prompt needs {size}; give a longer one, or --repeat-text"
                )
            starts = starts[starts + size <= len(self.ids)]
        start = int(rng.choice(starts))
        which = np.arange(start, start + size) % len(self.ids)
        return self.ids[which], self.ends[which - 1]


def read_haystack(tokenizer: Tokenizer, path: str | Path | None, repeat: bool = False) -> Haystack | None:
    """The text of a UTF-8 file; None without a path, which does for tasks that need no text.

    Raises:
        InputError: the file cannot be read, is not UTF-8 or is empty.
    """
    return None if path is None else Haystack.of(tokenizer, read_text(tokenizer, path), repeat)


def read_text(tokenizer: Tokenizer, path: str | Path | None = None) -> np.ndarray:
    """Token ids int64 [n] of a UTF-8 file, else of the language reference of this Python.

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
            raise InputError(f"text {path}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise InputError(f"text {path}: not UTF-8 text") from None
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if not ids:
        raise InputError(f"text {path}: no text in it")
    return np.asarray(ids, dtype=np.int64)


def repeated(line: str, pieces: Pieces) -> Haystack:
    """A haystack that repeats one line as often as a prompt needs it (RULER's noise)."""
    ids = np.asarray(pieces.ids(line), dtype=np.int32)
    return Haystack(ids, np.asarray([NOTHING] * (len(ids) - 1) + [SENTENCE], dtype=np.uint8), line, repeat=True)


def nearest(ends: np.ndarray, depths: Sequence[float]) -> list[int]:
    """For each of n depths the place of a needle in a part of a haystack: how many of its tokens stand before the
    needle.

    The nearest place between sentences; where that is ``ASTRAY`` between words, and where there are none either,
    characters.

    Args:
        ends: uint8 [size], what ends before each token.
    """
    return [_nearest(ends, depth * len(ends)) for depth in depths]


def _nearest(ends: np.ndarray, wanted: float) -> int:
    for least in (SENTENCE, WORD, CHARACTER):
        places = np.flatnonzero(ends >= least)
        place = int(places[np.abs(places - wanted).argmin()])
        if abs(place - wanted) <= ASTRAY * len(ends):
            break
    return place


def woven(
    filler: np.ndarray, needles: Sequence[Sequence[int]], places: Sequence[int]
) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Needles in a filler.

    Args:
        filler: int32 [n].
        places: of each needle, how many tokens of the filler stand before it; needles of one place keep their order.

    Returns:
        int32 [n + all needles], and [start, end) of each needle in it.
    """
    parts: list[Sequence[int] | np.ndarray] = []
    spans = [(0, 0)] * len(needles)
    done = added = 0
    for which in np.argsort(places, kind="stable"):
        place, needle = places[which], needles[which]
        parts += [filler[done:place], needle]
        spans[which] = (int(place) + added, int(place) + added + len(needle))
        done, added = place, added + len(needle)
    return np.concatenate([np.asarray(part, dtype=np.int32) for part in [*parts, filler[done:]]]), spans
