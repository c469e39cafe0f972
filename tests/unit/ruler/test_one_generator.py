# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Head selection, training and evaluation ask the same prompts of a task, and counterfactuals differ in a value."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import numpy as np
import pytest

from hydra_mcore.ruler.haystack import Haystack, read_text
from hydra_mcore.ruler.material import PromptMaterial
from hydra_mcore.ruler.needles import NEEDLE_TASKS
from hydra_mcore.ruler.prompts import TASKS, PromptSet
from hydra_mcore.ruler.sets import draw_pairs, prompt_set
from hydra_mcore.ruler.wording import RULER, Wording, own_wording
from hydra_mcore.selection.capabilities import BUILT_IN, RETRIEVAL
from hydra_mcore.selection.probes import build_probes
from hydra_mcore.tokenizer import open_tokenizer
from hydra_mcore.train.needle_panels import TASKS as PANELS
from hydra_mcore.train.needle_panels import make_panels
from tests.support.paths import TINY_TEACHER
from tests.support.small_tokenizers import KINDS, haystack, small_tokenizer

WORDINGS = ["tiny", *KINDS]  # the tiny teacher's own, and RULER's for tokenizers of every kind
ONE_ANSWER = [task for task in NEEDLE_TASKS if TASKS[task].one_answer]
LENGTH, COUNT, SEED = 1500, 4, 7


@pytest.fixture(scope="module")
def sources() -> dict[str, PromptMaterial]:
    tokenizer = open_tokenizer(TINY_TEACHER)
    tiny = PromptMaterial(tokenizer, own_wording(TINY_TEACHER), Haystack.of(tokenizer, read_text(tokenizer)[:20_000]))
    return {"tiny": tiny, **{kind: PromptMaterial(small_tokenizer(kind), RULER, haystack(kind)) for kind in KINDS}}


def whole_prompts(asked: PromptSet) -> list[list[int]]:
    return sorted([*prompt.ids.tolist(), *prompt.answer_ids.tolist()] for prompt in asked.prompts)


@pytest.mark.parametrize("kind", WORDINGS)
def test_selection_asks_what_evaluation_asks(kind: str, sources: dict[str, PromptMaterial]) -> None:
    found = build_probes(sources[kind], LENGTH, COUNT, SEED, [RETRIEVAL])
    assert tuple(found) == BUILT_IN[RETRIEVAL]
    for task, batches in found.items():
        clean = [row for batch in batches for row in batch.clean_bs.tolist()]
        assert sorted(clean) == whole_prompts(prompt_set(task, LENGTH, COUNT, SEED, sources[kind]))
        for batch in batches:
            start = batch.answer_start
            assert (batch.clean_bs[:, start:] == batch.answer_bp).all() and batch.source_bp is not None
            assert (batch.corrupt_bs[:, start:] == batch.answer_bp).all()
            assert batch.answer_bp.shape == batch.distractor_bp.shape
            assert (batch.answer_bp[:, 0] != batch.distractor_bp[:, 0]).all()


def test_training_asks_what_evaluation_asks(sources: dict[str, PromptMaterial], tmp_path: Path) -> None:
    (tmp_path / "tokenizer").symlink_to(TINY_TEACHER)
    args = argparse.Namespace(needle_interval=1, needle_length=256, needle_prompts=3, seq_length=512)
    panels = make_panels(args, tmp_path, vocab_size=1024)
    assert {panel: asked.task for panel, asked in panels.sets.items()} == PANELS
    for asked in panels.sets.values():
        again = prompt_set(asked.task, 256, 3, asked.seed, sources["tiny"].in_noise())
        assert asked.digest == again.digest


@pytest.mark.parametrize("kind", WORDINGS)
@pytest.mark.parametrize("task", ONE_ANSWER)
def test_a_counterfactual_differs_in_the_value_alone(task: str, kind: str, sources: dict[str, PromptMaterial]) -> None:
    source = sources[kind]
    pairs = list(draw_pairs(task, LENGTH, COUNT, SEED, source))
    asked = prompt_set(task, LENGTH, COUNT, SEED, source)
    for (clean, corrupt), prompt in zip(pairs, asked.prompts, strict=True):
        assert np.array_equal(clean.ids, prompt.ids) and clean.answers == prompt.answers
        assert len(corrupt.ids) == len(clean.ids) and len(corrupt.answer_ids) == len(clean.answer_ids)
        (value,), (other,) = clean.answers, corrupt.answers
        text, changed = (source.tokenizer.decode(each.ids) for each in (clean, corrupt))
        assert text.count(value) == 1 and other not in text and changed == text.replace(value, other)
        ((start, end),) = clean.spans
        assert set(np.flatnonzero(clean.ids != corrupt.ids)) <= set(range(start, end))
        assert value_type(value, source.wording) == value_type(other, source.wording)
        assert value_type(value, source.wording) == wanted_type(task, source.wording)


def value_type(value: str, wording: Wording) -> str:
    if wording.own:
        pieces = value.split()
        assert all(f" {piece}" in wording.own.value_pieces for piece in pieces)
        return f"{len(pieces)} pieces"
    if re.fullmatch(r"[1-9][0-9]{6}", value):
        return "number"
    return "uuid" if re.fullmatch(r"[0-9a-f]{8}-([0-9a-f]{4}-){3}[0-9a-f]{12}", value) else value


def wanted_type(task: str, wording: Wording) -> str:
    if wording.own:
        return f"{wording.own.long_pieces if NEEDLE_TASKS[task].uuid_values else wording.own.short_pieces} pieces"
    return "uuid" if NEEDLE_TASKS[task].uuid_values else "number"
