# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Needle-in-a-haystack prompts in the manner of RULER (arXiv:2404.06654).

A prompt is a haystack with hidden "needles" (sentences that give a key a value), a query for one
key, and the answer: that key's value. Its pieces are encoded separately, so its length is exact to
the token and the value's place is known. Evaluation, the counterfactual probes of head selection
and the training of the tiny teacher share this file.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.random import Generator

from hydra_mcore.files import from_fields, read_json, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

Ids = tuple[int, ...]
MOST_PIECES = 1000  # of a value, so that no format asks for prompts without end


@dataclass(frozen=True)
class NeedleTask:
    """What one task puts into the haystack."""

    filler: str  # noise (repeated sentences), text (real) or needles (as many as fit)
    distractors: int  # needles with other keys, where the filler is not needles
    long_value: bool  # values of `long_pieces` pieces, not of `short_pieces`


TASKS: dict[str, NeedleTask] = {
    "niah_single_1": NeedleTask("noise", 0, False),
    "niah_single_2": NeedleTask("text", 0, False),
    "niah_single_3": NeedleTask("text", 0, True),
    "niah_multikey_1": NeedleTask("text", 3, False),
    "niah_multikey_2": NeedleTask("needles", 0, False),
}


@dataclass(frozen=True)
class NeedleFormat:
    """How needles, queries and values are worded for one model family.

    Raises:
        ValueError: A template lacks a placeholder, or the keys or pieces are unusable.
    """

    needle: str  # holds {key}, then {value} once
    query: str  # holds {key}; the answer follows at once
    keys: tuple[str, ...]  # words for {key}, all different
    value_pieces: tuple[str, ...]  # values are joined from these, drawn with replacement
    short_pieces: int  # pieces in a value
    long_pieces: int  # pieces in a value of niah_single_3
    noise: str  # repeated where a task's filler is noise
    intro: str = ""  # stands before the haystack

    def __post_init__(self) -> None:
        before, *after = self.needle.split("{value}")
        if len(after) != 1 or "{key}" not in before or "{key}" not in self.query:
            raise ValueError("needle must hold {key}, then {value}, and query {key}")
        if not self.keys or len(set(self.keys)) != len(self.keys):
            raise ValueError("needle keys must be different from each other, and at least one")
        if any("{value}" in key for key in self.keys):
            raise ValueError("needle keys must not hold {value}")
        if not self.noise:
            raise ValueError("needle format has no noise text")
        if len(set(self.value_pieces)) < 2 or not all(
            1 <= pieces <= MOST_PIECES for pieces in (self.short_pieces, self.long_pieces)
        ):
            raise ValueError(f"values need at least two different pieces, and 1 to {MOST_PIECES} pieces a value")

    def save(self, path: str | Path) -> None:
        """Write the format as JSON."""
        write_json(path, dataclasses.asdict(self))

    @classmethod
    def load(cls, path: str | Path) -> NeedleFormat:
        """Read a format that `save` wrote; InputError if the file is no such thing."""
        return from_fields(cls, read_json(path, what="needle format"), f"needle format {path}")


# Their pairs, 1,500 keys, fill a haystack of 30,000 tokens with needles.
_ADJECTIVES = (
    "amber bold brisk calm clever crisp daring eager fierce frosty gentle giant golden green happy "
    "hollow humble icy jolly lucky mellow misty noble proud quiet rapid salty scarlet silent swift"
).split()
_NOUNS = (
    "anchor apple arrow badge basket beacon bottle bridge button cabin candle canyon castle cedar "
    "compass desert eagle engine falcon feather forest garden glacier hammer harbor island jacket "
    "kettle ladder lantern lemon marble mirror mountain ocean orchard pebble pencil pillow planet "
    "rabbit ribbon river saddle shadow station tiger tunnel violin window"
).split()

RULER_FORMAT = NeedleFormat(
    needle=" One of the special magic numbers for {key} is: {value}.",
    query="\nWhat is the special magic number for {key} mentioned in the provided text? The special"
    " magic number for {key} mentioned in the provided text is: ",
    keys=tuple(f"{adjective}-{noun}" for adjective in _ADJECTIVES for noun in _NOUNS),
    value_pieces=tuple("0123456789"),
    short_pieces=7,
    long_pieces=32,
    noise=" The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.",
    intro="Some special magic numbers are hidden within the following text. Make sure to memorize"
    " it. I will quiz you about the numbers afterwards.\n",
)


