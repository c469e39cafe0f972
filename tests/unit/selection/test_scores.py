# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Scores from effects of pairs, by hand (paper Eq 11 and 12); and the file that keeps them, with what it refuses."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import ArrayLike

from hydra_mcore.config import HydraOptions, ModelCard, ModelShape
from hydra_mcore.errors import InputError
from hydra_mcore.heads import HeadMap
from hydra_mcore.selection.replaceability import TABLES
from hydra_mcore.selection.score import (
    MIN_GAP,
    HeadScores,
    ProbeEffects,
    Replaceability,
    ScoresError,
    capability_scores,
    fuse,
)

SHAPE = ModelShape(
    num_layers=2,
    hidden_size=12,
    num_heads=2,
    num_kv_groups=1,
    head_dim=4,
    ffn_hidden_size=8,
    vocab_size=10,
    native_length=8,
)
FINGERPRINT = "f" * 64
same = functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-15)


def card(fingerprint: str = FINGERPRINT, **changes: Any) -> ModelCard:
    shape = dataclasses.replace(SHAPE, **changes)
    head_map = HeadMap.all_fa(shape.num_layers, shape.num_heads, shape.num_kv_groups)
    return ModelCard(shape=shape, head_map=head_map, options=HydraOptions.teacher(), fingerprint=fingerprint)


def probe(
    effects: ArrayLike, capability: str = "retrieval", gaps: ArrayLike = 5.0, solved: ArrayLike = True
) -> ProbeEffects:
    """A sub-probe of these effects [r, l, h, b]; m(x') is 1."""
    effects_rlhb = np.asarray(effects, dtype=float)
    roles, pairs = len(effects_rlhb), effects_rlhb.shape[-1]
    clean_b, solved_b = 1 + np.broadcast_to(np.asarray(gaps, dtype=float), pairs), np.broadcast_to(solved, pairs)
    return ProbeEffects(capability, effects_rlhb, (((1, 0), (1, 1)),) * (roles - 1), clean_b, np.ones(pairs), solved_b)


def steady(*means: ArrayLike, capability: str = "retrieval", **facts: Any) -> ProbeEffects:
    """Two pairs with the same effects: one table [l, h] for each role."""
    return probe(np.repeat(np.asarray(means, dtype=float)[..., None], 2, axis=-1), capability, **facts)


def scores(probes: dict[str, ProbeEffects], **weights: float) -> HeadScores:
    return HeadScores(SHAPE, FINGERPRINT, probes, weights)


def test_mean_is_over_the_pairs_that_count() -> None:
    """One head a case: values beyond 1 are clipped, signs kept, and the last two pairs, unsolved and unmoved,
    left out.
    """
    cases = {
        "plain": ([0.2, 0.4], 0.3),
        "clipped": ([5.0, -0.5], 0.25),
        "opposite": ([0.2, -0.2], 0.0),
        "negative": ([-9.0, -0.5], -0.75),
    }
    effects = np.array([[*used, 0.9, 0.9] for used, _ in cases.values()]).reshape(1, 2, 2, 4)
    result = probe(effects, gaps=[4.0, 2.0, 8.0, 0.4], solved=[True, True, False, True])
    same(result.mean_rlh(), np.array([mean for _, mean in cases.values()]).reshape(1, 2, 2))


def test_which_pairs_count() -> None:
    gaps = [MIN_GAP, MIN_GAP - 1e-9, -3.0, float("nan"), 9.0, 0.1]
    result = probe(np.zeros((1, 2, 2, 6)), gaps=gaps, solved=[True, True, True, True, False, False])
    assert result.used_b.tolist() == [True, False, False, False, False, False]
    assert (result.used, result.unsolved, result.unmoved) == (1, 2, 3)  # each pair is in one of them


@pytest.mark.parametrize(
    ("pairs", "used", "usable"),
    [(8, 2, True), (8, 1, False), (9, 2, False), (4, 1, True), (2, 1, True), (3, 0, False), (0, 0, False)],
)
def test_a_probe_is_usable_when_a_quarter_of_its_pairs_count(pairs: int, used: int, usable: bool) -> None:
    result = probe(np.zeros((1, 2, 2, pairs)), solved=np.arange(pairs) < used)
    assert (result.used, result.usable) == (used, usable)


