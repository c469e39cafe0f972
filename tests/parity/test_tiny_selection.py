# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""What the scores of a teacher that really retrieves are worth: silencing heads by them, and making them again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from hydra_mcore.model.build import load_model
from hydra_mcore.model.runtime import process_groups
from hydra_mcore.ruler.haystack import Haystack, read_text
from hydra_mcore.ruler.material import PromptMaterial
from hydra_mcore.ruler.wording import own_wording
from hydra_mcore.selection.evidence import likeness
from hydra_mcore.selection.knock_out import knock_out
from hydra_mcore.selection.probes import RETRIEVAL, build_probes
from hydra_mcore.selection.score import HeadScores
from hydra_mcore.selection.scoring import Scoring
from hydra_mcore.selection.teacher import Teacher
from hydra_mcore.tokenizer import load_tokenizer

LENGTH = 256


@pytest.fixture(scope="module", autouse=True)
def groups() -> Iterator[None]:
    with process_groups():
        yield


def scored(folder: Path, journal: Path, pairs: int, seed: int) -> tuple[Scoring, HeadScores]:
    card, model = load_model(folder)
    scoring = Scoring(Teacher(model), prompts(folder, pairs, seed, ("retrieval", "general")), journal, {})
    return scoring, HeadScores(card.shape, card.fingerprint, scoring.exact())


def prompts(folder: Path, pairs: int, seed: int, capabilities: tuple[str, ...]) -> dict:
    tokenizer = load_tokenizer(folder)
    source = PromptMaterial(tokenizer, own_wording(folder), Haystack.of(tokenizer, read_text(tokenizer)))
    return build_probes(source, LENGTH, pairs, seed, capabilities)


def test_a_twentieth_of_the_heads_by_score_breaks_retrieval_and_at_random_does_not(
    tiny_teacher: Path, tmp_path: Path
) -> None:
    scoring, scores = scored(tiny_teacher, tmp_path, pairs=3, seed=0)
    batches = [batch for batches in prompts(tiny_teacher, 8, 77, (RETRIEVAL,)).values() for batch in batches]
    curves = knock_out(scoring, batches, scores.ranking(), seed=0)
    at = curves.heads.index(2)  # of 32
    (best,), (worst,), (random,) = (curves.accuracy[order] for order in ("best first", "worst first", "random"))
    assert best[0] == worst[0] > 0.9  # no head removed
    assert best[at] < 0.5 * best[0]
    assert min(worst[at], random[at]) > 0.85 * best[0]
    assert best[-1] == 0.0  # a quarter of the heads


@pytest.mark.slow
def test_six_pairs_rank_as_twenty_four_other_ones(tiny_teacher: Path, tmp_path: Path) -> None:
    (_, many), (_, few) = (
        scored(tiny_teacher, tmp_path / "many", 24, seed=0),
        scored(tiny_teacher, tmp_path / "few", 6, seed=1),
    )
    assert likeness(many, few, 8).spearman > 0.9
