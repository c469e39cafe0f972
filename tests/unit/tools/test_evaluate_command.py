# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""tools/evaluate.py on small models: what is kept, what is not run twice, what it refuses."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from hydra_mcore.evaluation import evaluate
from hydra_mcore.evaluation.loading import describe, open_model
from hydra_mcore.evaluation.models import EvaluatedModel, ModelFacts
from hydra_mcore.evaluation.perplexity import text_windows
from hydra_mcore.evaluation.records import Contestant, Piece, Records
from hydra_mcore.model.runtime import process_groups
from hydra_mcore.ruler.haystack import read_text
from hydra_mcore.tokenizer import load_tokenizer
from tests.support.contestants import write_contestants
from tools.evaluate import main

SEED = 1_000_000
FILES = ["accuracy.png", "loss.png", "report.md", "results.json"]
TASKS = ("--tasks", "niah_single_1", "niah_multikey_1", "niah_multivalue")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_contestants(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """What models were asked: name of the folder, rows, tokens a row."""
    calls: list[tuple[str, int, int]] = []

    def noting(name: str, answer: Callable, ids_bs: torch.Tensor, *more: object) -> object:
        calls.append((name, *ids_bs.shape))
        return answer(ids_bs, *more)

    def opened(facts: ModelFacts, dtype: torch.dtype) -> EvaluatedModel:
        model = open_model(facts, dtype)
        for name in ("predicted", "token_losses", "generated"):
            setattr(model, name, partial(noting, facts.folder.name, getattr(model, name)))
        return model

    monkeypatch.setattr(evaluate, "open_model", opened)
    return calls


def call(
    runs: Path,
    out: Path,
    *more: str,
    models: tuple[str, ...] = ("teacher", "student"),
    lengths: tuple[int, ...] = (192, 256),
) -> None:
    named = [model if "=" in model else f"{model}={runs / model}" for model in models]
    given = ["--lengths", *map(str, lengths), "--prompts", "3", "--text", str(runs / "text.txt"), "--out", str(out)]
    main(["--models", *named, *given, *(() if "--tasks" in more else TASKS), *more])


def results(out: Path) -> dict[str, dict]:
    return json.loads((out / "results.json").read_text())["models"]


def test_report_and_what_is_kept(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    call(runs, tmp_path)
    said = capsys.readouterr().out
    assert re.search(r"\| teacher \| 8 of 8 \| 192 \|.*\n\| student \| 3 of 8 \| 192 \|", said)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*FILES, "prompts", "records"])
    assert all((tmp_path / name).read_bytes()[:4] == b"\x89PNG" for name in FILES[:2])
    found = results(tmp_path)
    assert list(found) == ["teacher", "student"]
    teacher, student = found.values()
    assert [(task["task"], task["length"], task["scoring"]) for task in teacher["tasks"]][:3] == [
        ("niah_single_1", 192, "teacher-forced"), ("niah_multikey_1", 192, "teacher-forced"), ("niah_multivalue", 192,
            "generation"),
    ]  # fmt: skip
    assert [task["digest"] for task in teacher["tasks"]] == [task["digest"] for task in student["tasks"]]
    assert all(task["total"] == 3 and task["seed"] == SEED for task in teacher["tasks"])
    assert teacher["text"][0]["nll"] != student["text"][0]["nll"]
    assert not list(tmp_path.rglob("*.partial"))


def test_agreement_is_the_share_of_equal_likeliest_tokens(runs: Path, tmp_path: Path) -> None:
    call(runs, tmp_path, "--tasks", "niah_single_1", lengths=(160, 192, 256))
    found, tokenizer = results(tmp_path)["student"]["text"], load_tokenizer(runs / "teacher")
    assert [text["length"] for text in found] == [160, 192, 256] and found[2]["agreement"][
        "share"
    ] is None  # beyond the native length
    windows_bs = text_windows(read_text(tokenizer, runs / "text.txt"), 192)
    with process_groups():
        models = [open_model(describe(runs / name), torch.float32) for name in ("teacher", "student")]
        teacher_bs, student_bs = (
            torch.cat([model.token_losses(ids_s[None])[1] for ids_s in windows_bs]) for model in models
        )
    same = [
        int(teacher_bs[row, place] == student_bs[row, place]) for row in range(len(windows_bs)) for place in range(191)
    ]
    kept = [np.load(path) for path in sorted((tmp_path / "records").glob("*/text-192-*.npy"))]
    assert kept[0].dtype == np.int32 and np.array_equal((kept[0] == kept[1]).flatten(), same)
    assert found[1]["agreement"] == {"with": "teacher", "share": pytest.approx(sum(same) / len(same))} and 0 < sum(
        same
    ) < len(same)


class Killed(BaseException):
    """Nothing catches it, as nothing catches SIGKILL."""