def test_score_is_size_times_share_of_probes_in_the_stronger_role() -> None:
    """Eq 11. The second sub-probe found no sender: its effects in that role are 0."""
    one = np.array([[[0.5, 0.4], [0.02, 0.009]], [[0.0, 0.26], [-0.2, 0.0]]])
    two = np.array([[[-0.3, 0.0], [0.04, 0.03]]])
    score_lh, effect_lh = capability_scores([one, two])
    # (0, 0): |IE| of either sign.  (0, 1): 0.2 as receiver, in one of two probes, beats 0.13 as sender.
    # (1, 0): 0.1 as sender, in one of two probes, beats 0.03 as receiver in both.  (1, 1): 0.009 does not count.
    same(effect_lh, [[0.4, 0.2], [0.1, 0.0195]])
    same(score_lh, [[0.4, 0.2 * 0.5], [0.1 * 0.5, 0.0195 * 0.5]])
    for changed, whole in zip(capability_scores([two, one]), (score_lh, effect_lh), strict=True):
        same(changed, whole)


def test_the_stronger_role_counts_even_where_the_other_would_score_more() -> None:
    """0.2 in one of two probes scores 0.1; the weaker role's 0.15 in both is not looked at."""
    score_lh, effect_lh = capability_scores([np.array([[[0.4]], [[0.15]]]), np.array([[[0.0]], [[0.15]]])])
    assert (score_lh.item(), effect_lh.item()) == (0.1, 0.2)


def test_an_effect_of_exactly_the_threshold_counts() -> None:
    assert capability_scores([np.array([[[0.01, 0.0099]]])])[0].tolist() == [[0.01, 0.0]]


def test_a_probe_that_is_not_usable_does_not_dilute_the_others() -> None:
    whole, rare = [[0.5, 0.0], [0.1, 0.0]], probe(np.ones((1, 2, 2, 8)), solved=np.arange(8) < 1)
    score_lh, effect_lh = scores({"one": steady(whole), "rare": rare}).by_capability["retrieval"]
    same(score_lh, whole)
    same(effect_lh, whole)


def test_capabilities_are_scaled_and_weighed() -> None:
    """Eq 12."""
    a, b = np.array([[0.0, 2.0], [4.0, 1.0]]), np.array([[3.0, 1.0], [1.0, 2.0]])
    same(fuse({"a": a, "b": b}, {"a": 1, "b": 1}), [[0.5, 0.25], [0.5, 0.375]])
    same(fuse({"a": a, "b": b}, {"a": 3, "b": 1}), [[0.25, 0.375], [0.75, 0.3125]])
    same(fuse({"a": a, "b": b}, {"a": 0, "b": 2}), [[1.0, 0.0], [0.0, 0.5]])
    same(fuse({"a": a, "b": b + 7}, {"a": 1, "b": 1}), [[0.5, 0.25], [0.5, 0.375]])
    same(fuse({"a": a}, {"a": 2, "b": 6}), a / 4)


def test_scores_that_are_all_alike_say_nothing() -> None:
    a, flat = np.array([[0.0, 2.0], [4.0, 1.0]]), np.full((2, 2), 0.3)
    same(fuse({"flat": flat}, {"flat": 1}), np.zeros((2, 2)))
    same(fuse({"a": a, "flat": flat}, {"a": 1, "flat": 1}), a / 8)


