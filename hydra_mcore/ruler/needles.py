# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""RULER's eight needle tasks: find the values of keys that are hidden in noise, in text or among other needles.

Head selection, the needle measurement of training and evaluation all ask these prompts.
"""

from __future__ import annotations

import dataclasses
import itertools
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

from hydra_mcore.errors import InputError
from hydra_mcore.ruler.haystack import nearest, woven
from hydra_mcore.ruler.lexicon import compounds
from hydra_mcore.ruler.material import Frame, PromptMaterial
from hydra_mcore.ruler.prompts import TASKS, Prompt
from hydra_mcore.ruler.wording import fill

# And no more: a model's own wording may have no such value.
DRAWS = 10_000  # of values, for new ones
TRIES = 1_000  # of new values, for one of as many tokens as another


@dataclass(frozen=True)
class NeedleTask:
    """What one task hides."""

    filler: str
    """noise (one line again and again), text, or needles (with other keys, as many as fit)."""
    asked: int = 1
    """Needles that the answers stand in."""
    others: int = 0
    """Needles with other keys, where the filler is not needles."""
    one_key: bool = False
    """All that are asked for have the same key."""
    uuid_keys: bool = False
    uuid_values: bool = False

    @property
    def placed(self) -> int:
        """Needles whose depths are chosen."""
        return self.asked + self.others


NEEDLE_TASKS = {
    "niah_single_1": NeedleTask("noise"),
    "niah_single_2": NeedleTask("text"),
    "niah_single_3": NeedleTask("text", uuid_values=True),
    "niah_multikey_1": NeedleTask("text", others=3),
    "niah_multikey_2": NeedleTask("needles"),
    "niah_multikey_3": NeedleTask("needles", uuid_keys=True, uuid_values=True),
    "niah_multivalue": NeedleTask("text", asked=4, one_key=True),
    "niah_multiquery": NeedleTask("text", asked=4),
}


def needle_prompt(task: str, length: int, material: PromptMaterial, depths: Sequence[float], rng: Generator) -> Prompt:
    """One prompt of exactly ``length`` tokens, room included. All its keys and all its values differ.

    Args:
        depths: of each of the task's ``placed`` needles, those asked for first.

    Raises:
        InputError: the task needs text and there is none, or too little; too short a length; too few keys or values; a
            tokenizer that cannot write the pieces or splits the answer.
    """
    draw = _Draw(task, material, rng)
    return _hidden(length, depths, draw, draw.placed())


def needle_pair(
    task: str, length: int, material: PromptMaterial, depths: Sequence[float], rng: Generator
) -> tuple[Prompt, Prompt]:
    """The prompt that ``needle_prompt`` makes of the same arguments, and its counterfactual with another value.

    Both have the same tokens but for those of the value, in the needle and in the answer, and of these equally many.
    A number has no digit, a value of a model's own wording no piece in the same place as the other value.

    Raises:
        InputError: as ``needle_prompt``; a task that asks for several values; no other value of as many tokens.
    """
    if not TASKS[task].one_answer:
        raise InputError(f"{task} asks for several values; a counterfactual replaces one")
    draw = _Draw(task, material, rng)
    pairs = draw.placed()
    prompt = _hidden(length, depths, draw, pairs)
    (key, value), ((start, end),) = pairs[0], prompt.spans
    for other in itertools.islice(draw.unlike(value), TRIES):
        (needle,), frame = draw.needles([(key, other)]), _frame(task, length, material, [(key, other)])
        if (len(needle), frame.room) == (end - start, prompt.room):
            ids = prompt.ids.copy()
            ids[start:end] = needle
            answer_ids = np.asarray(frame.answer_ids, dtype=np.int32)
            return prompt, dataclasses.replace(prompt, ids=ids, answers=frame.answers, answer_ids=answer_ids)
    raise InputError(f"{task}: the wording {material.wording.name} has no value of as many tokens as {value.strip()!r}")


def _hidden(length: int, depths: Sequence[float], draw: _Draw, pairs: Sequence[tuple[str, str]]) -> Prompt:
    """The prompt that hides these (key, value), those asked for first."""
    task, needle_task, material, rng, haystack = draw.task, draw.needle_task, draw.material, draw.rng, draw.haystack
    frame = _frame(task, length, material, pairs[: needle_task.asked])
    needles = draw.needles(pairs)
    taken = sum(map(len, needles))
    frame.require(taken + (len(needles[0]) if needle_task.filler == "needles" else 1))

    if needle_task.filler == "needles":
        others = draw.others(frame.space - taken, len(needles[0]))
        frame.require(taken if others else frame.space + 1)
        filler, _ = haystack.part(frame.space - taken - sum(map(len, others)), rng)
        index = round(depths[0] * len(others))
        # What is left over is less than a needle and goes behind them all; or the wording ran out of keys, and it is
        # spread.
        spread = len(filler) > max(map(len, others))
        places = [len(filler) * i // (len(others) + 1) if spread else 0 for i in range(len(others) + 1)]
        body, spans = woven(filler, [*others[:index], *needles, *others[index:]], places)
        return frame.prompt(body, spans[index : index + 1])
    filler, ends = haystack.part(frame.space - taken, rng)
    body, spans = woven(filler, needles, nearest(ends, depths))
    return frame.prompt(body, spans[: needle_task.asked])


def _frame(task: str, length: int, material: PromptMaterial, asked: Sequence[tuple[str, str]]) -> Frame:
    """The frame of a prompt that asks for these (key, value)."""
    needle_task, wording = NEEDLE_TASKS[task], material.wording
    keys, values = list(dict.fromkeys(key for key, _ in asked)), [value for _, value in asked]
    query = ", ".join(keys[:-1]) + ", and " + keys[-1] if len(keys) > 1 else keys[0]
    kind = "uuid" if needle_task.uuid_values else "number"
    ask = (wording.one if TASKS[task].one_answer else wording.many).filled(query=query, kind=kind, kinds=kind + "s")
    if needle_task.filler == "text":  # lines bring the gap before them along
        ask = dataclasses.replace(ask, intro=ask.intro + wording.line_gap)
    return Frame.of(material, task, length, ask, [value.strip() for value in values], written=", ".join(values))


class _Draw:
    """Draws the keys and values of one prompt, each once."""

    def __init__(self, task: str, material: PromptMaterial, rng: Generator) -> None:
        self.task, self.needle_task, self.material, self.rng = task, NEEDLE_TASKS[task], material, rng
        in_text = self.needle_task.filler == "text"
        if in_text and material.haystack is None:
            raise InputError(f"{task} hides its needles in text; give it some with --text FILE")
        self.haystack = material.haystack if in_text else material.noise
        self._gap = material.wording.text_gap if in_text else material.wording.line_gap
        self._own = material.wording.own
        self._keys = rng.permutation(self._own.keys).tolist() if self._own else []
        self._used: set[str] = set()
        self._pieces: dict[str, tuple[str, ...]] = {}  # of each value

    def placed(self) -> list[tuple[str, str]]:
        """(key, value) of the needles whose depths are chosen, those asked for first."""
        needle_task = self.needle_task
        keys = self._fresh_keys(wanted := 1 + needle_task.others if needle_task.one_key else needle_task.placed)
        if len(keys) < wanted:
            raise InputError(
                f"{self.task} needs {wanted} keys, the wording {self.material.wording.name} has {len(keys)}"
            )
        keys = keys[:1] * needle_task.asked + keys[1:] if needle_task.one_key else keys
        return list(zip(keys, self._fresh_values(len(keys)), strict=True))

    def others(self, space: int, size: int) -> list[list[int]]:
        """Needles with other keys, as many as fit or as there are keys; about ``size`` tokens each."""
        found: list[list[int]] = []
        while keys := self._fresh_keys(space // size + 1):
            for ids in self.needles(list(zip(keys, self._fresh_values(len(keys)), strict=True))):
                if len(ids) > space:
                    return found
                found.append(ids)
                space -= len(ids)
        return found

    def needles(self, pairs: Sequence[tuple[str, str]]) -> list[list[int]]:
        template = self._gap + self.material.wording.needle
        kinds = "uuids" if self.needle_task.uuid_values else "numbers"
        return self.material.pieces.batch([fill(template, key=key, value=value, kinds=kinds) for key, value in pairs])

    def unlike(self, value: str) -> Iterator[str]:
        """New values with no piece of this one in its place, as many as ``DRAWS`` draws find."""
        pieces = self._pieces[value]
        for _ in range(DRAWS):
            other = self._fresh_value()
            if other and all(one != two for one, two in zip(pieces, self._pieces[other], strict=True)):
                yield other

    def _fresh_keys(self, count: int) -> list[str]:
        """``count`` new keys, or as many as a model's own wording has left."""
        if self._own:
            keys, self._keys = self._keys[:count], self._keys[count:]
        elif self.needle_task.uuid_keys:
            keys = [self._uuid() for _ in range(count)]
        else:
            keys = compounds(count, self.rng, self._used)
        self._used.update(keys)
        return keys

    def _fresh_values(self, count: int) -> list[str]:
        """``count`` new values."""
        found: list[str] = []
        for _ in range(count + DRAWS):
            if len(found) == count:
                return found
            if value := self._fresh_value():
                found.append(value)
        raise InputError(
            f"{self.task}: the wording {self.material.wording.name} has too few values that its haystack does not hold"
        )

    def _fresh_value(self) -> str | None:
        """A value, unless the draw gives one that was there before or stands in the haystack's text."""
        pieces = self._value()
        value = "".join(pieces)
        if value in self._used or value.strip() in self.haystack.text:
            return None
        self._used.add(value)
        self._pieces[value] = pieces
        return value

    def _value(self) -> tuple[str, ...]:
        """The pieces of a value: those of a model's own wording, the digits of a number, a whole uuid."""
        if self._own:
            count = self._own.long_pieces if self.needle_task.uuid_values else self._own.short_pieces
            drawn = self.rng.integers(len(self._own.value_pieces), size=count)
            return tuple(self._own.value_pieces[i] for i in drawn)
        return (self._uuid(),) if self.needle_task.uuid_values else tuple(str(self.rng.integers(10**6, 10**7)))

    def _uuid(self) -> str:
        return str(uuid.UUID(bytes=self.rng.bytes(16), version=4))
