# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Every number of the evidence, by hand or by brute force."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hydra_mcore.config import ModelShape
from hydra_mcore.errors import InputError
from hydra_mcore.files import write_json
from hydra_mcore.heads import every_head
from hydra_mcore.kinds import DEFAULT_LINEAR
from hydra_mcore.selection import evidence as ev
from hydra_mcore.selection.score import HeadScores, ProbeEffects

SHAPE = ModelShape(
    num_layers=2,
    hidden_size=16,
    num_heads=4,
    num_kv_groups=2,
    head_dim=4,
    ffn_hidden_size=8,
    vocab_size=10,
    native_length=8,
)
LINEAR = (DEFAULT_LINEAR,) * SHAPE.num_layers


def probe(effects_rlhb: Any, capability: str = "retrieval", unusable: tuple[int, ...] = ()) -> ProbeEffects:
    """Effects given as [r, l, h, pair]; pairs in ``unusable`` are not solved."""
    effects = np.asarray(effects_rlhb, dtype=float)
    pairs = effects.shape[-1]
    solved = np.array([pair not in unusable for pair in range(pairs)])
    receivers = tuple(((0, 0),) for _ in range(len(effects) - 1))
    return ProbeEffects(capability, effects, receivers, np.full(pairs, 6.0), np.full(pairs, -4.0), solved)


def one_role(*pairs: list[float], **facts: Any) -> ProbeEffects:
    """A receiver-only probe: for each pair the effects of the eight heads of SHAPE."""
    return probe(np.array(pairs).T.reshape(1, 2, 4, -1), **facts)


def scores(facts: dict[str, Any] | None = None, **probes: ProbeEffects) -> HeadScores:
    return HeadScores(SHAPE, "f" * 64, probes, **(facts or {}))


def noisy(pairs: int = 6, noise: float = 0.01, seed: int = 0) -> HeadScores:
    rng = np.random.default_rng(seed)
    mean = np.array([0.5, 0.4, 0.3, 0.2, 0.15, 0.12, 0.09, 0.06])
    return scores(**{name: one_role(*(mean + rng.normal(0, noise, (pairs, 8))).tolist()) for name in ("one", "two")})


ALIKE = [0.8, 0.0, 0.4, 0.0, 0.2, 0.0, 0.1, 0.0]  # scores after scaling: 1, 0, 0.5, 0, 0.25, 0, 0.125, 0


