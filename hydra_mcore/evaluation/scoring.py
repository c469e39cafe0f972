# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""How much of RULER's prompts (arXiv:2404.06654) a model answers, by decoding only where decoding is needed.

Where one text alone is right, greedy decoding writes it exactly when, the answer being teacher-forced, the argmax is
right
at every one of its tokens: up to the first mistake both see the same tokens. So one forward pass scores such a prompt.
Everywhere else the model decodes greedily, and the score is the share of the answers that its text holds (RULER's
string_match_all).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase as Tokenizer

from hydra_mcore.costs.batch_sizes import rows_a_forward
from hydra_mcore.errors import InputError
from hydra_mcore.evaluation.models import EvaluatedModel
from hydra_mcore.files import LARGEST_INT
from hydra_mcore.ruler.prompts import EVALUATION_SEEDS, Prompt

Z95 = 1.959963984540054  # two-sided 95% quantile of the normal distribution


@dataclass(frozen=True)
class Score:
    """The sum of ``total`` prompts' scores, each between 0 and 1."""

    correct: float
    total: int

    @classmethod
    def of(cls, scores: Sequence[float]) -> Score:
        return cls(math.fsum(scores), len(scores))

    @property
    def accuracy(self) -> float:
        return self.correct / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95% interval for the accuracy: right at 0 and 1 too, where the usual +- is empty.

        Scores between 0 and 1 vary at most as much as right-or-wrong ones of the same mean, so with them it is too
        wide, if anything.
        """
        z2, p, n = Z95 * Z95, self.accuracy, self.total
        centre = (p + z2 / (2 * n)) / (1 + z2 / n)
        half = Z95 / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
        # At 0 and 1 the bound is the accuracy itself; rounding must not put it beside.
        return (centre - half if self.correct > 0 else 0.0), (centre + half if self.correct < n else 1.0)

    def __add__(self, other: Score) -> Score:
        return Score(self.correct + other.correct, self.total + other.total)


def check_seed(seed: int) -> None:
    """Raise InputError for a seed that belongs to training or head selection."""
    if seed < EVALUATION_SEEDS:
        others = "smaller ones belong to training and head selection"
        raise InputError(f"seed {seed}: evaluation uses {EVALUATION_SEEDS} and above; {others}")
    if seed > LARGEST_INT:
        raise InputError(f"seed {seed}: give one of at most {LARGEST_INT}, which every JSON reader keeps exact")


def score_prompts(
    model: EvaluatedModel, prompts: Sequence[Prompt], tokenizer: Tokenizer, by_generation: bool
) -> Iterator[list[float]]:
    """Each prompt's score from 0 to 1, in order, a batch at a time; replicas of the model share each batch out.

    Args:
        prompts: of one length, answers included. Called alike on all ranks.
        by_generation: decode where teacher forcing would do, too. A prompt with one right answer must then be answered
            by exactly its tokens, at once, so that both ways agree.
    """
    stop = frozenset() if tokenizer.eos_token_id is None else frozenset([tokenizer.eos_token_id])

    def scores(batch: Sequence[Prompt]) -> list[float]:
        if not by_generation and all(len(prompt.answer_ids) for prompt in batch):
            return _teacher_forced(model, batch)
        found: dict[int, float] = {}
        # the answers of a task may differ in tokens, and then so do the prompts before them
        for _, alike in groupby(
            sorted(range(len(batch)), key=lambda i: _sizes(batch[i])), key=lambda i: _sizes(batch[i])
        ):
            places = list(alike)
            found |= zip(places, _generated(model, [batch[i] for i in places], tokenizer, stop), strict=True)
        return [found[place] for place in range(len(batch))]

    return shared_out(model, prompts, rows_a_forward(len(prompts[0].ids) + prompts[0].room), scores)


def shared_out[T, R](
    model: EvaluatedModel, items: Sequence[T], size: int, work: Callable[[Sequence[T]], list[R]]
) -> Iterator[list[R]]:
    """The results of ``work`` on every item, in order. Each replica works on up to ``size`` items at a time; then all
    replicas get the results of all.
    """
    for first in range(0, len(items), size * model.replicas):
        batch = items[first : first + size * model.replicas]
        mine = batch[model.replica :: model.replicas]
        by_replica = model.collect(work(mine) if len(mine) else [])
        yield [by_replica[place % model.replicas][place // model.replicas] for place in range(len(batch))]


def _sizes(prompt: Prompt) -> tuple[int, int]:
    return len(prompt.ids), prompt.room


def _teacher_forced(model: EvaluatedModel, prompts: Sequence[Prompt]) -> list[float]:
    ids_bs = torch.from_numpy(np.stack([np.concatenate([p.ids, p.answer_ids]).astype(np.int64) for p in prompts]))
    start = min(len(prompt.ids) for prompt in prompts)
    right_bs = model.predicted(ids_bs, start) == ids_bs[:, start:]
    return [float(right_s[len(prompt.ids) - start :].all()) for prompt, right_s in zip(prompts, right_bs, strict=True)]


def _generated(
    model: EvaluatedModel, prompts: Sequence[Prompt], tokenizer: Tokenizer, stop: frozenset[int]
) -> list[float]:
    """The scores of a batch of prompts that have one length and one room for the answer, from greedy decoding."""
    ids_bs = torch.from_numpy(np.stack([prompt.ids for prompt in prompts]).astype(np.int64))
    written_bs = model.generated(ids_bs, prompts[0].room, stop).numpy()
    return [_answered(prompt, ids, tokenizer) for prompt, ids in zip(prompts, written_bs, strict=True)]


def _answered(prompt: Prompt, written: np.ndarray, tokenizer: Tokenizer) -> float:
    if len(prompt.answer_ids):
        return float(np.array_equal(written[: len(prompt.answer_ids)], prompt.answer_ids))
    text = tokenizer.decode(written, skip_special_tokens=True).casefold()
    return sum(answer.casefold() in text for answer in prompt.answers) / len(prompt.answers)
