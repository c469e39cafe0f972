# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""RULER's variable tracking: a value is assigned to a variable, that to another, and so on; name all that have the
value.
"""

from __future__ import annotations

import itertools
import string
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.random import Generator

from hydra_mcore.ruler.haystack import nearest, repeated, woven
from hydra_mcore.ruler.material import Frame, PromptMaterial
from hydra_mcore.ruler.prompts import Prompt

HOPS = 4  # assignments from variable to variable, in the one chain
EXAMPLE_LINES = 10  # of noise in the solved example


def chain_prompt(length: int, material: PromptMaterial, depths: Sequence[float], rng: Generator) -> Prompt:
    """vt: one prompt of exactly ``length`` tokens, room included.

    A solved example goes before the question where it takes at most a third of the length.

    Args:
        depths: of the chain's assignments; they are sorted, because a chain is hidden in its order.

    Raises:
        InputError: too short a length; a tokenizer that cannot write the pieces.
    """
    value, example_value = (str(number) for number in 10_000 + rng.choice(90_000, size=2, replace=False))
    names = _names(5, rng)
    example = _example(material, example_value, rng) if _has_example(material, length) else ""
    ask = material.wording.vt.filled(query=value, count=str(len(names)))
    frame = Frame.of(material, "vt", length, ask, names, written=", ".join(names), example=example)
    chain = material.pieces.batch(["\n" + line for line in _chain(value, names)])
    frame.require(sum(map(len, chain)) + 1)
    noise = repeated("\n" + material.wording.noise.strip(), material.pieces)
    filler, ends = noise.part(frame.space - sum(map(len, chain)), rng)
    body, spans = woven(filler, chain, nearest(ends, sorted(depths)))
    return frame.prompt(body, spans)


def _names(letters: int, rng: Generator) -> list[str]:
    """HOPS + 1 different names."""
    found: dict[str, None] = {}
    while len(found) <= HOPS:
        found["".join(rng.choice(list(string.ascii_uppercase), size=letters))] = None
    return list(found)


def _chain(value: str, names: Sequence[str]) -> list[str]:
    return [f"VAR {names[0]} = {value}", *(f"VAR {to} = VAR {of}" for of, to in itertools.pairwise(names))]


def _example(material: PromptMaterial, value: str, rng: Generator) -> str:
    """A solved question with names of three letters, and an empty line."""
    names = _names(3, rng)
    lines = [material.wording.noise.strip()] * EXAMPLE_LINES
    places = np.sort(rng.choice(EXAMPLE_LINES + 1, size=HOPS + 1, replace=False))
    for place, line in reversed(list(zip(places, _chain(value, names), strict=True))):
        lines.insert(place, line)
    ask = material.wording.vt.filled(query=value, count=str(len(names)))
    return ask.intro + "\n" + "\n".join(lines) + ask.question + ask.solved(" ".join(names)) + "\n\n"


@lru_cache(maxsize=64)
def _has_example(material: PromptMaterial, length: int) -> bool:
    """Whether all prompts of a length have one: decided by one example, since they differ by some tokens."""
    return 3 * len(material.pieces.ids(_example(material, "12345", np.random.default_rng(0)))) <= length
