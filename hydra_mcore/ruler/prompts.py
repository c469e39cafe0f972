# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""What every generator makes, and which generators there are."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

EVALUATION_SEEDS = 1_000_000  # the first of them: training and head selection stay below


@dataclass(frozen=True)
class Task:
    """A task of RULER.

    ``one_answer``: a right answer is one text and no other, so that teacher forcing scores it as greedy decoding would.
    """

    group: str
    one_answer: bool


TASKS = {
    "niah_single_1": Task("single-key", True),
    "niah_single_2": Task("single-key", True),
    "niah_single_3": Task("single-key", True),
    "niah_multikey_1": Task("multi-key", True),
    "niah_multikey_2": Task("multi-key", True),
    "niah_multikey_3": Task("multi-key", True),
    "niah_multivalue": Task("multi-answer", False),
    "niah_multiquery": Task("multi-answer", False),
    "vt": Task("tracking", False),
    "cwe": Task("counting", False),
    "fwe": Task("counting", False),
}
TASK_GROUPS: dict[str, tuple[str, ...]] = {
    group: tuple(name for name, task in TASKS.items() if task.group == group)
    for group in dict.fromkeys(task.group for task in TASKS.values())
}


@dataclass(frozen=True, eq=False)
class Prompt:
    """One question over a long context. ``len(ids) + room`` is the length that was asked for, exactly."""

    ids: np.ndarray
    """int32 [p]: all that the model reads, up to where its answer begins."""
    room: int
    """Tokens left for the answer."""
    answers: tuple[str, ...]
    """The texts that a right answer holds."""
    answer_ids: np.ndarray
    """int32 [room]: the one right answer as the model's tokenizer continues the prompt with it; [0] where there is not
    one.
    """
    spans: tuple[tuple[int, int], ...]
    """[start, end) in ``ids`` of the needles that give the answers, in order; () where words are counted."""
    depths: tuple[float, ...]
    """Where in the haystack each span stands: 0 at its start, 1 at its end."""


def all_ids(prompts: Iterable[Prompt]) -> list[np.ndarray]:
    """Token ids of every prompt and of its answer, in turn."""
    return list(itertools.chain.from_iterable((prompt.ids, prompt.answer_ids) for prompt in prompts))


@dataclass(frozen=True, eq=False)
class PromptSet:
    """Prompts of one task and length that every compared model with this tokenizer answers."""

    task: str
    length: int
    seed: int
    prompts: tuple[Prompt, ...]

    @cached_property
    def digest(self) -> str:
        """sha256 over all token ids and answers: equal digests, equal questions."""
        digest = hashlib.sha256()
        for prompt in self.prompts:
            digest.update(np.concatenate([prompt.ids, [-1], prompt.answer_ids]).astype("<i8").tobytes())
            digest.update("\0".join(prompt.answers).encode())
        return digest.hexdigest()

    @cached_property
    def max_id(self) -> int:
        """The largest token id, which a model's vocabulary must hold."""
        return max(int(ids.max()) for ids in all_ids(self.prompts) if len(ids))