def test_spearman_by_hand_and_by_counting() -> None:
    assert ev.spearman([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(4.5 / (4.5 * 5.0) ** 0.5)  # ranks 1, 2.5, 2.5, 4
    assert ev.spearman([1, 5, 9], [-1, -2, -30]) == pytest.approx(-1.0)
    assert ev.spearman([3, 3, 3], [1, 2, 3]) == 0.0
    a, b = np.random.default_rng(0).integers(0, 6, (2, 5, 4))
    ranks = [[(x < value).sum() + ((x == value).sum() + 1) / 2 for value in x] for x in (a.ravel(), b.ravel())]
    assert ev.spearman(a, b) == pytest.approx(np.corrcoef(*ranks)[0, 1])


def test_overlap() -> None:
    assert ev.overlap([1, 2, 3, 4], [3, 1, 9, 2], 3) == 2 / 4
    assert ev.overlap("ab", "ba", 2) == ev.overlap("ab", "cd", 0) == 1.0


def test_expected_overlap_of_random_choices_by_listing_them() -> None:
    choices = list(itertools.combinations(range(6), 4))
    values = [ev.overlap(a, b, 4) for a in choices for b in choices]
    assert ev.random_overlap(6, 4) == pytest.approx(np.mean(values))
    assert ev.random_overlap(6, 6) == ev.random_overlap(6, 0) == pytest.approx(1.0)
    assert 0.14 < ev.random_overlap(4096, 1024) < 0.145  # numbers beyond floats in between


def test_numbers_of_pairs() -> None:
    assert [ev.pair_counts(most) for most in (0, 1, 5)] == [[], [1], [1, 2, 3, 4, 5]]
    assert ev.pair_counts(20) == [1, 2, 3, 4, 6, 8, 12, 16, 20]


def test_pairs_alike_are_stable_and_pairs_left_out_are_never_drawn() -> None:
    wild = [0.0, 1.0] * 4
    alike = scores(one=one_role(ALIKE, wild, ALIKE, ALIKE, unusable=(1,)))
    for found in (ev.stability_by_pairs(alike, 2), ev.stability_of_halves(alike, 2)):
        assert all(
            agreement.spearman.low == pytest.approx(1.0) and agreement.overlap.low == 1.0
            for agreement in found.values()
        )
    assert list(ev.stability_by_pairs(alike, 2)) == [1, 2, 3] and list(ev.stability_of_halves(alike, 2)) == [1]


def test_halves_are_disjoint_and_all_pairs_agree_with_themselves() -> None:
    split = scores(one=one_role([0.9, 0, 0, 0, 0, 0, 0, 0], [0, 0.5, 0, 0, 0, 0, 0, 0]))  # each pair knows another head
    assert ev.stability_of_halves(split, 1)[1].overlap == ev.Spread(0.0, 0.0, 0.0)
    found = ev.stability_by_pairs(split, 1)
    assert found[2].overlap.low == 1.0 and 0.0 < found[1].overlap.mean < 1.0 and found[1].overlap.low == 0.0


def test_a_single_pair_has_no_halves_and_probes_may_differ_in_size() -> None:
    assert ev.stability_of_halves(scores(one=one_role(ALIKE)), 2) == {}
    assert list(ev.stability_of_halves(scores(one=one_role(ALIKE), two=one_role(*[ALIKE] * 5)), 2)) == [1, 2]


def test_a_probe_that_does_not_count_stays_out_of_every_draw() -> None:
    lucky = one_role([0.0, 1.0] * 4, *[ALIKE] * 7, unusable=tuple(range(1, 8)))  # one pair of eight: too few
    both = scores(one=one_role(ALIKE, ALIKE, ALIKE), lucky=lucky)
    assert all(agreement.overlap.low == 1.0 for agreement in ev.stability_by_pairs(both, 2).values())
    assert np.allclose(ev.bootstrap(both, 2, draws=5).low_lh, both.scores_lh)
    assert ev.role_effects(both)["receiver"]["retrieval"].ravel() == pytest.approx(ALIKE)


def test_halves_need_a_probe_that_weighs() -> None:
    weightless = one_role(ALIKE, ALIKE, capability="general")
    assert ev.stability_of_halves(scores({"weights": {"general": 0.0}}, one=one_role(ALIKE), two=weightless), 2) == {}


def test_more_pairs_agree_better() -> None:
    found = ev.stability_of_halves(noisy(16, noise=0.2), 3, draws=60)
    assert found[8].spearman.mean > found[1].spearman.mean + 0.05
    assert found == ev.stability_of_halves(noisy(16, noise=0.2), 3, draws=60)  # seeded


def test_other_lengths() -> None:
    base, turned = scores(one=one_role(ALIKE)), scores(one=one_role(ALIKE[::-1]))
    found = ev.stability_by_length(base, {8192: turned, 4096: base}, 2)
    assert list(found) == [4096, 8192] and found[4096] == (pytest.approx(1.0), 1.0)
    assert found[8192] == (pytest.approx(ev.spearman(ALIKE, ALIKE[::-1])), 0.0)


def test_bootstrap_of_pairs_alike_has_no_width() -> None:
    alike = scores(one=one_role(ALIKE, ALIKE, ALIKE))
    found = ev.bootstrap(alike, 2, draws=20)
    assert np.allclose(found.low_lh, alike.scores_lh) and np.allclose(found.high_lh, alike.scores_lh)
    assert np.allclose(found.chosen_lh.ravel(), [1, 0, 1, 0, 0, 0, 0, 0]) and found.draws == 20


def test_bootstrap_of_two_pairs_is_the_known_distribution() -> None:
    # Means of the two heads: (1, .2) in 1/4 of the resamples, (.5, .25) in 1/2, (0, .3) in 1/4; the better one scores
    # 1.
    two = scores(one=one_role([1.0, 0.2, 0, 0, 0, 0, 0, 0], [0.0, 0.3, 0, 0, 0, 0, 0, 0]))
    found = ev.bootstrap(two, 1, draws=2000)
    assert found.chosen_lh[0, :2] == pytest.approx([0.75, 0.25], abs=0.04) and found.chosen_lh.sum() == pytest.approx(
        1.0
    )
    assert (found.low_lh[0, 0], found.high_lh[0, 0]) == (0.0, 1.0)
    assert (found.low_lh[0, 1], found.high_lh[0, 1]) == pytest.approx((0.2, 1.0))


def test_shuffled_labels_agree_by_chance_only() -> None:
    found = ev.label_control(noisy(), 2, draws=3000)
    assert found.spearman.mean == pytest.approx(0.0, abs=0.03) and found.overlap.mean == pytest.approx(
        ev.random_overlap(8, 2), abs=0.02
    )
    assert found.spearman.high > 0.5  # eight heads: chance alone goes far


def test_gini_by_hand() -> None:
    assert ev.gini([0, 0, 0, 5]) == 0.75 and ev.gini([2, 2, 2]) == ev.gini([0, 0]) == 0.0
    values = np.array([3.0, 1.0, 4.0, 1.5])
    assert ev.gini(values) == pytest.approx(abs(values[:, None] - values).sum() / (2 * 4 * values.sum()))


def test_share_of_the_score_kept() -> None:
    assert ev.kept_share(scores(one=one_role(ALIKE))) == pytest.approx(
        np.array([0, 8, 12, 14, 15, 15, 15, 15, 15]) / 15
    )


def test_critical_heads() -> None:
    first, second = [0.5, 0.03, 0.009, 0, 0, 0, 0, 0], [0.3, -0.002, 0.009, 0, 0, 0, 0, 0.5]
    general = one_role([0, 0, 0, 0.02, 0, 0, 0, 0], capability="general")
    critical_lh, convertible_lh = ev.critical_heads(scores(one=one_role(first), two=one_role(second), three=general))
    assert critical_lh.ravel().tolist() == [
        True,
        True,
        False,
        True,
        False,
        False,
        False,
        True,
    ]  # head 1: mean size 0.016
    assert convertible_lh.ravel().tolist() == [False, False, True, False, True, True, True, False]
    # 0.012 in one of two probes: not critical on average, not convertible either
    assert not np.any(
        ev.critical_heads(scores(one=one_role([0.5, 0.012, *[0] * 6]), two=one_role([0.5, *[0] * 7]))), axis=0
    )[0, 1]


def test_effects_by_role() -> None:
    effects = np.zeros((3, 2, 4, 2))
    effects[0, 0, 0], effects[1, 1, 1], effects[2, 1, 1], effects[2, 0, 3] = (0.4, 0.2), -0.1, 0.6, (-0.5, 0.5)
    found = ev.role_effects(
        scores(one=probe(effects), two=one_role([0.1, *[0] * 7]), general=one_role([0.7, *[0] * 7], capability="g"))
    )
    assert list(found) == ["receiver", "sender"] and list(found["sender"]) == ["retrieval", "g"]
    assert (
        found["receiver"]["retrieval"][0, 0] == pytest.approx((0.3 + 0.1) / 2) and found["receiver"]["g"][0, 0] == 0.7
    )
    assert (
        found["sender"]["retrieval"][1, 1] == pytest.approx(0.6 / 2) and found["sender"]["retrieval"][0, 3] == 0.0
    )  # noise cancels
    assert list(ev.role_effects(scores(one=one_role(ALIKE)))) == ["receiver"]


def test_budgets_and_costs() -> None:
    found = {cost.ratio: cost for cost in ev.costs(scores(one=one_role(ALIKE)), LINEAR, (1, 3, 7, 99), contexts=(100,))}
    assert {name: cost.num_fa for name, cost in found.items()} == {"1:1": 4, "3:1": 2, "7:1": 1}  # 99:1 keeps none of 8
    assert [found[name].kept for name in found] == pytest.approx([15 / 15, 12 / 15, 8 / 15])
    # Best: heads 0 and 2 of layer 0, in its two kv groups; then 0 and 2 of layer 1.
    assert [found[name].kv_fraction for name in found] == [1.0, 2 / 4, 1 / 4]
    fa, gdn = 4 * 4 * 100, 7 * 4 * 4
    assert found["3:1"].decode == {100: pytest.approx((2 * fa + 6 * gdn) / (8 * fa))}
    assert found["3:1"].prefill == {100: pytest.approx((2 * fa / 2 + 6 * gdn) / (8 * fa / 2))}
    assert ev.attention_flops(SHAPE, every_head(2, 4), LINEAR, 100) == 1.0


def test_costs_against_counted_loops() -> None:
    n, d = 2000, SHAPE.head_dim
    fa = sum(2 * d * seen + 2 * d * seen for seen in range(1, n + 1)) / n  # QK^T and PV, a multiply and an add each
    gdn = d * d + 3 * 2 * d * d  # decay; k^T S, outer product, q^T S
    kept = [(0, 1), (0, 2), (1, 0)]
    assert ev.attention_flops(SHAPE, kept, LINEAR, n / 2) == pytest.approx((3 * fa + 5 * gdn) / (8 * fa), rel=1e-3)


def test_costs_are_those_of_each_layers_kind() -> None:
    """Two FA heads in the layer whose others are of one kind, one in the layer of the other kind."""
    kept = [(0, 1), (0, 2), (1, 0)]
    fa, gdn, lightning = 4 * 4 * 100, 7 * 4 * 4, 5 * 4 * 4
    for linear, others in (
        (("gdn", "lightning"), 2 * gdn + 3 * lightning),
        (("lightning", "gdn"), 2 * lightning + 3 * gdn),
    ):
        assert ev.attention_flops(SHAPE, kept, linear, 100) == pytest.approx((3 * fa + others) / (8 * fa))
    (cost,) = ev.costs(
        scores(one=one_role(ALIKE)), ("gdn", "lightning"), ratios=(3,), contexts=(100,)
    )  # (0, 0), (0, 2)
    assert cost.decode[100] == pytest.approx((2 * fa + 2 * gdn + 4 * lightning) / (8 * fa))


def test_kv_groups_shared_by_kept_heads_count_once() -> None:
    assert ev.kv_fraction(SHAPE, [(0, 0), (0, 1)]) == 1 / 4 and ev.kv_fraction(SHAPE, [(0, 1), (0, 2), (1, 3)]) == 3 / 4
    assert ev.kv_fraction(SHAPE, []) == 0.0


def test_scores_that_only_look() -> None:
    same, turned = np.array(ALIKE).reshape(2, 4), -np.array(ALIKE).reshape(2, 4)
    found = ev.observed_likeness(scores({"observed": {"same": same, "turned": turned}}, one=one_role(ALIKE)), 4)
    assert found["same"] == (pytest.approx(1.0), 1.0) and found["turned"] == (pytest.approx(-1.0), 0.0)


def test_estimates_are_compared_with_the_role_they_stand_for() -> None:
    sent = np.array(ALIKE[::-1]).reshape(2, 4)
    estimates = {"observed": {"attribution, receivers": np.array(ALIKE).reshape(2, 4), "attribution, senders": sent}}
    receivers = one_role(ALIKE)
    alone = ev.observed_likeness(scores(estimates, one=receivers), 4)
    assert list(alone) == ["attribution, receivers"]  # no sender was measured, so there is nothing to compare with
    both = probe(np.stack([receivers.effects_rlhb[0], sent[..., None]]))
    found = ev.observed_likeness(scores(estimates, one=both), 4)
    assert found == dict.fromkeys(estimates["observed"], (pytest.approx(1.0), 1.0))


def test_all_of_it() -> None:
    found = ev.gather(noisy(), 2, LINEAR, {64: noisy(seed=1)})
    assert found.gini_l.shape == (2,) and found.share_l.sum() == pytest.approx(1.0) and list(found.by_length) == [64]
    assert found.critical_lh.sum() == 8 and found.observed == {}
    nothing = ev.gather(scores(one=one_role([0.001] * 8)), 2, LINEAR)  # no effect anywhere
    assert nothing.share_l.tolist() == [0.0, 0.0] and nothing.costs[0].kept == 0.0


def test_knock_out_round_trip_and_refusals(tmp_path: Path) -> None:
    known = ev.KnockOut(
        (0.0, 0.25), (0, 2), {"best first": ((0.9, 0.1),), "random": ((0.9, 0.8), (0.9, 0.6))}, prompts=40
    )
    write_json(tmp_path / "k.json", known.to_dict())
    assert ev.KnockOut.load(tmp_path / "k.json") == known
    assert known.spread("random").tolist() == [[0.9, pytest.approx(0.7)], [0.9, 0.6], [0.9, 0.8]]
    refusals = [
        *(
            (changes, "every curve needs")
            for changes in ({"accuracy": {"random": [[0.9]]}}, {"heads": [0]}, {"accuracy": {}})
        ),
        *(
            ({name: value}, f"{name}.* is .*; expected")
            for name, value in (("accuracy", [0.9]), ("prompts", None), ("heads", ["x", 2]))
        ),
        ({"fractions": [0.0, 1.5]}, "go from 0 to 1"),
        ({"accuracy": {"random": []}}, "every curve needs"),
        ({"accuracy": {"sideways": [[0.9, 0.1]]}}, "orders among best first"),
    ]
    for changes, message in refusals:
        write_json(tmp_path / "k.json", {**known.to_dict(), **changes})
        with pytest.raises(InputError, match=f"^knock-out .*k.json: .*{message}"):
            ev.KnockOut.load(tmp_path / "k.json")
