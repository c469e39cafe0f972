# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""What prompts are made of, and the frame around a haystack: question, answer and the tokens that are left between."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from transformers import PreTrainedTokenizerBase as Tokenizer

from hydra_mcore.errors import InputError
from hydra_mcore.ruler.haystack import Haystack, repeated
from hydra_mcore.ruler.pieces import Pieces
from hydra_mcore.ruler.prompts import TASKS, Prompt
from hydra_mcore.ruler.wording import Ask, Wording

# RULER's tokens_to_generate; a tokenizer that writes the answers in more gets more.
ROOM = {"niah_multivalue": 128, "niah_multiquery": 128, "vt": 30, "cwe": 120, "fwe": 50}


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """sha256 of all that decides how a tokenizer encodes: equal fingerprints, equal token ids."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # one in Python
        added = [str(tokenizer.added_tokens_decoder), str(tokenizer.init_kwargs), type(tokenizer).__name__]
        parts = {"vocab": tokenizer.get_vocab(), "added": added, "start": tokenizer.encode("")}
    else:
        # Truncation and padding are left in the backend by whoever encoded last.
        parts = json.loads(backend.to_str()) | {"truncation": None, "padding": None}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, eq=False)
class PromptMaterial:
    """All that prompts are made of, but task, length and seed."""

    tokenizer: Tokenizer
    wording: Wording
    haystack: Haystack | None
    """None does for tasks that hide nothing in text."""

    @cached_property
    def pieces(self) -> Pieces:
        return Pieces(self.tokenizer)

    @cached_property
    def noise(self) -> Haystack:
        """Lines of noise, for the needle tasks."""
        return repeated(self.wording.line_gap + self.wording.noise, self.pieces)

    def in_noise(self) -> PromptMaterial:
        """This material with noise as its haystack, for every task that hides its needles in text."""
        return dataclasses.replace(self, haystack=self.noise)

    @cached_property
    def digest(self) -> str:
        """sha256 over tokenizer, wording and haystack."""
        parts = [
            tokenizer_fingerprint(self.tokenizer),
            self.wording.digest,
            self.haystack.digest if self.haystack else "",
        ]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


@dataclass(frozen=True, eq=False)
class Frame:
    """A prompt but for its haystack."""

    task: str
    length: int
    head: list[int]
    tail: list[int]
    room: int
    answers: tuple[str, ...]
    answer_ids: list[int]

    @classmethod
    def of(
        cls,
        material: PromptMaterial,
        task: str,
        length: int,
        ask: Ask,
        answers: Sequence[str],
        written: str,
        example: str = "",
    ) -> Frame:
        """Encode what stands around the haystack.

        Args:
            ask: with all its placeholders filled.
            answers: the texts that a right answer holds.
            written: all of them as a model writes them.
            example: a solved question that goes before this one.

        Raises:
            InputError: the tokenizer has no one way to write a task's one answer.
        """
        before, after = material.wording.chat
        prefix = ask.prefix.lstrip() if after else ask.prefix
        tail, written = ask.question + after + prefix.rstrip(), prefix[len(prefix.rstrip()) :] + written
        one_answer = TASKS[task].one_answer
        answer_ids = material.pieces.continuation(tail, written) if one_answer else []
        room = len(answer_ids) if one_answer else max(ROOM[task], len(material.pieces.ids(" " + written.lstrip())))
        head = material.pieces.first(before + example + ask.intro)
        return cls(task, length, head, material.pieces.ids(tail), room, tuple(answers), answer_ids)

    @property
    def space(self) -> int:
        """Tokens for the haystack; negative where the rest alone is too long."""
        return self.length - self.room - len(self.head) - len(self.tail)

    def require(self, tokens: int) -> None:
        """Raise InputError where the haystack has no space for so many tokens."""
        if self.space < tokens:
            least = self.length - self.space + tokens
            raise InputError(f"{self.task} with {self.length} tokens: too short, this tokenizer needs at least {least}")

    def prompt(self, body: np.ndarray, spans: Sequence[tuple[int, int]] = ()) -> Prompt:
        """The prompt with a haystack.

        Args:
            body: int32 [space].
            spans: [start, end) in it of the needles that give the answers.
        """
        depths = tuple(start / max(1, len(body) - (end - start)) for start, end in spans)
        return Prompt(
            ids=np.concatenate([np.asarray(part, dtype=np.int32) for part in (self.head, body, self.tail)]),
            room=self.room,
            answers=self.answers,
            answer_ids=np.asarray(self.answer_ids, dtype=np.int32),
            spans=tuple((start + len(self.head), end + len(self.head)) for start, end in spans),
            depths=depths,
        )