@dataclass(frozen=True, eq=False)
class NeedlePrompt:
    """One prompt with its answer, which runs from `answer_start` to the end."""

    task: str
    key: str  # the key that is asked for
    ids: np.ndarray  # int64 [s], prompt and answer
    answer_start: int
    value_spans: tuple[tuple[int, int], ...]  # [start, end) of the key's value in the haystack
    # int64, a value as long as the answer, in no place with the same piece, and not in the prompt.
    distractor: np.ndarray

    @property
    def answer(self) -> np.ndarray:
        """Token ids of the answer."""
        return self.ids[self.answer_start :]

    def with_value(self, other_ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return ids whose haystack, not answer, has `other_ids`; ValueError for another length."""
        other = np.asarray(other_ids, dtype=np.int64)
        if other.shape != self.answer.shape:
            raise ValueError(f"value has {len(self.answer)} tokens, its replacement {len(other)}")
        ids = self.ids.copy()
        for start, end in self.value_spans:
            ids[start:end] = other
        return ids


@functools.lru_cache(maxsize=1 << 17)
def _encode(tokenizer: Tokenizer, text: str) -> Ids:
    return tuple(tokenizer.encode(text, add_special_tokens=False))


class _Writer:
    """Encodes the pieces of one prompt and draws its values; a value is indices of pieces."""

    def __init__(self, task: str, fmt: NeedleFormat, tokenizer: Tokenizer, rng: Generator) -> None:
        self.task, self.plan, self.fmt, self.rng = task, TASKS[task], fmt, rng
        self.encode = functools.partial(_encode, tokenizer)
        self.count = fmt.long_pieces if self.plan.long_value else fmt.short_pieces
        self.used: set[Ids] = set()
        self.value_tokens = len(self.encode(fmt.value_pieces[0] * self.count))
        for piece in range(len(fmt.value_pieces)):  # every one, whatever is drawn
            self.value_ids([piece] * self.count)

    def value_ids(self, value: Sequence[int]) -> Ids:
        ids = self.encode("".join(self.fmt.value_pieces[i] for i in value))
        if len(ids) != self.value_tokens:
            both = f"{self.value_tokens} and {len(ids)}"
            raise ValueError(f"values have different lengths, {both} tokens: no distractor fits")
        return ids

    def value(self, unlike: Ids = ()) -> Ids:
        """A value that was not drawn before, no piece of it as in `unlike` at the same place."""
        for _ in range(10_000):  # and no more: there may be no such value
            value = tuple(self.rng.integers(len(self.fmt.value_pieces), size=self.count).tolist())
            if value not in self.used and all(a != b for a, b in zip(value, unlike, strict=False)):
                self.used.add(value)
                return value
        raise ValueError(f"format has too few different values of {self.count} pieces")

    def needle(self, key: str, value: Ids) -> tuple[Ids, int]:
        """Token ids of a needle, and where in it the value starts."""
        before, after = self.fmt.needle.replace("{key}", key).split("{value}")
        head = self.encode(before)
        return head + self.value_ids(value) + self.encode(after), len(head)

    def distractors(self, keys: list[str], room: int) -> list[Ids]:
        """Token ids of the needles with other `keys`: the task's number, or as many as fit."""
        fill = self.plan.filler == "needles"
        wanted = len(keys) if fill else self.plan.distractors
        if wanted > len(keys):
            raise ValueError(f"{self.task} needs {wanted + 1} keys, the format has {len(keys) + 1}")
        others: list[Ids] = []
        for key in keys[:wanted]:
            ids, _ = self.needle(key, self.value())
            if fill and len(ids) > room:
                break
            others.append(ids)
            room -= len(ids)
        if room < 0 or (fill and not others):
            raise ValueError(f"the length is too short for a prompt of {self.task}")
        return others

    def filler(self, haystack_ids: np.ndarray, length: int) -> np.ndarray:
        """`length` tokens of real text from a random place, or of repeated noise."""
        if self.plan.filler != "text":
            return np.resize(np.asarray(self.encode(self.fmt.noise), dtype=np.int64), length)
        if length > len(haystack_ids):
            raise ValueError(f"haystack text has {len(haystack_ids)} tokens, {length} are needed")
        start = int(self.rng.integers(len(haystack_ids) - length + 1))
        return np.asarray(haystack_ids[start : start + length], dtype=np.int64)

    def places(self, others: list[Ids], room: int, depth: float) -> tuple[list[int], int]:
        """Filler tokens before each needle, out of `room`, and the queried needle's index."""
        if self.plan.filler == "needles":
            # Noise is left over because no further needle fits, and then goes to the front; or
            # because the format ran out of keys, and is then spread.
            count, spread = len(others) + 1, room > max(len(ids) for ids in others)
            places = [round(room * (i + 1) / count) if spread else room for i in range(count)]
            return places, round(depth * len(others))
        places = sorted(self.rng.integers(room + 1, size=len(others)).tolist())
        index = sum(place < round(depth * room) for place in places)
        return [*places[:index], round(depth * room), *places[index:]], index


def build_prompt(
    task: str,
    fmt: NeedleFormat,
    tokenizer: Tokenizer,
    haystack_ids: np.ndarray,
    length: int,
    depth: float,
    rng: Generator,
) -> NeedlePrompt:
    """Build one prompt of exactly `length` tokens, the answer included.

    Keys and values differ from each other within a prompt. In `niah_multikey_2` noise stands
    between the needles where the format has fewer keys than the haystack could hold.

    Args:
        task: Name in `TASKS`.
        fmt: Wording of needles and query.
        tokenizer: Encodes the pieces, without special tokens.
        haystack_ids: `[n]` real text; a random part of it becomes the haystack.
        length: Tokens in prompt and answer together.
        depth: Place of the queried needle in the haystack, 0 (first) to 1 (last).
        rng: Source of all random choices.

    Raises:
        ValueError: Unknown task; depth outside 0 to 1; `length` too short; haystack text too
            short; values of different token lengths, or too few different keys or values.
    """
    if task not in TASKS:
        raise ValueError(f"unknown needle task {task!r}; known: {', '.join(TASKS)}")
    if not 0.0 <= depth <= 1.0:
        raise ValueError(f"needle depth must be between 0 and 1, not {depth}")
    writer = _Writer(task, fmt, tokenizer, rng)
    key, *other_keys = (fmt.keys[i] for i in rng.permutation(len(fmt.keys)))
    answer = writer.value()
    distractor = writer.value(unlike=answer)
    main, value_at = writer.needle(key, answer)
    intro, query = writer.encode(fmt.intro), writer.encode(fmt.query.replace("{key}", key))
    room = length - len(intro) - len(main) - len(query) - writer.value_tokens
    others = writer.distractors(other_keys, room)
    room -= sum(len(ids) for ids in others)

    filler = writer.filler(haystack_ids, room)
    places, index = writer.places(others, room, depth)
    pieces: list[Sequence[int] | np.ndarray] = [intro]
    for start, place, ids in zip([0, *places], places, [*others[:index], main, *others[index:]], strict=False):
        pieces += [filler[start:place], ids]
    # The queried needle is piece 2 * index + 2; its value starts `value_at` tokens into it.
    start = sum(len(piece) for piece in pieces[: 2 * index + 2]) + value_at
    pieces += [filler[places[-1] :], query, writer.value_ids(answer)]
    return NeedlePrompt(
        task=task,
        key=key,
        ids=np.concatenate([np.asarray(piece, dtype=np.int64) for piece in pieces]),
        answer_start=length - writer.value_tokens,
        value_spans=((start, start + writer.value_tokens),),
        distractor=np.asarray(writer.value_ids(distractor), dtype=np.int64),
    )


def build_prompts(
    task: str,
    fmt: NeedleFormat,
    tokenizer: Tokenizer,
    haystack_ids: np.ndarray,
    length: int,
    count: int,
    seed: int,
) -> list[NeedlePrompt]:
    """Build `count` prompts whose depths are spread evenly; the same seed gives the same prompts.

    Raises:
        ValueError: As `build_prompt`.
    """
    rng = np.random.default_rng([seed, length, *task.encode()])
    depths = [(i + 0.5) / count for i in range(count)]
    return [build_prompt(task, fmt, tokenizer, haystack_ids, length, depth, rng) for depth in depths]