def test_scores_of_a_teacher() -> None:
    """From pairs to Eq 12: weight 1 where none is given, and a capability without a usable probe left out of sum and
    weights.
    """
    probes = {
        "one": steady([[0.4, 0.0], [0.2, 0.1]]),
        "recall": steady([[0.0, 0.2], [0.05, 0.0]], capability="general"),
        "failed": steady([[9.0, 9.0], [9.0, 9.0]], capability="law", solved=False),
    }
    found = scores(probes, retrieval=3.0, law=50.0)
    assert list(found.by_capability) == ["retrieval", "general"]
    same(found.scores_lh, [[0.75, 0.25], [(3 * 0.5 + 0.25) / 4, 3 * 0.25 / 4]])
    same(found.effects_lh, [[0.2, 0.1], [0.125, 0.05]])  # weights are the scores' alone
    assert found.ranking() == [(0, 0), (1, 0), (0, 1), (1, 1)]


def test_scores_by_receivers_alone() -> None:
    """The first head is the stronger sender, the second the stronger receiver."""
    both = scores({"one": steady([[0.1, 0.2], [0.0, 0.0]], [[0.4, 0.0], [0.0, 0.0]])})
    receivers = dataclasses.replace(both, roles="receiver")
    same(both.effects_lh, [[0.4, 0.2], [0.0, 0.0]])
    same(receivers.effects_lh, [[0.1, 0.2], [0.0, 0.0]])
    assert (both.ranking()[0], receivers.ranking()[0]) == ((0, 0), (0, 1))
    assert receivers.take({"one": [0]}).ranking() == receivers.ranking()
    with pytest.raises(ScoresError, match="roles 'sender': choose one of both, receiver"):
        dataclasses.replace(both, roles="sender")


def test_scores_by_what_a_linear_head_leaves() -> None:
    """Of each layer's own kind; the product is 0 where either score is."""
    gdn, lightning = np.array([[0.1, 0.2], [0.3, 0.4]]), np.array([[0.5, 0.0], [0.7, 0.8]])
    tables = {"gdn": gdn, "lightning": lightning}
    replaceability = {kind: Replaceability(table, *np.ones((4, 2, 2))) for kind, table in tables.items()}
    causal = scores({"one": steady([[0.0, 0.3], [0.6, 0.2]])})
    whole = dataclasses.replace(causal, replaceability=replaceability, become=("lightning", "gdn"))
    assert whole.score == "causal" and np.array_equal(whole.scores_lh, causal.scores_lh)
    residual_lh = np.array([[0.5, 0.0], [0.3, 0.4]])
    same(dataclasses.replace(whole, score="replaceable").scores_lh, residual_lh)
    product = dataclasses.replace(whole, score="product")
    same(product.scores_lh, [[0.0, 0.0], [0.3, 0.4 / 3]])
    assert product.ranking() == [(1, 0), (1, 1), (0, 0), (0, 1)]  # heads without a score by what would be left
    with pytest.raises(ScoresError, match=r"score product: the file holds no imitations by kda; .*-by kda$"):
        dataclasses.replace(product, become=("kda", "gdn"))


def test_ranking_is_by_score_then_effect_then_place() -> None:
    below = scores({"one": steady([[0.002, 0.0], [0.005, 0.0]])})  # no effect counts, so all scores are 0
    assert not below.scores_lh.any() and below.ranking() == [(1, 0), (0, 0), (0, 1), (1, 1)]
    # (0, 1) has the larger effect, in one probe only; (1, 1) a steady one and the higher score.
    found = scores({"one": steady([[0.0, 0.3], [0.0, 0.1]]), "two": steady([[0.0, 0.0], [0.0, 0.1]])})
    assert found.effects_lh[0, 1] > found.effects_lh[1, 1] and found.ranking() == [(1, 1), (0, 1), (0, 0), (1, 0)]


def test_teachers_that_cannot_be_scored() -> None:
    flat = np.zeros((1, 2, 2, 4))
    failed = {
        "one": probe(flat, solved=False),
        "two": probe(flat, gaps=0.1),
        "rare": probe(np.ones((1, 2, 2, 8)), solved=np.arange(8) < 1),
    }
    with pytest.raises(ScoresError, match="no usable probe: the teacher fails 11 of 16 prompts"):
        scores(failed)
    with pytest.raises(ScoresError, match="no score without weight: retrieval count 0"):
        scores(
            {"one": steady([[0.1, 0.2], [0.3, 0.4]]), "bad": steady(np.ones((2, 2)), capability="law", solved=False)},
            retrieval=0,
        )


