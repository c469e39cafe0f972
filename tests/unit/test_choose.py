# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Head maps from rankings: each strategy against what its name promises, and budgets that cannot be."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from hydra_mcore.config import ModelShape
from hydra_mcore.heads import HeadMap, InputError
from hydra_mcore.selection.choose import STRATEGIES, choose_heads, parse_ratio

LAYERS, HEADS = 4, 6
SHAPE = ModelShape(
    num_layers=LAYERS, hidden_size=12, num_heads=HEADS, num_kv_groups=3, head_dim=4, ffn_hidden_size=8, vocab_size=10, native_length=8
)
# Layer 2 holds the best four heads, then layer 0, then layers 1 and 3.
RANKING = [(2, 5), (2, 0), (2, 3), (2, 1), (0, 4), (0, 2), (1, 0), (3, 3)]
RANKING += sorted({(layer, head) for layer in range(LAYERS) for head in range(HEADS)} - set(RANKING))


def kept(head_map: HeadMap) -> set[tuple[int, int]]:
    return {(layer_idx, head) for layer_idx, layer in enumerate(head_map.layers) for head in layer.fa}


def counts(head_map: HeadMap) -> list[int]:
    return [len(layer.fa) for layer in head_map.layers]


def test_global_takes_the_best() -> None:
    assert kept(choose_heads("global", SHAPE, 5, ranking=RANKING)) == {(2, 5), (2, 0), (2, 3), (2, 1), (0, 4)}


def test_global_c_promotes_each_empty_layers_best_head_and_keeps_the_budget() -> None:
    assert kept(choose_heads("global_c", SHAPE, 5, ranking=RANKING)) == {(2, 5), (2, 0), (0, 4), (1, 0), (3, 3)}
    assert kept(choose_heads("global_c", SHAPE, 4, ranking=RANKING)) == {(2, 5), (0, 4), (1, 0), (3, 3)}


def test_global_c_equals_promotion_step_by_step() -> None:
    """The paper's wording as a loop: take the top K; for each empty layer drop the worst spare head, add the layer's best."""
    for seed in range(30):
        ranking = random.Random(seed).sample(RANKING, len(RANKING))
        for budget in (4, 5, 9, 23, 24):
            chosen = ranking[:budget]
            for layer in range(LAYERS):
                if all(at[0] != layer for at in chosen):
                    spare = next(at for at in reversed(chosen) if sum(other[0] == at[0] for other in chosen) > 1)
                    chosen = sorted({*chosen, next(at for at in ranking if at[0] == layer)} - {spare}, key=ranking.index)
            assert kept(choose_heads("global_c", SHAPE, budget, ranking=ranking)) == set(chosen)


def test_layer_takes_each_layers_best_and_gives_the_surplus_to_the_best_of_the_rest() -> None:
    assert kept(choose_heads("layer", SHAPE, 4, ranking=RANKING)) == {(2, 5), (0, 4), (1, 0), (3, 3)}
    assert kept(choose_heads("layer", SHAPE, 6, ranking=RANKING)) == {(2, 5), (2, 0), (0, 4), (0, 2), (1, 0), (3, 3)}


def test_fixed_keeps_the_first_heads_evenly() -> None:
    assert [layer.fa for layer in choose_heads("fixed", SHAPE, 8).layers] == [(0, 1)] * 4
    assert counts(choose_heads("fixed", SHAPE, 6)) == [1, 2, 1, 2]


@pytest.mark.parametrize("strategy", ["layer", "layer_random", "fixed"])
def test_layerwise_strategies_differ_by_one_head_at_most(strategy: str) -> None:
    for budget in range(LAYERS * HEADS + 1):
        head_map = choose_heads(strategy, SHAPE, budget, ranking=RANKING, seed=budget)
        assert head_map.num_fa == budget and max(counts(head_map)) - min(counts(head_map)) <= 1


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_budget_strategy_and_provenance_are_kept(strategy: str) -> None:
    facts = {"ranking": RANKING, "seed": 3, "fingerprint": "abc", "made_by": {"seed": 3}}
    head_map = choose_heads(strategy, SHAPE, 7, **facts)
    assert (head_map.num_fa, head_map.strategy, head_map.fingerprint, head_map.made_by) == (7, strategy, "abc", {"seed": 3})
    assert (head_map.num_layers, head_map.num_heads, head_map.num_kv_groups) == (LAYERS, HEADS, 3)
    assert head_map == choose_heads(strategy, SHAPE, 7, **facts)
    assert choose_heads(strategy, SHAPE, 24, ranking=RANKING).num_fa == 24


@pytest.mark.parametrize("strategy", ["global_random", "layer_random"])
def test_draws_depend_on_the_seed_and_reach_every_head(strategy: str) -> None:
    drawn = Counter(at for seed in range(300) for at in kept(choose_heads(strategy, SHAPE, 8, seed=seed)))
    assert len(drawn) == LAYERS * HEADS and min(drawn.values()) > 60 and max(drawn.values()) < 140  # 100 expected


def test_random_layers_vary_only_where_the_name_says_so() -> None:
    assert {tuple(counts(choose_heads("layer_random", SHAPE, 8, seed=seed))) for seed in range(20)} == {(2, 2, 2, 2)}
    assert len({tuple(counts(choose_heads("global_random", SHAPE, 8, seed=seed))) for seed in range(20)}) > 5


@pytest.mark.parametrize(
    ("ratio", "total", "budget"), [("3:1", 448, 112), ("7:1", 448, 56), ("9:1", 448, 45), ("0:1", 8, 8), ("5:3", 32, 12)]
)
def test_ratio(ratio: str, total: int, budget: int) -> None:
    assert parse_ratio(ratio, total) == budget


@pytest.mark.parametrize("ratio", ["3", "3:0", "a:b", "3:1:1", "-3:1", "", "100:1"])
def test_bad_ratio(ratio: str) -> None:
    with pytest.raises(InputError, match="ratio"):
        parse_ratio(ratio, 32)


@pytest.mark.parametrize(
    ("strategy", "budget", "ranking", "message"),
    [
        ("best", 4, RANKING, "strategy 'best'; choose one of global_c, global"),
        ("global", 25, RANKING, "budget 25: choose 0 to 24 heads"),
        ("global", -1, RANKING, "budget -1"),
        ("global_c", 3, RANKING, r"budget 3: choose 4 to 24 heads \(global_c keeps one in each of 4 layers"),
        ("global", 4, (), "needs a score for every one of the 24 heads"),
        ("layer", 4, RANKING[1:], "needs a score"),
        ("global", 4, [*RANKING[1:], RANKING[1]], "needs a score"),
    ],
)
def test_bad_choices(strategy: str, budget: int, ranking: list, message: str) -> None:
    with pytest.raises(InputError, match=message):
        choose_heads(strategy, SHAPE, budget, ranking=ranking)
