# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Head maps from rankings: each strategy against what its name promises, and budgets that cannot be."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest

from hydra_mcore.config import ModelShape
from hydra_mcore.errors import InputError
from hydra_mcore.kinds import DEFAULT_LINEAR, FA
from hydra_mcore.selection.choose import (
    OPTIMISED,
    SCORED,
    STRATEGIES,
    Choice,
    choose_heads,
    hybrid_budget,
    linear_kinds,
    linear_words,
    parse_linear,
    parse_ratio,
)

LAYERS, HEADS = 4, 6
SHAPE = ModelShape(
    num_layers=LAYERS,
    hidden_size=12,
    num_heads=HEADS,
    num_kv_groups=3,
    head_dim=4,
    ffn_hidden_size=8,
    vocab_size=10,
    native_length=8,
)
# Layer 2 holds the best four heads, then layer 0, then layers 1 and 3.
RANKING = [(2, 5), (2, 0), (2, 3), (2, 1), (0, 4), (0, 2), (1, 0), (3, 3)]
RANKING += sorted({(layer, head) for layer in range(LAYERS) for head in range(HEADS)} - set(RANKING))
SCORES = [
    [float(len(RANKING) - RANKING.index((layer, head))) for head in range(HEADS)] for layer in range(LAYERS)
]  # 24 to 1
TIES = [[float(value > 16) for value in row] for row in SCORES]  # 1 for the best eight, 0 for the others


def kept(choice: Choice) -> set[tuple[int, int]]:
    return {(layer_idx, head) for layer_idx, layer in enumerate(choice.head_map.layers) for head in layer["fa"]}


def counts(choice: Choice) -> list[int]:
    return [len(layer["fa"]) for layer in choice.head_map.layers]


def full_layers(layers: int, budget: int, every: int | None = None) -> list[int]:
    """The layers that hybrid keeps of a model with two heads a layer."""
    shape = dataclasses.replace(SHAPE, num_layers=layers, num_heads=2, num_kv_groups=1)
    found = counts(choose_heads("hybrid", shape, budget, every=every))
    assert set(found) <= {0, 2}
    return [layer for layer, count in enumerate(found) if count]


def test_global_takes_the_best() -> None:
    assert kept(choose_heads("global", SHAPE, 5, ranking=RANKING)) == {(2, 5), (2, 0), (2, 3), (2, 1), (0, 4)}


def test_global_c_promotes_each_empty_layers_best_head_and_keeps_the_budget() -> None:
    assert kept(choose_heads("global_c", SHAPE, 5, ranking=RANKING)) == {(2, 5), (2, 0), (0, 4), (1, 0), (3, 3)}
    assert kept(choose_heads("global_c", SHAPE, 4, ranking=RANKING)) == {(2, 5), (0, 4), (1, 0), (3, 3)}


def test_global_c_equals_promotion_step_by_step() -> None:
    """The paper's wording as a loop: take the top K; for each empty layer drop the worst spare head, add the layer's
    best.
    """
    for seed in range(30):
        ranking = random.Random(seed).sample(RANKING, len(RANKING))
        for budget in (4, 5, 9, 23, 24):
            chosen = ranking[:budget]
            for layer in range(LAYERS):
                if all(at[0] != layer for at in chosen):
                    spare = next(at for at in reversed(chosen) if sum(other[0] == at[0] for other in chosen) > 1)
                    chosen = sorted(
                        {*chosen, next(at for at in ranking if at[0] == layer)} - {spare}, key=ranking.index
                    )
            assert kept(choose_heads("global_c", SHAPE, budget, ranking=ranking)) == set(chosen)


def test_layer_takes_each_layers_best_and_gives_the_surplus_to_the_best_of_the_rest() -> None:
    assert kept(choose_heads("layer", SHAPE, 4, ranking=RANKING)) == {(2, 5), (0, 4), (1, 0), (3, 3)}
    assert kept(choose_heads("layer", SHAPE, 6, ranking=RANKING)) == {(2, 5), (2, 0), (0, 4), (0, 2), (1, 0), (3, 3)}


def test_fixed_keeps_the_first_heads_evenly() -> None:
    assert [layer["fa"] for layer in choose_heads("fixed", SHAPE, 8).head_map.layers] == [(0, 1)] * 4
    assert counts(choose_heads("fixed", SHAPE, 6)) == [1, 2, 1, 2]