def random_scores() -> HeadScores:
    rng = np.random.default_rng(3)
    one = probe(rng.normal(size=(3, 2, 2, 5)), gaps=[3.0, 4.0, 0.2, 5.0, 6.0], solved=[True, True, True, True, False])
    two = probe(rng.normal(size=(1, 2, 2, 3)) / 300, capability="law", gaps=rng.uniform(1, 9, 3))
    return HeadScores(
        shape=SHAPE,
        fingerprint=FINGERPRINT,
        probes={"one": dataclasses.replace(one, receivers=(((1, 0), (1, 1)), ((1, 0),))), "two": two},
        weights={"law": 2.5},
        roles="receiver",
        observed={"attention on the answer": rng.random((2, 2))},
        replaceability={kind: Replaceability(*rng.random((5, 2, 2))) for kind in ("gdn", "lightning")},
        settings={"length": 64, "seed": 3, "probes": ["one", "two"]},
        versions={"torch": "2.9"},
    )


ARRAYS = ("effects_rlhb", "clean_b", "corrupt_b", "solved_b")


@pytest.mark.parametrize("index", [[3, 0], [1, 1, 1, 4, 0], range(5)], ids=["subset", "repeats", "all"])
def test_take_gives_these_pairs_in_this_order(index: list[int]) -> None:
    whole = random_scores().probes["one"]
    part = whole.take(index)
    for place, pair in enumerate(index):
        for name in ARRAYS:
            assert np.array_equal(getattr(part, name)[..., place], getattr(whole, name)[..., pair])
    assert {len(part.clean_b), len(part.corrupt_b), len(part.solved_b), part.effects_rlhb.shape[-1]} == {len(index)}
    assert (part.capability, part.receivers) == (whole.capability, whole.receivers)


def test_scores_of_a_part_of_the_pairs() -> None:
    whole = random_scores()
    before = whole.scores_lh.copy()
    part = whole.take({"one": [0, 0, 1]})
    assert list(part.probes) == ["one"] and part.weights == whole.weights and part.fingerprint == whole.fingerprint
    effects_rlh = (
        2 * whole.probes["one"].effects_rlhb[..., 0].clip(-1, 1) + whole.probes["one"].effects_rlhb[..., 1].clip(-1, 1)
    ) / 3
    same(part.effects_lh, abs(effects_rlh[0]))
    assert np.array_equal(whole.scores_lh, before)


def test_round_trip(tmp_path: Path) -> None:
    path, whole = tmp_path / "deep" / "scores.json", random_scores()
    whole.save(path)
    again = HeadScores.load(path)
    assert [file.name for file in path.parent.iterdir()] == ["scores.json"], "nothing half-written stays"
    for name in ("shape", "fingerprint", "weights", "roles", "settings", "versions"):
        assert getattr(again, name) == getattr(whole, name)
    assert list(again.probes) == list(whole.probes) and again.observed.keys() == whole.observed.keys()
    np.testing.assert_allclose(list(again.observed.values()), list(whole.observed.values()), rtol=5.01e-7)
    assert again.replaceability.keys() == whole.replaceability.keys()
    for kind, tables in whole.replaceability.items():
        for name, expected in vars(tables).items():
            np.testing.assert_allclose(vars(again.replaceability[kind])[name], expected, rtol=5.01e-7)
    for found, expected in zip(again.probes.values(), whole.probes.values(), strict=True):
        assert (found.capability, found.receivers) == (expected.capability, expected.receivers)
        for name in ARRAYS:
            assert getattr(found, name).dtype == getattr(expected, name).dtype
            np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=5.01e-7)
    np.testing.assert_allclose(json.loads(path.read_text())["scores"], whole.scores_lh, rtol=1e-6)
    again.save(tmp_path / "again.json")
    for found, expected in zip(
        HeadScores.load(tmp_path / "again.json").probes.values(), again.probes.values(), strict=True
    ):
        assert all(np.array_equal(getattr(found, name), getattr(expected, name)) for name in ARRAYS)


