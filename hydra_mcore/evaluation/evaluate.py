# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""One exam for all models: the same prompts and the same text, made once, then each model's results."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase as Tokenizer

from hydra_mcore.config import ModelCard
from hydra_mcore.evaluation.perplexity import TextLoss, text_loss, text_windows
from hydra_mcore.evaluation.scoring import TASK_GROUPS, Score, answers_right, needle_prompts
from hydra_mcore.heads import InputError
from hydra_mcore.selection.needles import TASKS, NeedleFormat, NeedlePrompt


@dataclass(frozen=True, eq=False)
class Exam:
    """What every compared model is asked."""

    lengths: tuple[int, ...]
    seed: int
    needles: dict[tuple[str, int], list[NeedlePrompt]]  # by task and length
    text_bs: dict[int, Tensor]  # by length
    digest: str  # sha256 over all token ids: equal digests, equal exams
    max_id: int

    @classmethod
    def build(
        cls,
        tokenizer: Tokenizer,
        fmt: NeedleFormat,
        haystack_ids: np.ndarray,
        lengths: Sequence[int],
        prompts: int,
        seed: int,
    ) -> Exam:
        """Make the exam; the same arguments give the same one.

        Args:
            haystack_ids: [n] held-out text, for the needles to hide in and for perplexity.
            lengths: tokens of a prompt, and of a window of text.
            prompts: for each task and length.

        Raises:
            InputError: no lengths, one named twice, or as ``needle_prompts`` and ``text_windows``.
        """
        if not lengths or len(set(lengths)) < len(lengths):
            raise InputError(f"lengths {list(lengths)}: name at least one, each once")
        text_bs = {length: text_windows(haystack_ids, length) for length in lengths}
        pairs = [(task, length) for length in lengths for task in TASKS]
        needles = {
            (task, length): needle_prompts(task, fmt, tokenizer, haystack_ids, length, prompts, seed)
            for task, length in tqdm(pairs, desc="prompts", unit="set", disable=None)
        }
        digest, max_id = hashlib.sha256(), 0
        for ids in [*(p.ids for drawn in needles.values() for p in drawn), *(t.numpy() for t in text_bs.values())]:
            digest.update(np.ascontiguousarray(ids, dtype="<i8").tobytes())
            max_id = max(max_id, int(ids.max()))
        return cls(tuple(lengths), seed, needles, text_bs, digest.hexdigest(), max_id)

    def check_vocabulary(self, card: ModelCard, name: str) -> None:
        """Raise InputError when the exam has tokens that a model does not know."""
        if self.max_id >= card.shape.vocab_size:
            raise InputError(
                f"{name}: its vocabulary has {card.shape.vocab_size} words, the tokenizer gives token {self.max_id}; "
                "they are not of one model"
            )


@dataclass(frozen=True, kw_only=True)
class Results:
    """What a model is, and what it did in an exam."""

    fingerprint: str
    stage: str
    strategy: str
    num_fa: int
    num_heads: int  # of the whole model
    native_length: int
    exam: str  # the exam's digest
    seed: int
    needles: dict[tuple[str, int], Score]  # by task and length
    text: dict[int, TextLoss]  # by window length

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(self.text)

    def group(self, name: str, length: int) -> Score:
        """The tasks of one of ``TASK_GROUPS`` together: with equal prompts a task, their average."""
        return sum((self.needles[task, length] for task in TASK_GROUPS[name]), Score(0, 0))


def take_exam(model: torch.nn.Module, card: ModelCard, exam: Exam, name: str) -> Results:
    """A model's results, ``name`` being the progress bar's label. InputError if it lacks the exam's tokens."""
    exam.check_vocabulary(card, name)
    shape, head_map = card.shape, card.head_map
    needles, text = {}, {}
    tokens = sum(len(p.ids) for drawn in exam.needles.values() for p in drawn)
    tokens += sum(windows_bs.numel() for windows_bs in exam.text_bs.values())
    with tqdm(total=tokens, desc=name, unit="tok", unit_scale=True, disable=None) as bar:
        for (task, length), prompts in exam.needles.items():
            correct = 0
            for right in answers_right(model, prompts):
                correct += sum(right)
                bar.update(len(right) * length)
            needles[task, length] = Score(correct, len(prompts))
        for length, windows_bs in exam.text_bs.items():
            text[length] = text_loss(model, windows_bs)
            bar.update(windows_bs.numel())
    return Results(
        fingerprint=card.fingerprint,
        stage=card.stage,
        strategy=head_map.strategy,
        num_fa=head_map.num_fa,
        num_heads=shape.num_layers * shape.num_heads,
        native_length=shape.native_length,
        exam=exam.digest,
        seed=exam.seed,
        needles=needles,
        text=text,
    )