@pytest.mark.parametrize("strategy", ["layer", "layer_random", "fixed"])
def test_layerwise_strategies_differ_by_one_head_at_most(strategy: str) -> None:
    for budget in range(LAYERS * HEADS + 1):
        choice = choose_heads(strategy, SHAPE, budget, ranking=RANKING, seed=budget)
        assert choice.head_map.num_fa == budget and max(counts(choice)) - min(counts(choice)) <= 1


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_budget_strategy_and_provenance_are_kept(strategy: str) -> None:
    facts = {
        "scores": SCORES,
        "ranking": RANKING,
        "seed": 3,
        "tp_size": 3,
        "fingerprint": "abc",
        "made_by": {"seed": 3},
    }
    choice = choose_heads(strategy, SHAPE, 6, **facts)
    head_map = choice.head_map
    assert (head_map.num_fa, head_map.strategy, head_map.fingerprint, head_map.made_by) == (
        6,
        strategy,
        "abc",
        {"seed": 3},
    )
    assert (head_map.num_layers, head_map.num_heads, head_map.num_kv_groups) == (LAYERS, HEADS, 3)
    assert choice == choose_heads(strategy, SHAPE, 6, **facts)
    whole = choose_heads(strategy, SHAPE, 24, scores=SCORES, ranking=RANKING)
    assert whole.head_map.num_fa == 24 and (whole.kept, whole.given_up, whole.kv_groups, whole.kv_fraction) == (
        1.0,
        0.0,
        12,
        1.0,
    )


@pytest.mark.parametrize("kind", linear_kinds())
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_heads_that_are_not_kept_are_of_the_kind_that_is_asked_for(strategy: str, kind: str) -> None:
    """In all layers, or in some; which heads are kept does not depend on it."""
    facts = {"scores": SCORES, "ranking": RANKING, "seed": 3, "tp_size": 3}
    plain = choose_heads(strategy, SHAPE, 6, **facts)
    assert plain.linear == (DEFAULT_LINEAR,) * LAYERS
    for words, kinds in (
        ([kind], (kind,) * LAYERS),
        (["0-1=lightning", "3=kda", kind], ("lightning", "lightning", kind, "kda")),
        ([f"2={kind}"], (DEFAULT_LINEAR, DEFAULT_LINEAR, kind, DEFAULT_LINEAR)),
    ):
        choice = choose_heads(strategy, SHAPE, 6, linear=words, **facts)
        assert (kept(choice), choice.linear) == (kept(plain), kinds)
        for layer, asked in zip(choice.head_map.layers, kinds, strict=True):
            assert set(layer) <= {FA, asked} and len(layer[FA]) + len(layer[asked]) == HEADS


@pytest.mark.parametrize(
    ("words", "kinds"),
    [
        ([], ("gdn", "gdn", "gdn", "gdn")),
        (["kda"], ("kda", "kda", "kda", "kda")),
        (["gdn", "0-3=kda"], ("kda", "kda", "kda", "kda")),
        (["kda", "1-2=gdn", "0=lightning"], ("lightning", "gdn", "gdn", "kda")),
        (["3=kda"], ("gdn", "gdn", "gdn", "kda")),
    ],
)
def test_kinds_by_layer(words: list[str], kinds: tuple[str, ...]) -> None:
    assert parse_linear(words, LAYERS) == kinds


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gnd"], "linear 'gnd': 'gnd' is no kind of linear heads; choose one of gdn, kda, lightning, alone or after"),
        (["fa"], "linear 'fa': 'fa' is no kind of linear heads; choose one of gdn, kda, lightning"),
        (["gdn", "2=fa"], "linear '2=fa': 'fa' is no kind of linear heads"),
        (
            ["kda=0-3"],
            "'0-3' is no kind of linear heads; choose one of gdn, kda, lightning, alone or after layers as in",
        ),
        (["0-3"], "'0-3' is no kind"),
        ([""], "'' is no kind"),
        (["gdn", "kda"], "linear 'kda': all layers have the kind gdn; give exceptions by layer, as in 0-3=kda"),
        (["gdn", "gdn"], "linear 'gdn': all layers have the kind gdn"),
        (["4=kda"], "linear '4=kda': there is no layer 4; layers are 0 to 3"),
        (["2-9=kda"], "linear '2-9=kda': there is no layer 9; layers are 0 to 3"),
        (["3-1=kda"], "linear '3-1=kda': write a layer, or the first and the last of several, as in 0-3=kda"),
        (["=kda"], "linear '=kda': write a layer"),
        (["-1=kda"], "linear '-1=kda': write a layer"),
        (["0,1=kda"], "linear '0,1=kda': write a layer"),
        (["0=gdn=kda"], "linear '0=gdn=kda': write a layer"),
        ([f"{'9' * 5000}=kda"], "9=kda': write a layer"),
        (["0-2=kda", "2-3=gdn"], "linear '2-3=gdn': layer 2 has the kind kda already; give it one"),
        (["1=kda", "1=kda"], "linear '1=kda': layer 1 has the kind kda already; give it one"),
    ],
)
def test_bad_kinds_by_layer(words: list[str], message: str) -> None:
    with pytest.raises(InputError) as caught:
        choose_heads("fixed", SHAPE, 6, linear=words)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_kinds_are_said_with_their_layers_where_these_differ() -> None:
    gdn, kda = "Gated DeltaNet (GDN) heads", "Kimi Delta Attention (KDA) heads"
    assert linear_words(("gdn",) * 4) == gdn and linear_words(("kda",)) == kda
    said = f"{kda} in layers 0 to 1, {gdn} in layer 2, {kda} in layers 3 to 5"
    assert linear_words(("kda", "kda", "gdn", "kda", "kda", "kda")) == said


