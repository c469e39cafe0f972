# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The word lists that RULER draws from: nouns, adjectives and verbs of the package wonderwords."""

from __future__ import annotations

from collections.abc import Container
from functools import cache

from numpy.random import Generator
from wonderwords import RandomWord


@cache
def single_words() -> tuple[str, ...]:
    """All nouns, adjectives and verbs of wonderwords, sorted: 8166 words with version 2.2."""
    return tuple(sorted(set(_words("noun")) | set(_words("adjective")) | set(_words("verb"))))


def compounds(count: int, rng: Generator, used: Container[str] = ()) -> list[str]:
    """``count`` different random words of the form adjective-noun, of which there are six million, none of them in
    ``used``.
    """
    adjectives, nouns = _words("adjective"), _words("noun")
    found: dict[str, None] = {}
    while len(found) < count:
        pairs = zip(
            rng.integers(len(adjectives), size=count).tolist(),
            rng.integers(len(nouns), size=count).tolist(),
            strict=True,
        )
        found |= dict.fromkeys(word for a, n in pairs if (word := f"{adjectives[a]}-{nouns[n]}") not in used)
    return list(found)[:count]


@cache
def _words(category: str) -> tuple[str, ...]:
    return tuple(sorted(RandomWord().filter(include_categories=[category])))
