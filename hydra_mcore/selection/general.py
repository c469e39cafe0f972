# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Counterfactual pairs for general ability, the second capability of Eq 12: short prompts, for any tokenizer.

The paper does not say which probes it uses, so these are ours. Each asks for something that a language model needs
everywhere: going on with a list that was begun before, making a verb agree with its subject, adding two numbers.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.random import Generator

from hydra_mcore.selection.jsonl import Pair, encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

    from hydra_mcore.ruler.needle_format import NeedleFormat

TRIES = 100  # draws a wanted pair: most of what is drawn may be unusable in a tokenizer

# A copying prompt has as many words whatever the list's size, so that all prompts have one length. The size varies,
# and with it how far back the answer stands: a head that looks back a fixed distance cannot solve them all.
COPYING_WORDS = 14
LIST_SIZES = range(7, 11)
ENOUGH_WORDS = 20  # that lists differ
LIST_WORDS = (
    "amber anchor apple arrow badge basket beacon bottle bridge button cabin candle canyon castle cedar compass"
    " desert eagle engine falcon feather forest garden glacier hammer harbor island jacket kettle ladder lantern lemon"
    " marble mirror mountain ocean orchard pebble pencil pillow planet rabbit ribbon river saddle shadow station tiger"
    " tunnel violin window bold brisk calm clever crisp daring eager fierce frosty gentle giant golden green happy"
    " hollow humble icy jolly lucky mellow misty noble proud quiet rapid salty scarlet silent swift"
).split()

_REGULAR = (
    "apple artist bird boat book bottle car chair cup dog doctor door engine farmer field flower friend garden girl"
    " house key king lamp letter map picture river road ship singer student table teacher tower tree wall window worker"
    " writer"
).split()
_IRREGULAR = (("man", "men"), ("woman", "women"), ("child", "children"), ("person", "people"))
NOUNS = (*((noun, f"{noun}s") for noun in _REGULAR), *_IRREGULAR)
VERBS = (("is", "are"), ("was", "were"), ("looks", "look"), ("seems", "seem"))
ADJECTIVES = "big clean famous good new nice old small strange tall".split()


class Texts(NamedTuple):
    """A pair before it is encoded."""

    clean: str
    corrupt: str
    answer: str
    distractor: str


def general_pairs(
    probe: str, tokenizer: Tokenizer, fmt: NeedleFormat | None, length: int, pairs: int, seed: int
) -> list[Pair]:
    """Different pairs of one probe; fewer, or none, where the tokenizer or the length leaves no more.

    Args:
        probe: name in ``GENERAL_PROBES``.
        fmt: a model's own needles, whose words lists are made of; None for ``LIST_WORDS``.
        length: the most tokens a prompt may have, the answer included.
        pairs: how many are wanted.
        seed: the same seed gives the same pairs.
    """
    rng = np.random.default_rng([seed, *probe.encode()])
    found: dict[str, Pair] = {}
    for texts in itertools.islice(GENERAL_PROBES[probe](tokenizer, fmt, rng), TRIES * pairs):
        with contextlib.suppress(ValueError):  # it does not fit this tokenizer: draw again
            pair = _encode(tokenizer, texts)
            if len(pair.clean_ids) + len(pair.answer_ids) <= length:
                found.setdefault(texts.clean, pair)
        if len(found) == pairs:
            break
    return list(found.values())


def _encode(tokenizer: Tokenizer, texts: Texts) -> Pair:
    """The pair of four texts; ValueError if there is none.

    Prompt and answer are encoded together: a tokenizer may join them, or give the space between them its own token.
    """
    true, other, swapped = (
        encode(tokenizer, prompt + answer)
        for prompt, answer in (
            (texts.clean, texts.answer),
            (texts.clean, texts.distractor),
            (texts.corrupt, texts.answer),
        )
    )
    if tokenizer.unk_token_id is not None and any(tokenizer.unk_token_id in ids for ids in (true, other, swapped)):
        raise ValueError("words that the tokenizer does not know")
    return Pair.of(true, other, swapped)