def test_hybrid_keeps_the_last_layer_of_each_block() -> None:
    assert full_layers(28, 14) == full_layers(28, 14, every=4) == [3, 7, 11, 15, 19, 23, 27]
    assert full_layers(10, 6, every=3) == [2, 5, 8]  # as (layer + 1) % 3 == 0
    assert full_layers(10, 6) == [2, 5, 9]  # blocks of 3, 3 and 4
    assert full_layers(3, 6) == full_layers(3, 6, every=1) == [0, 1, 2] and full_layers(3, 0) == []
    assert (hybrid_budget(SHAPE, 4), hybrid_budget(SHAPE, 3), hybrid_budget(SHAPE, 2)) == (6, 6, 12)


def test_hybrid_layers_are_evenly_spaced_at_every_budget() -> None:
    for layers in range(1, 13):
        for full in range(1, layers + 1):
            chosen = [-1, *full_layers(layers, 2 * full)]
            gaps = [later - earlier for earlier, later in itertools.pairwise(chosen)]
            assert len(gaps) == full and max(gaps) - min(gaps) <= 1 and chosen[-1] == layers - 1


def test_kv_groups_fill_the_fewest_groups_unless_more_are_allowed() -> None:
    tight = choose_heads("kv_groups", SHAPE, 4, scores=SCORES, ranking=RANKING)
    assert (tight.kv_groups, tight.kv_fraction) == (2, 2 / 12) and {(2, 0), (2, 1)} <= kept(tight)
    assert kept(choose_heads("kv_groups", SHAPE, 3, scores=SCORES, ranking=RANKING)) == {(2, 0), (2, 1), (2, 5)}
    free = choose_heads("kv_groups", SHAPE, 4, scores=SCORES, ranking=RANKING, kv_budget=3)
    assert kept(free) == {(2, 5), (2, 0), (2, 3), (2, 1)} and free.given_up == 0 < tight.given_up


def test_tp_keeps_multiples_in_every_layer() -> None:
    choice = choose_heads("tp", SHAPE, 6, scores=SCORES, ranking=RANKING, tp_size=3)
    assert counts(choice) == [3, 0, 3, 0] and {(2, 5), (2, 0), (2, 3), (0, 4), (0, 2)} <= kept(choice)


@pytest.mark.parametrize("scores", [SCORES, TIES, [[0.0] * HEADS] * LAYERS])
def test_without_a_constraint_the_optimised_strategies_equal_global(scores: list[list[float]]) -> None:
    for budget in range(LAYERS * HEADS + 1):
        facts = {"scores": scores, "ranking": RANKING, "kv_budget": 12, "tp_size": 1}
        best, *others = (choose_heads(strategy, SHAPE, budget, **facts) for strategy in ("global", "kv_groups", "tp"))
        assert [kept(choice) for choice in others] == [kept(best)] * 2
        assert [choice.given_up for choice in (best, *others)] == [0.0] * 3


def test_kept_and_given_up_by_hand() -> None:
    one_a_layer = choose_heads(
        "global_c", SHAPE, 4, scores=SCORES, ranking=RANKING
    )  # 24 + 20 + 18 + 17, the best are 24 to 21
    assert one_a_layer.kept == pytest.approx(79 / 300) and one_a_layer.given_up == pytest.approx(1 - 79 / 90)
    assert (one_a_layer.kv_groups, one_a_layer.kv_fraction) == (4, 4 / 12)
    first = choose_heads("fixed", SHAPE, 4, scores=TIES)  # of the best eight it has (1, 0) and (2, 0)
    assert (first.kept, first.given_up) == (2 / 8, 2 / 4)


def test_shares_without_a_sum_to_compare_with() -> None:
    zero = choose_heads("fixed", SHAPE, 4, scores=[[0.0] * HEADS] * LAYERS)
    assert (zero.kept, zero.given_up) == (1.0, 0.0)
    none = choose_heads("global", SHAPE, 0, scores=SCORES, ranking=RANKING)
    assert (none.kept, none.given_up, none.kv_groups, none.kv_fraction) == (0.0, 0.0, 0, 0.0)
    negative = [[-value for value in row] for row in SCORES]
    for choice in (
        choose_heads("fixed", SHAPE, 4),
        choose_heads("global", SHAPE, 4, scores=negative, ranking=RANKING[::-1]),
    ):
        assert math.isnan(choice.kept) and math.isnan(choice.given_up) and choice.kv_groups > 0


