# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The head selection door: its three files, re-used scores, and one clear line for what it cannot use."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from hydra_mcore.config import ModelCard
from hydra_mcore.heads import HeadMap
from hydra_mcore.model.runtime import process_groups
from hydra_mcore.selection.score import HeadScores
from tools.select_heads import main

TINY = Path(__file__).parents[2] / "examples" / "tiny" / "teacher"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from hydra_mcore.convert.hf_import import import_hf

    folder = tmp_path_factory.mktemp("runs") / "teacher"
    with process_groups():
        import_hf(TINY, folder)
    return folder


@pytest.fixture(scope="module")
def selected(teacher: Path) -> Path:
    """A first selection: two pairs of 128 tokens a task."""
    out = teacher.parent / "heads"
    main(["--teacher", str(teacher), "--out", str(out), "--length", "128", "--pairs", "2"])
    return out


def test_three_files_for_this_teacher(teacher: Path, selected: Path) -> None:
    assert sorted(file.name for file in selected.iterdir()) == ["head_map.json", "heads.png", "scores.json"]
    assert (selected / "heads.png").read_bytes().startswith(b"\x89PNG")
    card, head_map, scores = ModelCard.load(teacher), HeadMap.load(selected / "head_map.json"), HeadScores.load(selected / "scores.json")
    card.check_head_map(head_map)
    scores.check_teacher(card)
    assert head_map.num_fa * 4 == card.shape.num_layers * card.shape.num_heads and all(layer.fa for layer in head_map.layers)
    assert max(map(max, scores.scores)) > 0.05  # some head of a teacher that retrieves does carry retrieval
    assert head_map.made_by["ratio"] == "3:1" and head_map.made_by["scores"]["length"] == 128


def test_scores_serve_another_budget_without_the_model(
    teacher: Path, selected: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hydra_mcore.model.build.load_model", None)
    flags = ["--budget", "2", "--strategy", "global", "--scores", str(selected / "scores.json")]
    main(["--teacher", str(teacher), "--out", str(tmp_path), *flags])
    layers = HeadMap.load(tmp_path / "head_map.json").layers
    best = HeadScores.load(selected / "scores.json").ranking()[:2]
    assert sorted(best) == [(layer_idx, head) for layer_idx, layer in enumerate(layers) for head in layer.fa]


def test_random_maps_need_no_scores(teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hydra_mcore.model.build.load_model", None)
    main(["--teacher", str(teacher), "--out", str(tmp_path), "--strategy", "layer_random", "--seed", "7"])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["head_map.json", "heads.png"]
    assert HeadMap.load(tmp_path / "head_map.json").made_by == {"tool": "select_heads", "seed": 7, "ratio": "3:1"}


def test_dry_run_writes_nothing(teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--teacher", str(teacher), "--out", str(tmp_path / "out"), "--dry-run", "--pairs", "33", "--length", "512"])
    assert "20 forward passes: 165 pairs of 512 tokens" in capsys.readouterr().out  # 32 pairs fit one forward
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--ratio", "3"], "ratio '3': write GDN heads to FA heads"),
        (["--budget", "33", "--strategy", "global"], "budget 33: choose 0 to 32 heads"),
        (["--ratio", "31:1"], "global_c keeps one in each of 4 layers"),
        (["--seed", "1000000"], "seed 1000000"),
        (["--scores", "nowhere.json"], "scores nowhere.json: No such file"),
        (["--length", "4"], "probe niah_single_1 with 4 tokens"),
        (["--length", "0"], "0 tokens"),
        (["--pairs", "0"], "0 pairs"),
        (["--haystack", "nowhere.txt"], "haystack nowhere.txt: No such file"),
        (["--format", "nowhere.json"], "needle format nowhere.json: No such file"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    flags: list[str], message: str, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for extra in ([], ["--dry-run"]):
        with pytest.raises(SystemExit) as stop:
            main(["--teacher", str(teacher), "--out", str(tmp_path / "out"), *flags, *extra])
        last = capsys.readouterr().err.splitlines()[-1]
        assert stop.value.code == 2 and last.startswith("select_heads: ") and message in last
        assert not (tmp_path / "out").exists()


def test_what_is_no_teacher_and_what_is_taken(teacher: Path, selected: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    card = ModelCard.load(teacher)
    student = dataclasses.replace(card, head_map=HeadMap.load(selected / "head_map.json"))
    other = dataclasses.replace(card, fingerprint="0" * 64)
    for name, made in (("student", student), ("other", other)):
        made.save(tmp_path / name)
    for folder, out, flags, message in (
        (tmp_path, tmp_path / "out", [], "not a hydra_mcore checkpoint"),
        (tmp_path / "student", tmp_path / "out", [], "only 8 of 32 heads are full attention; give the teacher"),
        (tmp_path / "other", tmp_path / "out", ["--scores", str(selected / "scores.json")], "this one is 000000000000"),
        (teacher, selected, [], "already holds a head_map.json"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["--teacher", str(folder), "--out", str(out), *flags])
        assert stop.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]
