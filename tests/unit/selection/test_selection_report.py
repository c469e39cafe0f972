# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The page about a selection: it stands alone, escapes what it is given, and says what the numbers say."""

from __future__ import annotations

import dataclasses
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hydra_mcore.config import ModelShape
from hydra_mcore.heads import HeadMap
from hydra_mcore.kinds import DEFAULT_LINEAR
from hydra_mcore.selection import figures
from hydra_mcore.selection.choose import Choice
from hydra_mcore.selection.evidence import KnockOut, gather
from hydra_mcore.selection.imitation_section import imitations
from hydra_mcore.selection.report import write_report
from hydra_mcore.selection.score import HeadScores, ProbeEffects, Replaceability

SHAPE = ModelShape(
    num_layers=3,
    hidden_size=16,
    num_heads=4,
    num_kv_groups=2,
    head_dim=4,
    ffn_hidden_size=8,
    vocab_size=10,
    native_length=8,
)
PROBES = {"niah_single_1": "retrieval", "niah_multikey_1": "retrieval", "copying": "general"}
NAME = "teacher <b>&'$1$"
KNOCK_OUT = KnockOut(
    (0.0, 0.25), (0, 3), {"best first": ((0.975, 0.125),), "random": ((0.975, 0.8), (0.975, 0.7))}, prompts=40
)
LINEAR = (DEFAULT_LINEAR,) * 3
VOID = ("meta", "img")


def made_scores(
    pairs: int = 4, rounds: int = 2, probes: dict[str, str] = PROBES, seed: int = 0, **facts: Any
) -> HeadScores:
    rng = np.random.default_rng(seed)
    size = rng.exponential(0.2, (rounds + 1, 3, 4, 1)) * (rng.random((rounds + 1, 3, 4, 1)) < 0.3)
    size[0, 1, 2] = 0.5
    receivers = (((2, 3), (1, 0)), ((1, 1),))[:rounds]
    effects = {
        name: ProbeEffects(
            capability,
            size + rng.normal(0, 0.01, (*size.shape[:3], pairs)),
            receivers,
            *np.full((2, pairs), [[6], [-4]]),
            np.arange(pairs) < 3,
        )
        for name, capability in probes.items()
    }  # of four pairs the last is unsolved
    settings = {"length": 4096, "prompts_sha256": "5ca1ab1e", "seed": 17}
    return HeadScores(SHAPE, "f00d" * 16, effects, settings=settings, versions={"numpy": "2.5.5"}, **facts)


def chosen(scores: HeadScores, budget: int = 3, **facts: Any) -> Choice:
    head_map = HeadMap.from_fa(scores.ranking()[:budget], 3, 4, 2, strategy="global", made_by={"tool": "select_heads"})
    values = {
        "objective": "the most of <all> scores",
        "kept": 0.8125,
        "given_up": 0.0625,
        "kv_groups": 3,
        "kv_fraction": 0.5,
        "linear": LINEAR,
    }
    return Choice(head_map, **{**values, **facts})


