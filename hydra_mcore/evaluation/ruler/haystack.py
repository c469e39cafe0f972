# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""What needles are hidden in: real text, or one line over and over."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.random import Generator
from transformers import PreTrainedTokenizerBase as Tokenizer

from hydra_mcore.errors import InputError
from hydra_mcore.evaluation.ruler.pieces import Pieces
from hydra_mcore.selection.probes import read_haystack as read_ids

LONGEST_SENTENCE = 1000  # tokens on average: needles stand between sentences, and their depths must come out even
_SENTENCE_END = re.compile(r"""[.!?]["')\]\u2019\u201d]*$""")  # where white space follows
_CHINESE_END = re.compile("[\u3002\uff01\uff1f]$")  # where anything does
_EMPTY_LINE = re.compile(r"\s*?\n\s*?\n")


@dataclass(frozen=True, eq=False)
class Haystack:
    """Text as token ids, and where its sentences end."""

    ids: np.ndarray
    """int32 [n]."""
    ends: np.ndarray
    """int64 [m], ascending: how many tokens end with a sentence; the last is n."""
    text: str
    """What the ids say: no answer may stand in it."""
    repeat: bool
    """Whether a prompt may be longer than the text."""

    @cached_property
    def digest(self) -> str:
        """sha256 over ids and ``repeat``."""
        return hashlib.sha256(self.ids.astype("<i4").tobytes() + bytes([self.repeat])).hexdigest()

    def part(self, size: int, rng: Generator) -> tuple[np.ndarray, np.ndarray]:
        """``size`` tokens from the start of a random sentence on, and the places in them before which a sentence starts.

        Raises:
            InputError: the text is shorter, and may not repeat.
        """
        starts = np.concatenate([[0], self.ends[:-1]])
        if not self.repeat:
            if size > len(self.ids):
                raise InputError(f"the haystack has {len(self.ids)} tokens, a prompt needs {size}; give a longer one, or --repeat-haystack")
            starts = starts[starts + size <= len(self.ids)]
        start = int(rng.choice(starts))
        rounds = np.arange((start + size) // len(self.ids) + 1) * len(self.ids)
        places = np.concatenate([[0], np.add.outer(rounds, self.ends).ravel() - start])
        ids = self.ids[np.arange(start, start + size) % len(self.ids)]
        return ids, places[(places >= 0) & (places <= max(0, size - 1))]


def read_haystack(tokenizer: Tokenizer, path: str | Path | None, repeat: bool = False) -> Haystack | None:
    """The text of a UTF-8 file; None without a path, which does for tasks that need no text.

    Raises:
        InputError: the file cannot be read, is not UTF-8, is empty, or has hardly any sentences.
    """
    if path is None:
        return None
    ids = read_ids(tokenizer, path).astype(np.int32)
    ends = _sentence_ends(Pieces(tokenizer), ids)
    if len(ends) * LONGEST_SENTENCE < len(ids):
        raise InputError(f"haystack {path}: {len(ends)} sentences in {len(ids)} tokens; needles go between sentences, so give it prose")
    return Haystack(ids, ends, tokenizer.decode(ids, clean_up_tokenization_spaces=False), repeat)


def repeated(line: str, pieces: Pieces) -> Haystack:
    """One line, as often as needed."""
    ids = np.asarray(pieces.ids(line), dtype=np.int32)
    return Haystack(ids, np.asarray([len(ids)]), line, repeat=True)


def _sentence_ends(pieces: Pieces, ids: np.ndarray) -> np.ndarray:
    """Behind which tokens a sentence or a paragraph ends, so that a needle with a space before it fits in."""
    known, which = np.unique(ids, return_inverse=True)
    texts = pieces.decode(known[:, None].tolist())

    def such(test: Callable[[str], object]) -> np.ndarray:
        return np.asarray([bool(test(text)) for text in texts])[which]

    sentences = such(_SENTENCE_END.search)[:-1] & such(lambda text: text[:1].isspace())[1:]
    here = sentences | such(_CHINESE_END.search)[:-1] | such(_EMPTY_LINE.match)[1:]
    return np.append(np.flatnonzero(here) + 1, len(ids))


def nearest(places: np.ndarray, depths: Sequence[float], size: int) -> np.ndarray:
    """int64 [n]: of the ``places`` in ``size`` tokens the one nearest to each of n depths."""
    return places[np.abs(places[:, None] - np.asarray(depths) * size).argmin(0)]


def woven(filler: np.ndarray, needles: Sequence[Sequence[int]], places: Sequence[int]) -> tuple[np.ndarray, list[tuple[int, int]]]:
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