def kill_after(pieces: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let an evaluation die while it keeps its next piece, half of the file written."""
    keep, kept = Records.keep, []

    def keep_or_die(self: Records, contestant: Contestant, piece: Piece, *found: object) -> None:
        if len(kept) == pieces:
            folder = self.root / contestant.key
            (folder / f"{piece.file_name}.0123abcd.partial").write_text('{"piece": {"task":')
            raise Killed
        kept.append(piece)
        keep(self, contestant, piece, *found)

    monkeypatch.setattr(Records, "keep", keep_or_die)


def test_a_killed_evaluation_goes_on_where_it_was(
    runs: Path, tmp_path: Path, asked: list[tuple[str, int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = ("--tasks", "niah_single_1", "niah_multikey_1")
    call(runs, tmp_path / "whole", *tasks)
    whole, pieces = list(asked), 2 * 2 * 3
    done = 0
    for kill in (1, 5, 3):  # inside the first model, at its end, inside the second model
        with monkeypatch.context() as patch, pytest.raises(Killed):
            kill_after(kill, patch)
            call(runs, tmp_path / "killed", *tasks)
        done += kill
        assert len(list((tmp_path / "killed" / "records").glob("*/*-*.json"))) == done
        assert not (tmp_path / "killed" / "report.md").exists()
    asked.clear()
    call(runs, tmp_path / "killed", *tasks)
    assert asked == whole[-len(asked) :] and 0 < len(asked) < len(whole) // 2 and done < pieces
    for name in FILES:
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    asked.clear()
    call(runs, tmp_path / "killed", *tasks)
    assert asked == []
    broken = next((tmp_path / "killed" / "records").glob("*/niah_single_1-192-*.json"))
    broken.write_text(broken.read_text()[:30])  # as a full disk leaves it
    call(runs, tmp_path / "killed", *tasks)
    assert asked == [(asked[0][0], 3, 192)]
    assert (tmp_path / "killed" / "results.json").read_bytes() == (tmp_path / "whole" / "results.json").read_bytes()


def test_more_is_added_by_asking_for_it(
    runs: Path, tmp_path: Path, asked: list[tuple[str, int, int]], capsys: pytest.CaptureFixture
) -> None:
    """Models, lengths, tasks one after the other give the report of one call; who stands in it keeps name and place."""
    call(runs, tmp_path / "once")
    calls, parts = sorted(asked), tmp_path / "parts"
    asked.clear()
    call(runs, parts, "--tasks", "niah_multikey_1", models=("teacher",), lengths=(192,))
    call(runs, parts, "--tasks", "niah_multikey_1", "niah_multivalue", models=("student",), lengths=(256,))
    assert results(parts)["student"]["groups"] == [] or "multi-key" in (parts / "report.md").read_text()
    moved = runs.with_name("elsewhere")  # what counts is what a folder holds
    moved.mkdir()
    shutil.copytree(runs / "student", moved / "student")
    call(runs, parts, models=(f"student={moved / 'student'}", "teacher"), lengths=(256, 192))
    assert sorted((name, *shape) for name, *shape in asked) == calls
    once, added = results(tmp_path / "once"), results(parts)
    added["student"]["folder"] = once["student"]["folder"]
    assert list(added) == ["teacher", "student"] and added == once
    assert (parts / "report.md").read_bytes() == (tmp_path / "once" / "report.md").read_bytes()
    asked.clear()
    capsys.readouterr()
    call(runs, parts, "--skip-existing")
    assert capsys.readouterr().out == f"{parts}: holds a report with every piece already\n" and asked == []


def test_a_larger_set_counts_once_all_models_took_it(runs: Path, tmp_path: Path) -> None:
    few = ("--tasks", "niah_single_1", "--no-text-loss")
    call(runs, tmp_path, *few, lengths=(192,))
    call(runs, tmp_path, *few, "--prompts", "5", models=("teacher",), lengths=(192,))
    assert [line["tasks"][0]["total"] for line in results(tmp_path).values()] == [3, 3]
    call(runs, tmp_path, *few, "--prompts", "5", models=("student",), lengths=(192,))
    assert [line["tasks"][0]["total"] for line in results(tmp_path).values()] == [5, 5]
    assert not (tmp_path / "loss.png").exists()


def test_models_of_different_tokenizers_stand_in_one_report(runs: Path, tmp_path: Path) -> None:
    call(runs, tmp_path, "--tasks", "niah_single_1", models=("teacher", "other"), lengths=(512,))
    teacher, other = results(tmp_path).values()
    assert teacher["tokenizer"] != other["tokenizer"] and teacher["tasks"][0]["digest"] != other["tasks"][0]["digest"]
    assert (teacher["tasks"][0]["wording"][:5], other["tasks"][0]["wording"][:5]) != ("ruler", "ruler")
    text = (tmp_path / "report.md").read_text()
    assert "different tokenizers" in text and "Bits per byte" in text
    tokenizer = load_tokenizer(runs / "other")
    windows_bs = text_windows(read_text(tokenizer, runs / "text.txt"), 512)
    size = sum(len(tokenizer.decode(ids_s[1:]).encode()) for ids_s in windows_bs)
    found = other["text"][0]
    assert found["bits_per_byte"] == pytest.approx(
        found["nll"] / np.log(2) * windows_bs.numel() * 511 / 512 / size, rel=1e-6
    )
    assert found["agreement"]["share"] is None


def test_dry_run_says_what_would_run(
    runs: Path, tmp_path: Path, asked: list[tuple[str, int, int]], capsys: pytest.CaptureFixture
) -> None:
    call(runs, tmp_path, models=("teacher",), lengths=(192,))
    asked.clear()
    capsys.readouterr()
    call(runs, tmp_path, "--dry-run", "--yarn", "teacher")
    lines = capsys.readouterr().out.splitlines()
    text = sum(
        text_windows(read_text(load_tokenizer(runs / "teacher"), runs / "text.txt"), n).numel() for n in (192, 256)
    )
    assert lines[0].startswith("teacher: 4 of 8 pieces to run")
    assert (
        lines[1] == f"teacher + YaRN x2: 8 of 8 pieces to run, {3 * 3 * (192 + 256) + text:,} tokens to read (float32)"
    )
    assert lines[-1].endswith("4 pieces are there already") and asked == []
    assert list(results(tmp_path)) == ["teacher"]


def test_yarn_is_one_more_row(runs: Path, tmp_path: Path) -> None:
    call(runs, tmp_path, "--tasks", "niah_single_1", "--yarn", "teacher=4", "--reference", "student", lengths=(256,))
    found = results(tmp_path)
    assert list(found) == ["teacher", "teacher + YaRN x4", "student"]
    assert [line["yarn"] for line in found.values()] == [None, 4.0, None]
    assert found["teacher"]["text"][0]["nll"] != found["teacher + YaRN x4"]["text"][0]["nll"]
    assert {line["text"][0]["agreement"]["with"] for line in found.values()} == {"student"}


def test_bad_input_is_one_line(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    small = tmp_path / "small"
    shutil.copytree(runs / "other", small)
    for file in (runs / "teacher" / "tokenizer").iterdir():
        shutil.copyfile(file, small / "tokenizer" / file.name)
    card = json.loads((small / "model.json").read_text())
    card["shape"]["vocab_size"] = 300
    (small / "model.json").write_text(json.dumps(card))
    (tmp_path / "file").write_text("x")
    (tmp_path / "short.txt").write_text("import this.")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "results.json").write_text('{"format": 1}')
    call(runs, tmp_path / "known", "--tasks", "niah_single_1", models=("teacher",), lengths=(192,))
    capsys.readouterr()
    cases = [
        ({"models": (f"small={small}",)}, (), "small: its vocabulary has 300 words, the tokenizer gives token"),
        ({"models": ("teacher", f"teacher={runs / 'student'}")}, (), "two are named 'teacher'"),
        ({"models": ("teacher", f"again={runs / 'teacher'}")}, (), "'teacher' and 'again' are one and the same model"),
        ({"models": ("nowhere",)}, (), "nowhere: No such file"),
        ({}, ("--tasks", "niah_single_9"), "--tasks niah_single_9: unknown; choose from all, single-key"),
        ({}, ("--scoring", "teacher-forced"), "niah_multivalue has more than one right text"),
        ({}, ("--yarn", "teechr"), "--yarn teechr: no such name in --models; there are teacher, student"),
        ({}, ("--yarn", "teacher=four"), "--yarn teacher=four: the factor is no number"),
        ({}, ("--yarn", "student"), "student: its FA heads read no positions"),
        ({"lengths": (48,)}, ("--yarn", "teacher"), "--yarn teacher: factor 1 stretches nothing"),
        ({}, ("--reference", "techer"), "--reference techer: no such model; there are teacher, student"),
        ({}, ("--seed", "5"), "seed 5: evaluation uses 1000000"),
        ({}, ("--prompts", "0"), "0 prompts a task"),
        ({"lengths": (192, 192)}, (), "each once"),
        ({"lengths": (9,)}, (), "niah_single_1 with 9 tokens: too short"),
        ({}, ("--text", str(tmp_path / "missing.txt")), "missing.txt: No such file"),
        ({}, ("--text", str(tmp_path / "short.txt")), "give a longer one"),
        ({}, ("--template", "chat"), "chat template"),
        ({"out": tmp_path / "file" / "out"}, (), "not a writable folder"),
        ({"out": tmp_path / "old"}, (), "old/results.json: no report that this version can add to .format 1."),
        (
            {"out": tmp_path / "known", "models": (f"teacher={runs / 'student'}",)},
            (),
            "'teacher' is another model there",
        ),
        (
            {"out": tmp_path / "known", "lengths": (512,)},
            ("--template", "ruler"),
            "holds prompts worded as .*, not as ruler",
        ),
    ]
    for changes, more, message in cases:
        with pytest.raises(SystemExit) as status:
            call(runs, changes.pop("out", tmp_path / "out"), *more, **changes)
        (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
        assert status.value.code == 2 and re.search(f"^evaluate: .*{message}", line), line
    assert not (tmp_path / "out" / "records").exists()
    with pytest.raises(SystemExit):
        main(["--models", str(runs / "teacher"), "--lengths", "192", "--out", str(tmp_path / "out")])
    assert "the loss on text needs --text FILE" in capsys.readouterr().err
