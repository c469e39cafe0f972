# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The base of the log-position scale: one that was planted is found, on one rank and on several; what is written is
used.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hydra_mcore.config import HydraOptions, ModelCard
from hydra_mcore.errors import InputError
from hydra_mcore.evaluation.log_scale import LIMITS, best_base
from hydra_mcore.evaluation.log_scale_report import FIGURE_NAME, JSON_NAME, TABLE_NAME
from hydra_mcore.heads import HeadMap
from tests.support.launch import model_parallel, run_ranks
from tests.support.planted_scale import LENGTH, SHAPE, WINDOWS, planted_run
from tools.tune_log_scale import main

PLANTED = 20.0
FLAGS = ["--length", str(LENGTH), "--windows", str(WINDOWS), "--candidates", "50", "100", "200"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("log_scale")
    run_ranks(planted_run, 1, folder, PLANTED)
    return folder


def command(folder: Path, *flags: str) -> list[str]:
    return ["--checkpoint", str(folder / "student"), "--text", str(folder / "text.txt"), *FLAGS, *flags]


def tune(folder: Path, out: Path, ranks: int = 1, *flags: str) -> dict:
    run_ranks(lambda rank: main(command(folder, "--out", str(out), *flags)), ranks)
    return json.loads((out / JSON_NAME).read_text())


@pytest.fixture(scope="module")
def alone(run: Path) -> dict:
    return tune(run, run / "alone")


def losses(rank: int, folder: Path, bases: list[float | None]) -> np.ndarray:
    """[bases, windows] by a model that is built with each base: from whole logits, in float64."""
    from hydra_mcore.model.build import build_model
    from hydra_mcore.model.checkpoints import load_weights

    words = (folder / "text.txt").read_text().split()
    ids_bs = torch.tensor([int(word[1:]) for word in words]).view(WINDOWS, LENGTH)
    found = []
    with model_parallel(), torch.no_grad():
        for base in bases:
            card = ModelCard.load(folder / "student")
            chosen = {"fa_log_scale": "never"} if base is None else {"fa_log_scale_base": base}
            model = build_model(dataclasses.replace(card, options=dataclasses.replace(card.options, **chosen))).eval()
            load_weights([model], folder / "student")
            logits_bsw = model(ids_bs, torch.arange(LENGTH).expand_as(ids_bs), None).double()[:, :-1]
            found.append(F.cross_entropy(logits_bsw.mT, ids_bs[:, 1:], reduction="none").mean(1).numpy())
    return np.array(found)


def test_the_planted_base_is_found_beyond_the_grid(alone: dict, run: Path) -> None:
    """20 lies below all candidates; the least loss of a fine grid is the truth, to the precision that is promised."""
    fine = [float(base) for base in np.geomspace(10, 40, 41)]
    truth = fine[int(run_ranks(losses, 1, run, fine)[0].mean(1).argmin())]
    assert alone["best"] == pytest.approx(truth, rel=0.12)
    assert alone["best"] == pytest.approx(PLANTED, rel=0.2)
    assert alone["best"] < 50 and alone["present"] == 500


def test_every_trial_is_the_loss_of_a_model_built_with_that_base(alone: dict, run: Path) -> None:
    by_base = {entry["base"]: entry for entry in alone["trials"]}
    some = [alone["best"], None, 50.0, 500.0]
    best, *others = expected = run_ranks(losses, 1, run, some)[0]
    assert [by_base[base]["loss"] for base in some] == pytest.approx(expected.mean(1).tolist(), rel=1e-6)
    gaps = np.array(others) - best
    assert [by_base[base]["difference"] for base in some[1:]] == pytest.approx(gaps.mean(1).tolist(), rel=1e-5)
    assert [by_base[base]["error"] for base in some[1:]] == pytest.approx(
        (gaps.std(1, ddof=1) / WINDOWS**0.5).tolist(), rel=1e-4
    )
    for entry in alone["trials"]:
        whole = sum(
            loss * (end - start) for loss, (start, end) in zip(entry["by_position"], alone["positions"], strict=True)
        )
        assert whole / (LENGTH - 1) == pytest.approx(entry["loss"], rel=1e-9)
        assert (entry["difference"] == 0) == (entry["base"] == alone["best"])


@pytest.mark.parametrize("flags", [["--context-parallel-size", "2"], []], ids=["CP", "DP"])
def test_two_ranks_find_the_same(alone: dict, run: Path, tmp_path: Path, flags: list[str]) -> None:
    found = tune(run, tmp_path, 2, *flags)
    assert [entry["base"] for entry in found["trials"]] == [entry["base"] for entry in alone["trials"]]
    for mine, theirs in zip(found["trials"], alone["trials"], strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5) and mine["error"] == pytest.approx(
            theirs["error"], rel=1e-3
        )


def test_what_is_written_is_the_choice_alone_and_is_loaded(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "student", tmp_path / "student")
    shutil.copy(run / "text.txt", tmp_path)
    before = json.loads((tmp_path / "student" / "model.json").read_text())
    few = ["--windows", "3", "--length", "80"]
    found = tune(tmp_path, tmp_path / "out", 1, *few, "--write")
    after = json.loads((tmp_path / "student" / "model.json").read_text())
    changed = {key for key in before["options"] if before["options"][key] != after["options"][key]}
    assert changed == {"fa_log_scale_base"} and after["options"]["fa_log_scale_base"] == found["best"] < 50
    assert {key: after[key] for key in after if key != "options"} == {
        key: before[key] for key in before if key != "options"
    }
    assert tune(tmp_path, tmp_path / "again", 1, *few)["present"] == found["best"]


def test_a_scale_that_does_harm_is_switched_off(tmp_path: Path) -> None:
    run_ranks(planted_run, 1, tmp_path, None)
    found = tune(tmp_path, tmp_path / "out", 1, "--write")
    off = next(entry for entry in found["trials"] if entry["base"] is None)
    assert off["difference"] < 1e-3 and found["best"] in (None, LIMITS[1])
    card = ModelCard.load(tmp_path / "student")
    assert card.options == HydraOptions(fa_log_scale="never") or card.options.fa_log_scale_base == LIMITS[1]


def test_the_report_says_what_was_found(alone: dict, run: Path) -> None:
    text = (run / "alone" / TABLE_NAME).read_text()
    assert (
        f"Least loss: a = {alone['best']:g}" in text
        and "The scale should be on: " in text
        and "more than twice its error" in text
    )
    assert "| off |" in text and "| a = 500 (now) |" in text and "| 128 to 159 |" in text
    assert (run / "alone" / FIGURE_NAME).read_bytes().startswith(b"\x89PNG") and not list(
        (run / "alone").glob("*.partial")
    )


@pytest.mark.parametrize("truth", [3.7, 20.0, 517.0, 90_000.0])
def test_a_smooth_loss_is_minimised_from_any_grid(truth: float) -> None:
    seen: list[float] = []

    def loss(base: float) -> float:
        seen.append(base)
        return (math.log(base) - math.log(truth)) ** 2

    base, inside = best_base(loss)
    assert inside and base == pytest.approx(truth, rel=0.1) and len(set(seen)) < 25


@pytest.mark.parametrize(("loss", "limit"), [(lambda base: base, LIMITS[0]), (lambda base: -base, LIMITS[1])])
def test_a_loss_that_falls_for_ever_ends_at_a_limit(loss: Callable[[float], float], limit: float) -> None:
    assert best_base(loss, [1000.0, 1001.0, 1010.0]) == (limit, False)


@pytest.mark.parametrize("grid", [[100.0], [100.0, 100.0], [1.0, 100.0], [100.0, 1e9], [math.nan, 100.0]])
def test_a_grid_that_is_none_is_refused(grid: list[float]) -> None:
    with pytest.raises(InputError, match="name at least two bases"):
        best_base(lambda base: 0.0, grid)


@pytest.mark.parametrize(
    ("change", "flags", "message"),
    [
        (None, ["--windows", "13"], "1,920 tokens, 13 windows of 160 need 2,080"),
        (None, ["--windows", "1"], "at least two windows of two tokens"),
        (None, ["--text", "nowhere.txt"], "nowhere.txt: No such file"),
        (None, ["--checkpoint", "nowhere"], "checkpoint nowhere: No such file"),
        ({"head_map": HeadMap.from_fa([], 2, 4, 2)}, [], "no FA heads, so nothing to scale"),
        (
            {"head_map": HeadMap.all_fa(2, 4, 2), "options": HydraOptions.teacher()},
            ["--write"],
            "a teacher's family has no log-position scale to write",
        ),
        ({"shape": dataclasses.replace(SHAPE, vocab_size=32)}, [], "the model knows 32"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict | None, flags: list[str], message: str
) -> None:
    folder = run
    if change:
        folder = tmp_path
        shutil.copytree(run / "student" / "tokenizer", folder / "student" / "tokenizer")
        shutil.copy(run / "text.txt", folder)
        dataclasses.replace(ModelCard.load(run / "student"), **change).save(folder / "student")
    with pytest.raises(SystemExit) as stop:
        main(command(folder, *flags))
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("tune_log_scale: ") and message in line


def test_windows_within_the_training_length_are_warned_of(
    run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    main([*command(run, "--out", str(tmp_path)), "--length", "64"])
    said = capfd.readouterr()
    assert (
        "warning: windows of 64 tokens are no longer than the 64 of training" in said.err and "Least loss: " in said.out
    )
