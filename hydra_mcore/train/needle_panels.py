# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Needle accuracy while training: does the student still find what it read, on the layout that it trains on."""

from __future__ import annotations

import argparse
import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron.core.models.gpt import GPTModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from hydra_mcore.config import ConfigError
from hydra_mcore.errors import InputError
from hydra_mcore.evaluation.parallel import ParallelModel
from hydra_mcore.evaluation.scoring import Score, score_prompts
from hydra_mcore.ruler.material import PromptMaterial
from hydra_mcore.ruler.prompts import EVALUATION_SEEDS, PromptSet
from hydra_mcore.ruler.sets import prompt_set
from hydra_mcore.ruler.wording import own_wording
from hydra_mcore.tokenizer import load_tokenizer

TASKS = {"needle single-key": "niah_single_1", "needle multi-key": "niah_multikey_1"}  # panel -> task of RULER
SEED = EVALUATION_SEEDS // 2  # of prompts that neither evaluation nor head selection has


@dataclass(frozen=True)
class NeedlePanels:
    """What the student is asked again and again."""

    tokenizer: Tokenizer
    sets: dict[str, PromptSet]
    """By panel."""

    def scores(self, students: list[GPTModel]) -> dict[str, Score]:
        """Exact match on each panel, as ``evaluation.scoring`` has it; called by all ranks, each gets all scores.

        The students are in training mode before and after, and neither weights nor random numbers are touched.

        Args:
            students: this rank's model chunks, without the wrappers of training.
        """
        model = ParallelModel(students)
        with evaluating(students):
            return {
                panel: Score.of(
                    list(itertools.chain(*score_prompts(model, asked.prompts, self.tokenizer, by_generation=False)))
                )
                for panel, asked in self.sets.items()
            }


def make_panels(args: argparse.Namespace, checkpoint_dir: Path, vocab_size: int) -> NeedlePanels | None:
    """The prompts of each panel, hidden in noise; every rank and every restart makes the same. None unless asked for.

    Raises:
        InputError: no tokenizer beside the checkpoint, one that cannot word the prompts, or one of another model.
    """
    if not args.needle_interval:
        return None
    tokenizer, length = load_tokenizer(checkpoint_dir), args.needle_length or args.seq_length
    material = PromptMaterial(tokenizer, own_wording(checkpoint_dir), None).in_noise()
    try:
        sets = {panel: prompt_set(task, length, args.needle_prompts, SEED, material) for panel, task in TASKS.items()}
    except InputError as error:
        raise ConfigError(
            f"needle prompts of {length} tokens: {error}; change needle-length, or set needle-interval to 0"
        ) from None
    largest = max(asked.max_id for asked in sets.values())
    if largest >= vocab_size:
        raise ConfigError(
            f"the tokenizer of {checkpoint_dir} gives token {largest}, the model knows {vocab_size}; they are not of"
            " one model"
        )
    return NeedlePanels(tokenizer, sets)


@contextlib.contextmanager
def evaluating(students: list[GPTModel]) -> Iterator[None]:
    """The students in evaluation mode (no dropout), then as they were."""
    for student in students:
        student.eval()
    try:
        yield
    finally:
        for student in students:
            student.train()
