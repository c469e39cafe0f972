# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""One exam for all models: the same prompts and text for every model of a tokenizer, each piece kept as soon as it is
done.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase as Tokenizer

from hydra_mcore.errors import InputError
from hydra_mcore.evaluation.loading import open_model
from hydra_mcore.evaluation.models import EvaluatedModel, ModelFacts
from hydra_mcore.evaluation.perplexity import TextLoss, text_windows, window_losses
from hydra_mcore.evaluation.records import TEXT, Contestant, Piece, Records
from hydra_mcore.evaluation.scoring import check_seed, score_prompts
from hydra_mcore.model.precision import DTYPES
from hydra_mcore.model.runtime import from_first_rank
from hydra_mcore.progress import Progress
from hydra_mcore.ruler.haystack import read_haystack
from hydra_mcore.ruler.material import PromptMaterial, tokenizer_fingerprint
from hydra_mcore.ruler.prompts import TASK_GROUPS, TASKS, PromptSet
from hydra_mcore.ruler.sets import prompt_set
from hydra_mcore.ruler.wording import load_wording
from hydra_mcore.tokenizer import open_tokenizer


@dataclass(frozen=True, kw_only=True)
class Exam:
    """What every model is asked.

    Raises:
        InputError: no lengths, one named twice, no prompts, an unknown task, a task that cannot be scored as asked, a
            seed of training.
    """

    tasks: tuple[str, ...]
    """Of ``TASKS``."""
    lengths: tuple[int, ...]
    """Tokens of a prompt, and of a window of text."""
    prompts: int
    """For each task and length."""
    seed: int
    cache: Path
    """Folder for finished sets of prompts."""
    scoring: str | None = None
    """For all tasks: "teacher-forced" or "generation"; None: teacher forcing wherever it is exact."""
    text: Path | None = None
    """UTF-8 text to hide needles in, and to predict."""
    repeat_text: bool = False
    template: str | None = None
    """Wording of the prompts, as in ``load_wording``."""
    today: Callable[[], date] = date.today
    """The day that chat templates name."""
    text_loss: bool = True
    """Whether the text is to be predicted, too."""

    def __post_init__(self) -> None:
        if not self.lengths or len(set(self.lengths)) < len(self.lengths) or min(self.lengths) < 1:
            raise InputError(f"lengths {list(self.lengths)}: name at least one, each once")
        if self.prompts < 1:
            raise InputError(f"{self.prompts} prompts a task: at least 1 is needed")
        check_seed(self.seed)
        if self.text_loss and self.text is None:
            raise InputError("the loss on text needs --text FILE, held out; or leave the loss out with --no-text-loss")
        for task in self.tasks:
            if self.scoring == "teacher-forced" and not TASKS[task].one_answer:
                raise InputError(
                    f"{task} has more than one right text, so teacher forcing cannot score it; leave --scoring out"
                )

    def scoring_of(self, task: str) -> str:
        return self.scoring or ("teacher-forced" if TASKS[task].one_answer else "generation")


def named_tasks(names: Sequence[str]) -> tuple[str, ...]:
    """The tasks of some names of tasks or groups, or of "all", in the order of ``TASKS``; InputError for an unknown
    name.
    """
    known = {"all": tuple(TASKS)} | TASK_GROUPS | {task: (task,) for task in TASKS}
    for name in names:
        if name not in known:
            raise InputError(f"--tasks {name}: unknown; choose from {', '.join(known)}")
    chosen = set(itertools.chain.from_iterable(known[name] for name in names))
    return tuple(task for task in TASKS if task in chosen)


