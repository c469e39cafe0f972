# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""RULER's eight needle tasks: find the values of keys that are hidden in noise, in text or among other needles."""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from numpy.random import Generator

from hydra_mcore.errors import InputError
from hydra_mcore.ruler.haystack import Haystack, nearest, woven
from hydra_mcore.ruler.lexicon import compounds
from hydra_mcore.ruler.prompts import TASKS, Prompt
from hydra_mcore.ruler.source import Frame, Source
from hydra_mcore.ruler.wording import fill


@dataclass(frozen=True)
class Plan:
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


PLANS = {
    "niah_single_1": Plan("noise"),
    "niah_single_2": Plan("text"),
    "niah_single_3": Plan("text", uuid_values=True),
    "niah_multikey_1": Plan("text", others=3),
    "niah_multikey_2": Plan("needles"),
    "niah_multikey_3": Plan("needles", uuid_keys=True, uuid_values=True),
    "niah_multivalue": Plan("text", asked=4, one_key=True),
    "niah_multiquery": Plan("text", asked=4),
}


def needle_prompt(task: str, length: int, source: Source, depths: Sequence[float], rng: Generator) -> Prompt:
    """One prompt of exactly ``length`` tokens, room included. All its keys and all its values differ.

    Args:
        depths: of each of the plan's ``placed`` needles, those asked for first.

    Raises:
        InputError: the task needs text and there is none, or too little; too short a length; too few keys or values; a
            tokenizer that cannot write the pieces or splits the answer.
    """
    plan, wording = PLANS[task], source.wording
    haystack = source.haystack if plan.filler == "text" else source.noise
    if haystack is None:
        raise InputError(f"{task} hides its needles in text; give it some with --haystack FILE")
    draw = _Draw(task, source, haystack, rng)
    pairs = draw.placed()
    frame = _frame(task, length, source, pairs[: plan.asked])
    gap = wording.text_gap if plan.filler == "text" else wording.line_gap
    needles = draw.needles(pairs, gap)
    taken = sum(map(len, needles))
    frame.require(taken + (len(needles[0]) if plan.filler == "needles" else 1))

    if plan.filler == "needles":
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
    return frame.prompt(body, spans[: plan.asked])


def _frame(task: str, length: int, source: Source, asked: Sequence[tuple[str, str]]) -> Frame:
    """The frame of a prompt that asks for these (key, value)."""
    plan, wording = PLANS[task], source.wording
    keys, values = list(dict.fromkeys(key for key, _ in asked)), [value for _, value in asked]
    query = ", ".join(keys[:-1]) + ", and " + keys[-1] if len(keys) > 1 else keys[0]
    kind = "uuid" if plan.uuid_values else "number"
    ask = (wording.one if TASKS[task].one_answer else wording.many).filled(query=query, kind=kind, kinds=kind + "s")
    if plan.filler == "text":  # lines bring the gap before them along
        ask = dataclasses.replace(ask, intro=ask.intro + wording.line_gap)
    return Frame.of(source, task, length, ask, [value.strip() for value in values], written=", ".join(values))


class _Draw:
    """Draws the keys and values of one prompt, each once."""

    def __init__(self, task: str, source: Source, haystack: Haystack, rng: Generator) -> None:
        self._task, self._plan, self._source, self._own, self._rng = task, PLANS[task], source, source.wording.own, rng
        self._text = haystack.text
        self._keys = rng.permutation(self._own.keys).tolist() if self._own else []
        self._used: set[str] = set()

    def placed(self) -> list[tuple[str, str]]:
        """(key, value) of the needles whose depths are chosen, those asked for first."""
        plan = self._plan
        keys = self._fresh_keys(wanted := 1 + plan.others if plan.one_key else plan.placed)
        if len(keys) < wanted:
            raise InputError(
                f"{self._task} needs {wanted} keys, the wording {self._source.wording.name} has {len(keys)}"
            )
        keys = keys[:1] * plan.asked + keys[1:] if plan.one_key else keys
        return list(zip(keys, self._fresh_values(len(keys)), strict=True))

    def others(self, space: int, size: int) -> list[list[int]]:
        """Needles with other keys, as many as fit or as there are keys; about ``size`` tokens each."""
        found: list[list[int]] = []
        while keys := self._fresh_keys(space // size + 1):
            for ids in self.needles(
                list(zip(keys, self._fresh_values(len(keys)), strict=True)), self._source.wording.line_gap
            ):
                if len(ids) > space:
                    return found
                found.append(ids)
                space -= len(ids)
        return found

    def needles(self, pairs: Sequence[tuple[str, str]], gap: str) -> list[list[int]]:
        template = gap + self._source.wording.needle
        kinds = "uuids" if self._plan.uuid_values else "numbers"
        return self._source.pieces.batch([fill(template, key=key, value=value, kinds=kinds) for key, value in pairs])

    def _fresh_keys(self, count: int) -> list[str]:
        """``count`` new keys, or as many as a model's own wording has left."""
        if self._own:
            keys, self._keys = self._keys[:count], self._keys[count:]
        elif self._plan.uuid_keys:
            keys = [self._uuid() for _ in range(count)]
        else:
            keys = compounds(count, self._rng, self._used)
        self._used.update(keys)
        return keys

    def _fresh_values(self, count: int) -> list[str]:
        """``count`` new values that do not stand in the haystack's text."""
        found: list[str] = []
        for _ in range(count + 10_000):  # and no more: a model's own wording may have no such value
            if len(found) == count:
                return found
            value = self._value()
            if value not in self._used and value.strip() not in self._text:
                self._used.add(value)
                found.append(value)
        raise InputError(
            f"{self._task}: the wording {self._source.wording.name} has too few values that its haystack does not hold"
        )

    def _value(self) -> str:
        if self._own:
            count = self._own.long_pieces if self._plan.uuid_values else self._own.short_pieces
            return "".join(
                self._own.value_pieces[i] for i in self._rng.integers(len(self._own.value_pieces), size=count)
            )
        return self._uuid() if self._plan.uuid_values else str(self._rng.integers(10**6, 10**7))

    def _uuid(self) -> str:
        return str(uuid.UUID(bytes=self._rng.bytes(16), version=4))
