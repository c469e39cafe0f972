# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Scores from effects of pairs, by hand; and the file that keeps them, with what it refuses."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hydra_mcore.config import ModelCard, ModelShape
from hydra_mcore.heads import HeadMap, InputError
from hydra_mcore.selection.patching import PairEffects
from hydra_mcore.selection.score import HeadScores, ProbeScores

SHAPE = ModelShape(
    num_layers=2, hidden_size=12, num_heads=2, num_kv_groups=1, head_dim=4, ffn_hidden_size=8, vocab_size=10, native_length=8
)


def card_of(shape: ModelShape, fingerprint: str = "f" * 64) -> ModelCard:
    from hydra_mcore.model.build import teacher_card

    return teacher_card(shape, fingerprint)


CARD = card_of(SHAPE)


def pairs(effects: list, gaps: list[float], solved: list[bool]) -> PairEffects:
    gap_b = torch.tensor(gaps, dtype=torch.float64)
    return PairEffects(torch.tensor(effects, dtype=torch.float64), gap_b + 1, torch.ones_like(gap_b), torch.tensor(solved))


def probe(effects: list[list[float]], **facts: Any) -> ProbeScores:
    return ProbeScores(tuple(map(tuple, effects)), **{"pairs": 8, "unsolved": 0, "unmoved": 0, "mean_gap": 5.0, **facts})


def scores() -> HeadScores:
    probes = {"one": probe([[0.5, 0.0], [-0.2, 0.009]]), "two": probe([[0.3, 0.0], [0.0, 0.03]])}
    return HeadScores.from_probes(CARD, probes, {"length": 64, "seed": 3}, {"torch": "2"})


def test_pairs_are_averaged_without_those_that_cannot_be_used() -> None:
    first = pairs([[[0.2, 9.0]], [[5.0, 9.0]]], [4.0, 8.0], [True, False])  # the second is unsolved
    second = pairs([[[0.4, 9.0]], [[-0.5, 9.0]]], [2.0, 0.4], [True, True])  # the second hardly moves
    result = ProbeScores.from_pairs([first, second])
    assert [value for row in result.effects for value in row] == pytest.approx([0.3, (1.0 - 0.5) / 2])  # 5.0 clipped to 1
    assert (result.pairs, result.used, result.unsolved, result.unmoved, result.mean_gap) == (4, 2, 1, 1, 3.0)


def test_a_negative_gap_or_a_nan_is_no_usable_pair() -> None:
    result = ProbeScores.from_pairs([pairs([[[0.1, 0.1]]], [-3.0, float("nan")], [True, True])])
    assert (result.used, result.unmoved, result.effects) == (0, 2, ((0.0,),))


def test_score_is_mean_size_times_the_share_of_probes_in_which_it_counts() -> None:
    result = scores()
    assert [value for row in result.effects for value in row] == pytest.approx([0.4, 0.0, 0.1, 0.0195])
    assert [value for row in result.scores for value in row] == pytest.approx([0.4 * 1, 0.0, 0.1 * 0.5, 0.0195 * 0.5])
    assert result.ranking() == [(0, 0), (1, 0), (1, 1), (0, 1)]


def test_heads_below_the_threshold_rank_by_effect_then_by_place() -> None:
    result = HeadScores.from_probes(CARD, {"one": probe([[0.002, 0.0], [0.005, 0.0]])}, {}, {})
    assert result.scores == ((0.0, 0.0), (0.0, 0.0)) and result.ranking() == [(1, 0), (0, 0), (0, 1), (1, 1)]


def test_a_probe_without_a_usable_pair_is_left_out() -> None:
    one, empty = probe([[0.5, 0.0], [0.0, 0.0]]), probe([[0.0, 0.0], [0.0, 0.0]], unsolved=8)
    assert HeadScores.from_probes(CARD, {"one": one, "empty": empty}, {}, {}).scores[0][0] == 0.5
    with pytest.raises(InputError, match="no usable pair: the teacher fails 8 of 8 prompts"):
        HeadScores.from_probes(CARD, {"empty": empty}, {}, {})


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "scores.json"
    scores().save(path)
    assert HeadScores.load(path) == scores()
    assert [file.name for file in path.parent.iterdir()] == ["scores.json"]


def test_scores_of_another_teacher_are_refused_by_name() -> None:
    scores().check_teacher(CARD)
    with pytest.raises(InputError, match="made for teacher ffffffffffff, this one is 000000000000"):
        scores().check_teacher(card_of(SHAPE, "0" * 64))
    with pytest.raises(InputError, match="it has 2 layers, the teacher has 3"):
        scores().check_teacher(card_of(dataclasses.replace(SHAPE, num_layers=3)))
    with pytest.raises(InputError, match="it has 1 kv groups, the teacher has 2"):
        scores().check_teacher(card_of(dataclasses.replace(SHAPE, num_kv_groups=2)))


def edited(tmp_path: Path, **changes: Any) -> Path:
    scores().save(path := tmp_path / "scores.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 99}, "format 99, this version reads format 1"),
        ({"scores": [[0.1, 0.2]]}, "table 'scores' is not 2 layers x 2 heads"),
        ({"effects": [[0.1], [0.2]]}, "table 'effects' is not 2 layers x 2 heads"),
        ({"scores": [[0.1, float("nan")], [0.0, 0.0]]}, "table 'scores' holds a value that is not a finite number"),
        ({"scores": [["a", 0.1], [0.0, 0.0]]}, "wrong type"),
        ({"scores": None}, "wrong type"),
        ({"probes": {"one": {}}}, "a key is missing"),
        ({"surprise": 1}, "unknown.*surprise"),
        ({"num_heads": "2"}, "is not 2 layers x 2 heads"),
    ],
)
def test_broken_files_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        HeadScores.load(edited(tmp_path, **changes))


def test_files_that_are_none(tmp_path: Path) -> None:
    (cut := tmp_path / "cut.json").write_text('{"format": 1, "sco')
    (other := tmp_path / "list.json").write_text("[1]")
    HeadMap.all_fa(2, 2, 1).save(head_map := tmp_path / "head_map.json")
    for path, message in ((tmp_path / "none.json", "No such file"), (cut, "not JSON"), (other, "format 'list'"), (head_map, "missing")):
        with pytest.raises(InputError, match=message):
            HeadScores.load(path)