def test_a_save_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    random_scores().save(path := tmp_path / "scores.json")
    before = path.read_bytes()
    with pytest.raises(TypeError):
        dataclasses.replace(random_scores(), settings={"seed": object()}).save(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        (card(num_layers=3), "num_layers is 2 there, 3 in the teacher"),
        (card(num_kv_groups=2), "num_kv_groups is 1 there, 2 in the teacher"),
        (card(rope_theta=5000.0), "rope_theta is 1000000.0 there, 5000.0 in the teacher"),
        (card(native_length=16, fingerprint="0" * 64), "native_length is 8 there, 16 in the teacher"),
        (card(fingerprint="0" * 64), "weights ffffffffffff there, 000000000000 in the teacher"),
    ],
)
def test_scores_of_another_teacher_are_refused_by_name(teacher: ModelCard, message: str) -> None:
    random_scores().check_teacher(card())
    with pytest.raises(ScoresError, match=f"^the scores are for another model: {message}; score this teacher anew$"):
        random_scores().check_teacher(teacher)


GONE = object()
KEYS = ("model", "fingerprint", "probes", "weights", "roles", "observed", "settings", "versions")
LONG = 10**400  # a JSON integer that no float holds
BROKEN = [
    (["format"], 1, "format 1, this version reads format 2"),
    (["format"], GONE, "format None"),
    *(([key], GONE, f"key '{key}' is missing") for key in KEYS),
    *(
        (["probes", "one", key], GONE, f"'{key}'")
        for key in ("capability", "receivers", "solved", "clean", "corrupt", "effects")
    ),
    (["model", "num_layers"], GONE, "model: key 'num_layers' is missing"),
    (["model", "colour"], 1, "model: unknown key 'colour'"),
    (["model"], [], "model: a list of keys and values is expected"),
    (["model", "num_heads"], 3, r"'effects of one' has shape \(3, 2, 2, 5\), the model needs \(3, 2, 3, 5\)"),
    (["model", "num_heads"], "2", "model: num_heads is '2'; expected a whole number"),
    (["model", "num_layers"], -2, "model: num_layers is -2; it must be from 1"),
    (["fingerprint"], 12, "fingerprint is 12; expected text"),
    (["fingerprint"], None, "fingerprint is None; expected text"),
    (["settings"], [], r"settings is \[\]; expected keys and values"),
    (["versions"], "2", "versions is '2'; expected keys and values"),
    (["weights"], [1.0], "weights is .*; expected keys and values"),
    (["weights", "law"], "2", "weights.'law'. is '2'; expected a number"),
    (["weights", "law"], float("inf"), "weights.'law'. is inf, which is no number"),
    (["weights", "law"], -1.0, "a weight is negative"),
    (["roles"], ["both"], "roles is .*; expected text"),
    (["observed"], [], "observed is .*; expected keys and values"),
    (["observed", "attention on the answer"], [[0.1, 0.2]], r"has shape \(1, 2\), the model needs \(2, 2\)"),
    (["probes"], [], "probes is .*; expected keys and values"),
    (["probes", "one"], [], "probes.'one'.: a list of keys and values is expected"),
    (["probes", "one", "capability"], ["law"], "capability is .*; expected text"),
    (["probes", "one", "solved"], [True], r"'effects of one' has shape \(3, 2, 2, 5\), the model needs \(3, 2, 2, 1\)"),
    (["probes", "one", "solved"], 5, "solved is 5; expected a list"),
    (["probes", "one", "clean"], [1.0], r"'clean of one' has shape \(1,\), the model needs \(5,\)"),
    (["probes", "one", "corrupt", 0], None, "'corrupt of one' is no table of numbers"),
    (["probes", "one", "effects", 0], GONE, r"'effects of one' has shape \(2, 2, 2, 5\)"),
    (["probes", "one", "effects", 0, 1, 0], [0.1], "'effects of one' is no table of numbers"),
    (["probes", "one", "effects", 0, 1, 0, 2], "0.1", "'effects of one' is no table of numbers"),
    (["probes", "one", "effects", 0, 1, 0, 2], LONG, "'effects of one' is no table of numbers"),
    (
        ["probes", "one", "effects", 0, 1, 0, 2],
        float("nan"),
        "'effects of one' holds a value that is not a finite number",
    ),
    (["probes", "one", "clean", 2], float("inf"), "'clean of one' holds a value that is not a finite number"),
    (["probes", "one", "receivers"], [], "'effects of one' has shape"),
    (["probes", "one", "receivers", 1], [[2, 0]], "receivers of 'one' are no heads of the model"),
    (["probes", "one", "receivers", 1], [[1]], "1 values instead of 2"),
    (["probes", "one", "receivers", 1], [[1, [0]]], "expected a whole number"),
    (["probes", "one", "receivers", 1], "ab", "is 'ab'; expected a list"),
    (["probes", "one", "capability"], "a\nb", "is not one short line"),
    (["settings"], {"a": [[[]] * 2] * 2, "b\n": 1}, "is not one short line"),
    (["replaceability", "gdn", "residual"], [[0.1]], r"'residual of gdn' has shape \(1, 1\)"),
    (["replaceability", "gdn", "write"], GONE, "'write' is missing"),
    (["replaceability"], {"g\n": {name: [[1.0] * 2] * 2 for name in TABLES}}, "is not one short line"),
]


