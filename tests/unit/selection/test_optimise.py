# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Constrained choices against every choice there is on small shapes, and against what can be worked out on large
ones.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hydra_mcore.heads import HeadLayout, HeadsByKind
from hydra_mcore.selection.optimise import Head, best_in_blocks, best_in_groups, worths

Scores = list[list[float]]
Problem = tuple[Scores, list[Head], int]  # scores, a ranking in line with them, kv groups of a layer

SHAPES = [
    (1, 1, 4),
    (3, 1, 4),
    (1, 3, 4),
    (2, 2, 2),
    (1, 5, 2),
    (3, 2, 2),
    (4, 3, 1),
    (2, 3, 2),
]  # layers, groups, heads of a group
FEW = st.sampled_from([0.0, 0.125, 0.25, 0.5, 1.0, 2.0])  # many ties, and sums that are equal in many ways
SIGNED = st.integers(-4, 4).map(float)
ANY = st.floats(0.0, 1.0)


def rank(scores: Scores, seed: int = 0) -> list[Head]:
    """Best first, ties in any order."""
    heads = [(layer, head) for layer, row in enumerate(scores) for head in range(len(row))]
    random.Random(seed).shuffle(heads)
    return sorted(heads, key=lambda at: -scores[at[0]][at[1]])


def merit(kept: Iterable[Head], scores: Scores, ranking: list[Head]) -> tuple[float, int]:
    """What is to be maximised: the sum of scores; among equals, small places in the ranking."""
    return math.fsum(scores[layer][head] for layer, head in kept), -sum(ranking.index(at) for at in kept)