def test_the_objective_says_what_was_maximised() -> None:
    facts = {"scores": SCORES, "ranking": RANKING, "tp_size": 2}
    said = {strategy: choose_heads(strategy, SHAPE, 6, **facts).objective for strategy in STRATEGIES}
    assert said["kv_groups"] == "The highest sum of scores that 6 heads can have in at most 3 of 12 kv groups."
    assert said["tp"] == "The highest sum of scores that 6 heads can have, in every layer a multiple of 2."
    assert said["hybrid"].startswith("No scores were maximised: 6 heads, all heads of some layers")
    assert (
        {strategy for strategy, text in said.items() if text.startswith("The highest")} == set(SCORED) > set(OPTIMISED)
    )


@pytest.mark.parametrize("strategy", ["global_random", "layer_random"])
def test_draws_depend_on_the_seed_and_reach_every_head(strategy: str) -> None:
    drawn = Counter(at for seed in range(300) for at in kept(choose_heads(strategy, SHAPE, 8, seed=seed)))
    assert len(drawn) == LAYERS * HEADS and min(drawn.values()) > 60 and max(drawn.values()) < 140  # 100 expected


def test_random_layers_vary_only_where_the_name_says_so() -> None:
    assert {tuple(counts(choose_heads("layer_random", SHAPE, 8, seed=seed))) for seed in range(20)} == {(2, 2, 2, 2)}
    assert len({tuple(counts(choose_heads("global_random", SHAPE, 8, seed=seed))) for seed in range(20)}) > 5


@pytest.mark.parametrize(
    ("ratio", "total", "budget"),
    [("3:1", 448, 112), ("7:1", 448, 56), ("9:1", 448, 45), ("0:1", 8, 8), ("5:3", 32, 12)],
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
        ("kv_groups", 25, RANKING, "budget 25: choose 0 to 24 heads"),
        ("tp", -4, RANKING, "budget -4: choose 0 to 24 heads"),
        ("hybrid", 30, (), "budget 30: choose 0 to 24 heads"),
        ("global_c", 3, RANKING, r"budget 3: choose 4 to 24 heads \(global_c keeps one in each of 4 layers"),
        ("global", 4, (), "needs a score for every one of the 24 heads"),
        ("layer", 4, RANKING[1:], "needs a score"),
        ("global", 4, [*RANKING[1:], RANKING[1]], "needs a score"),
        ("kv_groups", 4, RANKING, "strategy kv_groups needs a score for every one of the 24 heads"),
        ("tp", 4, RANKING, "strategy tp needs a score for every one of the 24 heads"),
    ],
)
def test_bad_choices(strategy: str, budget: int, ranking: Sequence[tuple[int, int]], message: str) -> None:
    with pytest.raises(InputError, match=message):
        choose_heads(strategy, SHAPE, budget, ranking=ranking)


@pytest.mark.parametrize(
    ("strategy", "budget", "options", "message"),
    [
        ("kv_groups", 5, {"kv_budget": 2}, r"kv budget 2: choose 3 to 12 kv groups \(3 can hold 5 heads\)"),
        ("kv_groups", 5, {"kv_budget": 13}, "kv budget 13: choose 3 to 12 kv groups"),
        ("kv_groups", 0, {"kv_budget": -1}, "kv budget -1: choose 0 to 12"),
        (
            "tp",
            7,
            {"tp_size": 3},
            "budget 7 is not the same number of heads for each of 3 tensor-parallel ranks; choose 6 or 9",
        ),
        ("tp", 8, {"tp_size": 4}, "tensor parallel size 4 does not divide 6 query heads; choose one that does"),
        ("tp", 8, {"tp_size": 0}, "tensor parallel size 0 does not divide"),
        ("hybrid", 7, {}, "budget 7 is not a number of whole layers of 6 heads; choose 6 or 12"),
        ("hybrid", 6, {"every": 2}, "budget 6: every 2 of 4 layers keeps 12 heads; choose that budget"),
        ("hybrid", 6, {"every": 0}, "every 0: choose 1 to 4"),
        ("hybrid", 6, {"every": 5}, "every 5: choose 1 to 4"),
        ("global", 4, {"scores": SCORES[1:]}, "scores: give every head a finite number, 4 layers x 6 heads"),
        ("fixed", 4, {"scores": [row[1:] for row in SCORES]}, "scores: give every head a finite number"),
        ("tp", 4, {"scores": [*SCORES[1:], [math.nan] * HEADS]}, "scores: give every head a finite number"),
    ],
)
def test_bad_options(strategy: str, budget: int, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        choose_heads(strategy, SHAPE, budget, **{"scores": SCORES, "ranking": RANKING, **options})
    assert "\n" not in str(caught.value)