class Papers:
    """An exam in the words of each model's tokenizer. Texts and prompts are made by the first rank, which alone holds
    texts.
    """

    def __init__(self, exam: Exam) -> None:
        self.exam = exam
        self._materials: dict[str, PromptMaterial] = {}  # by the tokenizer's fingerprint
        self._pieces: dict[str, list[Piece]] = {}

    def enter(self, name: str, facts: ModelFacts, dtype: str) -> tuple[Contestant, list[Piece]]:
        """A model as a contestant, and the pieces it is asked; called alike on all ranks.

        Raises:
            InputError: prompts or windows that cannot be made, or that have tokens which the model does not know.
        """
        tokenizer = from_first_rank(partial(self._read, facts))
        if tokenizer not in self._pieces:
            tasks = (*self.exam.tasks, *((TEXT,) if self.exam.text_loss else ()))
            asked = list(itertools.product(self.exam.lengths, tasks))
            # one by one, since ranks that wait for very long are taken for dead
            bar = Progress(asked, desc="prompts", unit="set", disable=_hidden())
            self._pieces[tokenizer] = [
                from_first_rank(partial(self._piece, tokenizer, task, length)) for length, task in bar
            ]
        pieces = self._pieces[tokenizer]
        if (largest := max((piece.max_id for piece in pieces), default=0)) >= facts.vocab_size:
            vocabulary = f"its vocabulary has {facts.vocab_size} words, the tokenizer gives token {largest}"
            raise InputError(f"{name}: {vocabulary}; they are not of one model")
        return Contestant(name=name, facts=facts, dtype=dtype, tokenizer=tokenizer), pieces

    def prompts(self, tokenizer: str, task: str, length: int) -> PromptSet:
        """From the cache, or made; on the first rank."""
        return prompt_set(task, length, self.exam.prompts, self.exam.seed, self._materials[tokenizer], self.exam.cache)

    def windows(self, tokenizer: str, length: int) -> Tensor:
        """The text to predict, int64 [b, s]; on the first rank."""
        return text_windows(self._materials[tokenizer].haystack.ids, length)

    def _read(self, facts: ModelFacts) -> str:
        """The fingerprint of a model's tokenizer, and what prompts are made of with it."""
        tokenizer = open_tokenizer(facts.tokenizer_dir)
        fingerprint = tokenizer_fingerprint(tokenizer)
        if fingerprint not in self._materials:
            haystack = read_haystack(tokenizer, self.exam.text, self.exam.repeat_text)
            wording = load_wording(self.exam.template, tokenizer, facts.tokenizer_dir, self.exam.today)
            self._materials[fingerprint] = PromptMaterial(tokenizer, wording, haystack)
        return fingerprint

    def _piece(self, tokenizer: str, task: str, length: int) -> Piece:
        where = {"task": task, "length": length, "tokenizer": tokenizer}
        if task == TEXT:
            windows_bs = self.windows(tokenizer, length)
            digest, largest = (
                hashlib.sha256(windows_bs.numpy().astype("<i8").tobytes()).hexdigest(),
                int(windows_bs.max()),
            )
            return Piece(
                **where, count=len(windows_bs), scoring="loss", wording="", seed=0, digest=digest, max_id=largest
            )
        made, wording = self.prompts(tokenizer, task, length), self._materials[tokenizer].wording
        return Piece(
            **where,
            count=len(made.prompts),
            scoring=self.exam.scoring_of(task),
            wording=f"{wording.name} ({wording.digest[:8]})",
            seed=self.exam.seed,
            digest=made.digest,
            max_id=made.max_id,
        )


def take_exam(papers: Papers, todo: Mapping[Contestant, Sequence[Piece]], records: Records) -> None:
    """Let models answer what they are asked, one model in memory at a time; called alike on all ranks.

    The first rank keeps each piece as soon as it is done, and shows the progress.

    Raises:
        InputError: a layout that cannot hold a model, or weights that do not fit it.
    """
    tokens = sum(piece.count * piece.length for piece in itertools.chain.from_iterable(todo.values()))
    with Progress(total=tokens, desc="evaluate", unit="tok", unit_scale=True, disable=_hidden()) as bar:
        for contestant, pieces in todo.items():
            if not pieces:
                continue
            bar.set_description(contestant.name)
            tokenizer = open_tokenizer(contestant.facts.tokenizer_dir)
            model = open_model(contestant.facts, DTYPES[contestant.dtype])
            for piece in pieces:
                take = _predict if piece.task == TEXT else _answer
                found, likeliest_bs = take(model, papers, piece, tokenizer, bar)
                likeliest_bs = likeliest_bs if piece.length <= contestant.facts.native_length else None
                from_first_rank(partial(records.keep, contestant, piece, found, likeliest_bs))
            del model  # before the next one needs its memory


def _hidden() -> bool:
    """Progress is hidden but on the first rank."""
    return torch.distributed.get_rank() != 0


def _answer(
    model: EvaluatedModel, papers: Papers, piece: Piece, tokenizer: Tokenizer, bar: Progress
) -> tuple[list[float], None]:
    """Each prompt's score."""
    asked = from_first_rank(partial(papers.prompts, piece.tokenizer, piece.task, piece.length))
    found: list[float] = []
    for scores in score_prompts(model, asked.prompts, tokenizer, piece.scoring == "generation"):
        found += scores
        bar.update(len(scores) * piece.length)
    return found, None


def _predict(
    model: EvaluatedModel, papers: Papers, piece: Piece, tokenizer: Tokenizer, bar: Progress
) -> tuple[TextLoss, np.ndarray]:
    """The loss on text, and the likeliest tokens, int32 [b, s - 1]."""
    windows_bs = from_first_rank(partial(papers.windows, piece.tokenizer, piece.length))
    found: list[tuple[tuple[float, ...], np.ndarray]] = []
    for windows in window_losses(model, windows_bs):
        found += windows
        bar.update(len(windows) * piece.length)
    text_bytes = sum(
        len(tokenizer.decode(ids_s[1:], clean_up_tokenization_spaces=False).encode()) for ids_s in windows_bs
    )
    return TextLoss(piece.length, tuple(means for means, _ in found), text_bytes), np.stack(
        [likeliest_s for _, likeliest_s in found]
    )
