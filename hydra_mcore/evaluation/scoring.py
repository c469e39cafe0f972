# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Exact match on needle tasks (RULER, arXiv:2404.06654), without a decoding loop.

Greedy decoding writes the answer exactly when, the answer being teacher-forced, the argmax is right at every one of
its positions: up to the first mistake both see the same tokens. So one forward pass scores a prompt.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase as Tokenizer

from hydra_mcore.evaluation.forward import logits_at, rows_a_forward
from hydra_mcore.heads import InputError
from hydra_mcore.selection.needles import TASKS, NeedleFormat, NeedlePrompt, build_prompts
from hydra_mcore.selection.probes import EVALUATION_SEEDS

TASK_GROUPS: dict[str, tuple[str, ...]] = {
    "single-key": tuple(task for task in TASKS if task.startswith("niah_single")),
    "multi-key": tuple(task for task in TASKS if task.startswith("niah_multikey")),
}
Z95 = 1.959963984540054  # two-sided 95% quantile of the normal distribution


@dataclass(frozen=True)
class Score:
    """How many of ``total`` prompts were answered exactly."""

    correct: int
    total: int

    @property
    def accuracy(self) -> float:
        return self.correct / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95% interval for the accuracy: right at 0 and 1 too, where the usual +- is empty."""
        z2, p, n = Z95 * Z95, self.accuracy, self.total
        centre = (p + z2 / (2 * n)) / (1 + z2 / n)
        half = Z95 / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
        # At 0 and 1 the bound is the accuracy itself; rounding must not put it beside.
        return (centre - half if self.correct else 0.0), (centre + half if self.correct < n else 1.0)

    def __add__(self, other: Score) -> Score:
        return Score(self.correct + other.correct, self.total + other.total)


def check_seed(seed: int) -> None:
    """Raise InputError for a seed that belongs to training or head selection."""
    if seed < EVALUATION_SEEDS:
        others = "smaller ones belong to training and head selection"
        raise InputError(f"seed {seed}: evaluation uses {EVALUATION_SEEDS} and above; {others}")


def needle_prompts(
    task: str, fmt: NeedleFormat, tokenizer: Tokenizer, haystack_ids: np.ndarray, length: int, count: int, seed: int
) -> list[NeedlePrompt]:
    """``count`` prompts of exactly ``length`` tokens, the answer included; the same seed gives the same prompts.

    Raises:
        InputError: a seed of training, no prompts, or prompts that cannot be built (too short, too little text).
    """
    check_seed(seed)
    if count < 1:
        raise InputError(f"{count} prompts a task: at least 1 is needed")
    try:
        return build_prompts(task, fmt, tokenizer, haystack_ids, length, count, seed)
    except ValueError as error:
        raise InputError(f"{task} with {length} tokens: {error}") from None


def answers_right(model: torch.nn.Module, prompts: Sequence[NeedlePrompt]) -> Iterator[list[bool]]:
    """Whether greedy decoding gives each prompt's answer, a batch at a time; ``model`` as in ``logits_at``.

    The prompts are of one task and one length, so that their answers stand at the same place.
    """
    size, start = rows_a_forward(len(prompts[0].ids)), prompts[0].answer_start
    for first in range(0, len(prompts), size):
        ids_bs = torch.from_numpy(np.stack([prompt.ids for prompt in prompts[first : first + size]]))
        predicted_bp = logits_at(model, ids_bs, slice(start - 1, ids_bs.shape[1] - 1)).argmax(-1).cpu()
        yield (predicted_bp == ids_bs[:, start:]).all(-1).tolist()