def alive(kept: Iterable[Head], size: int) -> int:
    return len({(layer, head // size) for layer, head in kept})


@st.composite
def problems(draw: st.DrawFn, values: st.SearchStrategy[float]) -> Problem:
    layers, groups, size = draw(st.sampled_from(SHAPES))
    scores = [[draw(values) for _ in range(groups * size)] for _ in range(layers)]
    return scores, rank(scores, draw(st.integers(0, 9))), groups


class AllChoices:
    """Every set of heads of a small model: its members [sets, layers, heads], their number and its merit."""

    def __init__(self, scores: Scores, ranking: list[Head]) -> None:
        total = len(ranking)
        bits = np.arange(2**total)[:, None] >> np.arange(total) & 1
        self.members = bits.reshape(-1, len(scores), len(scores[0])).astype(bool)
        places = np.empty(self.members.shape[1:], dtype=int)
        for place, at in enumerate(ranking):
            places[at] = place
        self.size, self.score, self.places = bits.sum(1), bits @ np.ravel(scores), bits @ places.ravel()

    def best(self, allowed: np.ndarray) -> tuple[float, int]:
        score, places = self.score[allowed], self.places[allowed]
        return score.max(), -places[score == score.max()].min()


def check_groups(problem: Problem, exact: bool) -> None:
    """All budgets of heads with all of groups."""
    scores, ranking, groups = problem
    layers, heads = len(scores), len(scores[0])
    size, worth_lh, choices = heads // groups, worths(scores, ranking), AllChoices(scores, ranking)
    living = choices.members.reshape(-1, layers * groups, size).any(-1).sum(-1)
    for budget in range(layers * heads + 1):
        for kv_budget in range(-(-budget // size), layers * groups + 1):
            kept = best_in_groups(worth_lh, groups, budget, kv_budget)
            assert len(set(kept)) == len(kept) == budget and alive(kept, size) <= kv_budget
            found, best = merit(kept, scores, ranking), choices.best((choices.size == budget) & (living <= kv_budget))
            assert found == best if exact else found[0] == pytest.approx(best[0], rel=1e-9)


@settings(max_examples=100, deadline=None)
@given(problems(FEW | SIGNED))
def test_groups_equal_the_best_of_all_choices_ties_included(problem: Problem) -> None:
    check_groups(problem, exact=True)


@settings(max_examples=100, deadline=None)
@given(problems(ANY))
def test_groups_equal_the_best_of_all_choices(problem: Problem) -> None:
    check_groups(problem, exact=False)


def check_blocks(problem: Problem, exact: bool) -> None:
    """All budgets with all sizes of blocks."""
    scores, ranking, _ = problem
    heads, worth_lh, choices = len(scores[0]), worths(scores, ranking), AllChoices(scores, ranking)
    for block in (block for block in range(1, heads + 1) if heads % block == 0):
        even = (choices.members.sum(-1) % block == 0).all(-1)
        for budget in range(0, len(ranking) + 1, block):
            kept = best_in_blocks(worth_lh, budget, block)
            assert len(set(kept)) == len(kept) == budget
            assert all(count % block == 0 for count in Counter(layer for layer, _ in kept).values())
            found, best = merit(kept, scores, ranking), choices.best((choices.size == budget) & even)
            assert found == best if exact else found[0] == pytest.approx(best[0], rel=1e-9)


@settings(max_examples=100, deadline=None)
@given(problems(FEW | SIGNED))
def test_blocks_equal_the_best_of_all_choices_ties_included(problem: Problem) -> None:
    check_blocks(problem, exact=True)


@settings(max_examples=100, deadline=None)
@given(problems(ANY))
def test_blocks_equal_the_best_of_all_choices(problem: Problem) -> None:
    check_blocks(problem, exact=False)


def test_a_group_of_good_heads_beats_the_best_head_alone() -> None:
    scores = [[0.9, 0.0, 0.6, 0.5], [0.7, 0.1, 0.0, 0.0]]  # two groups a layer: 0.9 + 0.0, 0.6 + 0.5, 0.7 + 0.1
    worth_lh = worths(scores, rank(scores))
    assert set(best_in_groups(worth_lh, 2, 2, 1)) == {(0, 2), (0, 3)}
    assert set(best_in_groups(worth_lh, 2, 2, 2)) == {(0, 0), (1, 0)}
    assert set(best_in_groups(worth_lh, 2, 3, 2)) == {(0, 0), (0, 2), (0, 3)}


def test_every_rank_gets_as_many_heads_of_every_layer() -> None:
    rng = random.Random(0)
    scores = [[rng.random() ** 3 for _ in range(16)] for _ in range(12)]
    for tp_size in (1, 2, 4, 8):
        kept = best_in_blocks(worths(scores, rank(scores)), 48, tp_size)
        for layer_idx in range(12):
            layer = HeadsByKind.from_fa((head for at, head in kept if at == layer_idx), 16)
            layout = HeadLayout(layer, 8, tp_size, layer_idx)
            assert {len(owned["fa"]) for owned in layout.ranks} == {len(layer["fa"]) // tp_size} and layout.shared[
                "fa"
            ] == ()


def test_worths_follow_the_ranking_and_keep_ties_of_sums() -> None:
    scores = [[0.5, 0.25, 0.0], [0.25, 0.5, 0.0]]
    ranking = [(1, 1), (0, 0), (0, 1), (1, 0), (1, 2), (0, 2)]
    worth = {at: int(worths(scores, ranking)[at]) for at in ranking}
    assert sorted(worth, key=lambda at: -worth[at]) == ranking
    assert worth[1, 1] + worth[1, 2] == worth[0, 1] + worth[1, 0] + 1  # 0.5 + 0 and 0.25 + 0.25; places 0 + 4 and 2 + 3


@pytest.mark.parametrize("value", [0.0, 5e-324, 1e-300, 1e300])
def test_worths_of_extreme_scores(value: float) -> None:
    scores = [[0.0, value], [value, 0.0]]
    worth = worths(scores, [(0, 1), (1, 0), (0, 0), (1, 1)]).ravel().tolist()
    assert worth[1] == worth[2] + 1 and worth[0] == worth[3] + 1 and (worth[2] > 2**57) == (value > 0)


@pytest.mark.parametrize("sign", [1, -1])
def test_groups_of_a_large_model(sign: int) -> None:
    """64 layers x 64 heads in groups of 8: the ends of the scale, where the answer is known, and order in between."""
    score_lh = sign * np.random.default_rng(0).random((64, 64)) ** 4
    ranking, worth_lh = rank(score_lh.tolist()), worths(score_lh.tolist(), rank(score_lh.tolist()))
    group_sums = np.sort(score_lh.reshape(512, 8).sum(1))[::-1]
    top = ranking[:1024]
    needed = alive(top, 8)
    found = []
    for kv_budget in (128, 160, needed - 1, needed, 512):
        kept = best_in_groups(worth_lh, 8, 1024, kv_budget)
        assert len(set(kept)) == 1024 and alive(kept, 8) <= kv_budget
        found.append(math.fsum(score_lh[at] for at in kept))
    assert found[0] == pytest.approx(group_sums[:128].sum())  # only whole groups fit
    assert found[0] < found[1] < found[2] < found[3] and set(kept) == set(top)
