# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""RULER's counting tasks: the most common words of a list, the most frequent words of a coded text."""

from __future__ import annotations

import bisect
import itertools
import math
import string
from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
from numpy.random import Generator

from hydra_mcore.ruler.lexicon import compounds, single_words
from hydra_mcore.ruler.material import ROOM, Frame, PromptMaterial
from hydra_mcore.ruler.prompts import Prompt

COMMON = 10  # words asked for in cwe
OTHERS = 10  # and the fewest that they must stand out from, as in the example of short prompts
SHORT = 4096  # tokens; below, cwe repeats words less
FREQUENT = 3  # words asked for in fwe
LEAST_TEXT = 27  # words of fwe's text: fewer, and its third and fourth word both stand there but once or never
DOTS = (
    " ..."  # fwe's most frequent word, which does not count; what is left of the length is filled with it, in cwe too
)


def common_words(length: int, material: PromptMaterial, rng: Generator) -> Prompt:
    """cwe: a numbered list in which ten words stand 30 times and others 3 times (6 and 1 below 4096 tokens); name the
    ten.

    The prompt has exactly ``length`` tokens, room included; behind the last word that fits, dots fill it up. A solved
    example goes before the question where it takes at most a third of the length. Where the single words are too few
    (RULER turns to a longer list then), all words of the list have the form adjective-noun.

    Raises:
        InputError: too short a length; a tokenizer that cannot write the pieces.
    """
    many, few = (6, 1) if length < SHORT else (30, 3)
    shuffled = rng.permutation(single_words()).tolist()
    shown, singles = shuffled[: _example_words(length)], shuffled[_example_words(length) :]
    example = _example(material, length, shown, rng) if _has_example(material, length) else ""
    ask = material.wording.cwe.filled(count=str(COMMON))
    for words, ids in _pools(material, singles, rng):
        frame = Frame.of(material, "cwe", length, ask, words[:COMMON], written=_listed(words[:COMMON]), example=example)
        numbers, numbered = _numbers(
            material, 1 << max(10, frame.space.bit_length() - 1)
        )  # an entry takes two tokens or more
        totals = _list_tokens(np.asarray([len(each) for each in ids]), numbered, many, few)
        frame.require(int(totals[OTHERS - 1]))
        others = int(np.searchsorted(totals, frame.space, side="right"))
        if others < len(words) - COMMON:
            break
    entries = rng.permutation(np.repeat(np.arange(COMMON + others), [many] * COMMON + [few] * others))
    listed = itertools.chain.from_iterable(number + ids[word] for number, word in zip(numbers, entries, strict=False))
    return frame.prompt(_filled_up(list(listed), material, frame.space))


def _pools(material: PromptMaterial, singles: list[str], rng: Generator) -> Iterator[tuple[list[str], list[list[int]]]]:
    """Words and their ids: single ones, then more and more of the form adjective-noun."""
    known = _single_ids(material)
    yield singles, [known[word] for word in singles]
    words: list[str] = []
    ids: list[list[int]] = []
    while True:
        more = compounds(len(words) or 2 * len(singles), rng, frozenset(words))
        words, ids = words + more, ids + material.pieces.batch([" " + word for word in more])
        yield words, ids


def _list_tokens(lengths: np.ndarray, numbered: np.ndarray, many: int, few: int) -> np.ndarray:
    """Tokens of lists of the common words and the next 1, 2, ... others.

    Args:
        lengths: int [n], tokens of each word, the common ones first.
        numbered: int [m], tokens of the first 1, 2, ... m numbers.
    """
    others = min(len(lengths) - COMMON, (len(numbered) - many * COMMON) // few)
    entries = many * COMMON + few * np.arange(1, others + 1)
    return many * lengths[:COMMON].sum() + few * np.cumsum(lengths[COMMON : COMMON + others]) + numbered[entries - 1]


def _listed(words: Sequence[str]) -> str:
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, start=1))


def _example_words(length: int) -> int:
    return 20 if length < SHORT else 40


def _example(material: PromptMaterial, length: int, words: Sequence[str], rng: Generator) -> str:
    """A solved question and the end of its line."""
    ask, (many, few) = material.wording.cwe.filled(count=str(COMMON)), (3, 1) if length < SHORT else (10, 3)
    entries = rng.permutation([*words[:COMMON]] * many + [*words[COMMON:]] * few)
    return ask.intro + "\n" + _listed(entries) + ask.question + ask.solved(_listed(words[:COMMON])) + "\n"


@lru_cache(maxsize=64)
def _has_example(material: PromptMaterial, length: int) -> bool:
    """Whether all prompts of a length have one: decided by one example, since they differ by some tokens."""
    words = single_words()[:: len(single_words()) // _example_words(length)][: _example_words(length)]
    return 3 * len(material.pieces.ids(_example(material, length, words, np.random.default_rng(0)))) <= length


@lru_cache(maxsize=8)
def _single_ids(material: PromptMaterial) -> dict[str, list[int]]:
    return dict(zip(single_words(), material.pieces.batch([" " + word for word in single_words()]), strict=True))


@lru_cache(maxsize=8)
def _numbers(material: PromptMaterial, count: int) -> tuple[list[list[int]], np.ndarray]:
    """The ids of the first ``count`` numbers of a numbered list, and the running sum of their lengths in tokens."""
    ids = material.pieces.batch(["\n1.", *(f" {i}." for i in range(2, count + 1))])
    return ids, np.cumsum([len(each) for each in ids])


def frequent_words(length: int, material: PromptMaterial, rng: Generator) -> Prompt:
    """fwe: a text of coded words, that of rank k being 1 / (zeta(2) k^2) of it, the first rank dots; name ranks 2 to 4.

    The prompt has exactly ``length`` tokens, room included, filled up with dots. The fourth rank is rarer than the
    third.

    Raises:
        InputError: too short a length; a tokenizer that cannot write the pieces.
    """
    words = _coded_words(max(FREQUENT + 1, (length - ROOM["fwe"]) // 50 - 1), rng)
    answers = words[:FREQUENT]
    frame = Frame.of(material, "fwe", length, material.wording.fwe, answers, written=" ".join(answers))
    ids = material.pieces.batch([DOTS, *(" " + word for word in words)])
    lengths = np.asarray([len(each) for each in ids])
    shares = 6 / math.pi**2 / np.arange(1, len(ids) + 1) ** 2

    def counts(size: int) -> np.ndarray:
        return (size * shares).astype(np.int64)

    frame.require(int(counts(LEAST_TEXT) @ lengths))
    size = bisect.bisect_right(range(frame.space + 1), frame.space, key=lambda size: counts(size) @ lengths) - 1
    while counts(size)[FREQUENT] == counts(size)[FREQUENT + 1]:
        size -= 1
    text = rng.permutation(np.repeat(np.arange(len(ids)), counts(size)))
    coded = itertools.chain.from_iterable(ids[word] for word in text)
    return frame.prompt(_filled_up(list(coded), material, frame.space))


def _coded_words(count: int, rng: Generator) -> list[str]:
    """Different words of six random letters."""
    found: dict[str, None] = {}
    while len(found) < count:
        found |= dict.fromkeys(
            "".join(letters) for letters in rng.choice(list(string.ascii_lowercase), size=(count, 6))
        )
    return list(found)[:count]


def _filled_up(ids: list[int], material: PromptMaterial, size: int) -> np.ndarray:
    """int32 [size]: the ids, then dots."""
    return np.concatenate([ids, np.resize(material.pieces.ids(DOTS), size - len(ids))]).astype(np.int32)