class Page(HTMLParser):
    """The text of a page, what it points to, and whether its tags close."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text, self.sources, self.tags, self.open = "", [], set(), []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href", "srcset", "data")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def report(folder: Path, scores: HeadScores, choice: Choice | None = None, **facts: Any) -> Page:
    return Page(write_report(folder, scores, choice or chosen(scores), **{"model_name": NAME, **facts}))


def assert_pngs(folder: Path, *names: str) -> None:
    assert sorted(path.name for path in folder.iterdir()) == sorted(f"{name}.png" for name in names)
    assert all(path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n") for path in folder.iterdir())


def test_the_whole_page(tmp_path: Path) -> None:
    observed = {"attention <mass>": np.arange(12.0).reshape(3, 4)}
    scores = made_scores(observed=observed, replaceability={DEFAULT_LINEAR: made_imitations()})
    page = report(tmp_path, scores, knock_out=KNOCK_OUT, by_length={8192: made_scores(seed=0, pairs=2), 4096: scores})
    names = ("heads", "roles", "knock_out", "stability", "intervals", "layers", "budgets", "replaceability")
    assert_pngs(tmp_path / "figures", *names)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["figures", "report.html"]
    # It stands alone.
    assert len(page.sources) == 8 and all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert (
        page.open == []
        and not page.tags & {"script", "link", "iframe", "b"}
        and "http" not in page.text
        and "url(" not in page.text
    )
    # What was given stands there, as text.
    given = (
        f"Head selection: {NAME}", "the most of <all> scores", "attention <mass>", "81.2%", "6.2%",
        "50.0%: 3 of 6 kv groups",
        "f00d" * 16, "5ca1ab1e", "17", "2.5.5", "select_heads", *PROBES, "2.3, 1.0", "8K", "1:1", "512K",
        "9 of 12 pairs of prompts were used", "cannot be judged there: 3.", "40 prompts",
        "12% best first, 75% at random",
    )  # fmt: skip
    assert [text for text in given if text not in page.text] == []
    assert [
        text for text in ("nan", "Not measured", "None were recorded", "Only one capability") if text in page.text
    ] == []


def made_imitations() -> Replaceability:
    """Residuals that grow with the place of a head."""
    return Replaceability(np.arange(12.0).reshape(3, 4) / 12, *np.arange(48.0).reshape(4, 3, 4))


def test_where_effect_and_imitation_disagree(tmp_path: Path) -> None:
    """The first head of all has an effect, and a linear head does the same."""
    scores = made_scores(rounds=0)
    for probe in scores.probes.values():
        probe.effects_rlhb[0, 0, 0], probe.effects_rlhb[0, 2, 3] = 0.9, 0.3
    choice = chosen(scores)

    def text(by_kind: dict[str, Replaceability]) -> str:
        html = imitations(tmp_path, dataclasses.replace(scores, replaceability=by_kind), choice)
        return " ".join(re.sub(r"<[^>]*>", " ", html).split())

    said = text({DEFAULT_LINEAR: made_imitations()})
    assert "The 3 best heads by effect and by product overlap to 0.50 (Jaccard index)" in said
    assert (
        "0.0 effect 0.90 0.00 0.00 12 2.3 product 0.30 0.92 11.00 23" in said
    )  # effect, residual, with inherited values, half-life
    assert "by effect and by product" not in text({"kda": made_imitations()})  # the map has none of that kind
    assert "Not measured; --replaceable-by" in text({})


def test_the_numbers_are_those_of_the_evidence(tmp_path: Path) -> None:
    scores = made_scores()
    page, found = report(tmp_path, scores), gather(scores, 3, LINEAR)
    cost = next(cost for cost in found.costs if cost.ratio == "3:1")
    expected = (
        f"{found.critical_lh.sum()} of 12 heads ({found.critical_lh.mean():.1%}) are critical",
        f"{found.convertible_lh.sum()} ({found.convertible_lh.mean():.1%}) reach",
        f"Gini coefficient of the scores is {found.gini_l.mean():.2f}",
        f"{found.halves[1].overlap.mean:.2f} (Jaccard",
        f"overlap to {found.random_overlap:.2f}.",
        f"3:1{cost.num_fa}{cost.kept:.1%}{cost.kv_fraction:.1%}",
        f"3:1{cost.decode[4096]:.1%}{cost.decode[32768]:.1%}",
    )
    assert [text for text in expected if text not in page.text] == []
    assert "What removing heads doesNot measured" in page.text.replace("\n", "")


def test_one_pair_one_role_one_capability_nothing_else(tmp_path: Path) -> None:
    page = report(tmp_path, made_scores(pairs=1, rounds=0, probes={"niah_single_1": "retrieval"}))
    assert "No probe has two usable pairs" in page.text and "do not mean certainty" in page.text
    assert "Only one capability was probed (retrieval)" in page.text and "None were recorded" in page.text
    assert "sender" not in page.text.replace("senders only", "") and "1 of 1 pairs" in page.text


@pytest.mark.parametrize("budget", [0, 12])
def test_no_head_and_every_head(tmp_path: Path, budget: int) -> None:
    scores = made_scores()
    assert (
        f"{budget} of 12 attention heads keep full attention" in report(tmp_path, scores, chosen(scores, budget)).text
    )


def test_the_other_heads_are_named_by_kind_and_layer(tmp_path: Path) -> None:
    """And their costs are counted by kind."""
    scores, gdn = made_scores(), "Gated DeltaNet (GDN) heads"
    plain = report(tmp_path / "plain", scores)
    assert f"the other 9 become {gdn}." in plain.text and "at any length 7 d d for a GDN head (d" in plain.text
    linear = ("lightning", "gdn", "kda")
    head_map = HeadMap.from_fa(scores.ranking()[:3], 3, 4, 2, linear, strategy="global")
    mixed = report(tmp_path / "mixed", scores, dataclasses.replace(chosen(scores), head_map=head_map, linear=linear))
    first, last = "Lightning attention (Lightning) heads", "Kimi Delta Attention (KDA) heads"
    assert f"the other 9 become {first} in layer 0, {gdn} in layer 1, {last} in layer 2." in mixed.text
    assert "at any length 7 d d for a GDN head, 7 d d for a KDA head, 5 d d for a Lightning head (d" in mixed.text
    cost = next(cost for cost in gather(scores, 3, linear).costs if cost.ratio == "3:1")
    assert f"3:1{cost.decode[4096]:.1%}{cost.decode[32768]:.1%}" in mixed.text
    pictures = [(tmp_path / name / "figures" / "heads.png").read_bytes() for name in ("plain", "mixed")]
    assert pictures[0] != pictures[1]  # dots


def test_a_probe_without_a_pair_and_unknown_shares(tmp_path: Path) -> None:
    scores = made_scores()
    empty = dataclasses.replace(scores.probes["copying"], solved_b=np.zeros(4, dtype=bool))
    scores = dataclasses.replace(scores, probes={**scores.probes, "copying": empty})
    page = report(tmp_path, scores, chosen(scores, kept=math.nan, given_up=math.nan))
    assert (
        "do not count at all: copying." in page.text
        and "6 of 12 pairs" in page.text
        and "unknown of all heads' scores" in page.text
        and "nan" not in page.text
    )


def test_heads_given_up_for_the_objective_are_counted(tmp_path: Path) -> None:
    scores = made_scores()
    head_map = HeadMap.from_fa([*scores.ranking()[:1], *scores.ranking()[-2:]], 3, 4, 2, strategy="kv_groups")
    page = report(tmp_path, scores, dataclasses.replace(chosen(scores), head_map=head_map))
    assert "2 of the 3 best heads are not kept" in page.text


def test_the_knock_out_sentence_follows_the_numbers() -> None:
    useless = {"best first": ((0.9, 0.8),), "random": ((0.9, 0.7),)}
    assert "hurts no more than" in figures.knock_out_finding(dataclasses.replace(KNOCK_OUT, accuracy=useless))
    one = dataclasses.replace(KNOCK_OUT, heads=(0, 1))
    assert figures.knock_out_finding(one) == "Accuracy with 1 head removed: 12% best first, 75% at random"
    assert (
        figures.knock_out_finding(dataclasses.replace(KNOCK_OUT, accuracy={"random": ((0.9, 0.7),)}))
        == "Accuracy as heads are removed"
    )


def test_scores_no_better_than_chance_are_called_so(tmp_path: Path) -> None:
    scores = made_scores()
    rng = np.random.default_rng(1)
    noise = {
        name: dataclasses.replace(probe, effects_rlhb=rng.normal(0, 0.3, (3, 3, 4, 4)))
        for name, probe in scores.probes.items()
    }
    assert "no better than chance" in report(tmp_path, dataclasses.replace(scores, probes=noise)).text
    assert "So the ranking is not chance" in report(tmp_path, scores).text  # a second page replaces the first
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith(".partial")]


def test_a_map_without_scores_has_its_picture(tmp_path: Path) -> None:
    head_map = HeadMap.from_fa([(0, 1), (2, 3)], 3, 4, 2, strategy="elsewhere")
    figures.heat_map(tmp_path / "heads.png", head_map, None, NAME)
    assert_pngs(tmp_path, "heads")


@pytest.mark.parametrize("kept", [[], [(0, 1), (2, 3)]])
def test_maps_of_statistics_without_and_with_heads_to_mark(tmp_path: Path, kept: list[tuple[int, int]]) -> None:
    head_map = HeadMap.from_fa(kept, 3, 4, 2)
    figures.statistic_maps(tmp_path / "size.png", NAME, {"size": np.arange(12.0).reshape(3, 4)}, head_map)
    assert_pngs(tmp_path, "size")


def test_half_of_the_score() -> None:
    assert figures.half_of(np.array([0.1, 0.5, 0.4])) == 1 and figures.half_of(np.array([0.3, 0.3, 0.4])) == 2
    assert figures.half_of(np.zeros(3)) == 0