def edited(tmp_path: Path, path: list, value: Any) -> Path:
    """A scores file with one entry changed, or removed."""
    random_scores().save(file := tmp_path / "scores.json")
    at = raw = json.loads(file.read_text())
    for step in path[:-1]:
        at = at[step]
    if value is GONE:
        del at[path[-1]]
    else:
        at[path[-1]] = value
    file.write_text(json.dumps(raw))
    return file


@pytest.mark.parametrize(("path", "value", "message"), BROKEN)
def test_broken_files_are_refused(tmp_path: Path, path: list, value: Any, message: str) -> None:
    with pytest.raises(ScoresError, match=f"^scores .*scores.json: .*{message}") as refused:
        HeadScores.load(edited(tmp_path, path, value))
    assert "\n" not in str(refused.value)


def test_a_file_from_before_there_were_imitations(tmp_path: Path) -> None:
    assert HeadScores.load(edited(tmp_path, ["replaceability"], GONE)).replaceability == {}


def test_a_file_that_gives_no_score(tmp_path: Path) -> None:
    with pytest.raises(ScoresError, match="no usable probe"):
        HeadScores.load(edited(tmp_path, ["probes"], {}))
    with pytest.raises(ScoresError, match="roles 'sender'"):
        HeadScores.load(edited(tmp_path, ["roles"], "sender"))
    with pytest.raises(ScoresError, match="no score without weight: law, retrieval count 0"):
        HeadScores.load(edited(tmp_path, ["weights"], {"law": 0, "retrieval": 0}))


def test_files_that_are_no_scores(tmp_path: Path) -> None:
    files = {
        "cut": ('{"format": 2, "sco', "not JSON"),
        "list": ("[2]", "format 'list'"),
        "deep": ("[" * 100_000, "not JSON"),
        "digits": ("[" + "1" * 5000 + "]", "not JSON"),
    }
    for name, (text, _) in files.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    HeadMap.all_fa(2, 2, 1).save(tmp_path / "head_map")
    HeadMap.from_fa([(0, 1)], 2, 2, 1, model=dataclasses.asdict(SHAPE), fingerprint=FINGERPRINT).save(
        tmp_path / "whole_map"
    )
    messages = {name: message for name, (_, message) in files.items()}
    messages |= {"none": "No such file", ".": "Is a directory", "binary": "not JSON"}
    messages |= {"head_map": "format 3, this version reads", "whole_map": "format 3, this version reads"}
    for name, message in messages.items():
        with pytest.raises(ScoresError, match=f"^scores .*{message}") as refused:
            HeadScores.load(tmp_path / name)
        assert isinstance(refused.value, InputError) and "\n" not in str(refused.value)