def _copying(tokenizer: Tokenizer, fmt: NeedleFormat | None, rng: Generator) -> Iterator[Texts]:
    """A list of words, begun again: its next word is the answer, and the list of the corrupt prompt has another
    there.
    """
    words = _words(tokenizer, fmt)
    while len(words) >= ENOUGH_WORDS:
        size = int(rng.choice(LIST_SIZES))
        *listed, other = (words[i] for i in rng.permutation(len(words))[: size + 1])
        place = COPYING_WORDS - 1 - size
        again = listed[:place]
        yield Texts(
            clean="".join(listed + again),
            corrupt="".join([*again, other, *listed[place + 1 :], *again]),
            answer=listed[place],
            distractor=other,
        )


def _words(tokenizer: Tokenizer, fmt: NeedleFormat | None) -> list[str]:
    """Words of equally many tokens: the format's value pieces if they are words, which its model surely knows, else its
    keys'.
    """
    words = [piece for piece in fmt.value_pieces if piece[:1].isspace()] if fmt else []
    if len(set(words)) < ENOUGH_WORDS:
        texts = fmt.keys if fmt else LIST_WORDS
        words = [f" {word}" for word in re.findall(r"\w+", " ".join(texts))]
    by_tokens: dict[int, list[str]] = {}
    for word in dict.fromkeys(words):
        ids = encode(tokenizer, word)
        if tokenizer.unk_token_id not in ids.tolist():
            by_tokens.setdefault(len(ids), []).append(word)
    return max(by_tokens.values(), key=len, default=[])


def _subject_verb(tokenizer: Tokenizer, fmt: NeedleFormat | None, rng: Generator) -> Iterator[Texts]:
    """A subject, another noun, and the verb that agrees with the first; two sentences before show the verb's two
    forms.
    """
    while True:
        nouns = [NOUNS[i] for i in rng.permutation(len(NOUNS))[:6]]
        verb, adjectives = VERBS[rng.integers(len(VERBS))], rng.permutation(ADJECTIVES)
        phrases = [f"near the {nouns[i][rng.integers(2)]}" for i in range(3, 6)]
        shown = "".join(
            f"The {nouns[i][number]} {phrases[i]} {verb[number]} {adjectives[i]}. "
            for i, number in enumerate(rng.permutation(2).tolist())
        )
        number = int(rng.integers(2))
        clean, corrupt = (f"{shown}The {nouns[2][n]} {phrases[2]}" for n in (number, 1 - number))
        yield Texts(clean, corrupt, f" {verb[number]}", f" {verb[1 - number]}")


def _arithmetic(tokenizer: Tokenizer, fmt: NeedleFormat | None, rng: Generator) -> Iterator[Texts]:
    """Prompts that ask for the sum of two digits after three solved sums; the corrupt prompt changes one operand."""
    while True:
        first, second, other = rng.integers(1, 10, size=3).tolist()
        changed = (other, second) if rng.random() < 0.5 else (first, other)
        asked = {(first, second), changed}
        pairs = itertools.product(range(1, 10), repeat=2)
        sums = [(a, b) for a, b in pairs if {(a, b), (b, a)}.isdisjoint(asked)]
        shown = "".join(f"{a} + {b} = {a + b}\n" for a, b in rng.permutation(sums)[:3])
        clean, corrupt = (f"{shown}{a} + {b} =" for a, b in ((first, second), changed))
        yield Texts(clean, corrupt, f" {first + second}", f" {sum(changed)}")


GENERAL_PROBES: dict[str, Callable[[Tokenizer, NeedleFormat | None, Generator], Iterator[Texts]]] = {
    "copying": _copying,
    "agreement": _subject_verb,
    "arithmetic": _arithmetic,
}
