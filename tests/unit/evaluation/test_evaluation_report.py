# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The report says what the records hold: tables, averages over a task group, trends, which prompts were chosen."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from hydra_mcore.errors import InputError
from hydra_mcore.evaluation.models import ModelFacts
from hydra_mcore.evaluation.perplexity import TextLoss, edges
from hydra_mcore.evaluation.records import TEXT, Contestant, Piece, Records
from hydra_mcore.evaluation.report import write_report
from hydra_mcore.evaluation.results import comparable, groups_of, uneven
from hydra_mcore.evaluation.scoring import Score
from hydra_mcore.figures import short

FACTS = ModelFacts(
    folder=Path("runs/a"),
    fingerprint="a" * 64,
    lineage="f" * 64,
    stage="extend",
    strategy="global",
    num_fa=8,
    num_heads=32,
    native_length=512,
    vocab_size=1024,
    tokenizer_dir=Path("runs/a/tokenizer"),
)
PIECE = Piece(
    task="niah_single_1",
    length=512,
    count=4,
    scoring="teacher-forced",
    tokenizer="t" * 64,
    wording="ruler (12345678)",
    seed=1_000_000,
    digest="1" * 64,
    max_id=9,
)


def contestant(name: str, **facts: object) -> Contestant:
    return Contestant(name=name, facts=dataclasses.replace(FACTS, **facts), dtype="bf16", tokenizer=PIECE.tokenizer)


TEACHER = contestant("teacher", fingerprint="b" * 64, num_fa=32)
STUDENT = contestant("a|b")


def text_piece(length: int) -> Piece:
    windows = 1 if length == 60 else 2
    return dataclasses.replace(
        PIECE, task=TEXT, length=length, count=windows, scoring="loss", wording="", seed=0, digest=f"{length:064}"
    )


def text_loss(length: int, *by_bin: Sequence[float]) -> TextLoss:
    assert all(len(means) == len(edges(length)) for means in by_bin)
    return TextLoss(length, tuple(map(tuple, by_bin)), text_bytes=4 * length)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A teacher and a student at two lengths; the student did not take all of them."""
    keep_all(Records(tmp_path))
    return tmp_path


def keep_all(records: Records) -> None:
    records.register([TEACHER, STUDENT])
    other = dataclasses.replace(PIECE, task="niah_single_2", digest="2" * 64)
    variable = dataclasses.replace(PIECE, task="vt", scoring="generation", digest="3" * 64)
    records.keep(TEACHER, PIECE, [1, 1, 1, 0], None)
    records.keep(TEACHER, other, [1, 0, 0, 0], None)
    records.keep(TEACHER, dataclasses.replace(PIECE, length=1024, digest="4" * 64), [0, 0, 0, 0], None)
    records.keep(TEACHER, variable, [0.8, 1.0, 0.6, 0.0], None)
    records.keep(STUDENT, PIECE, [1, 1, 1, 1], None)
    records.keep(STUDENT, other, [1, 1, 1, 0], None)
    for who, losses, likeliest in (
        (TEACHER, ((3, 2, 4), (3.2, 2.4, 4.8)), 0),
        (STUDENT, ((3, 2, 1.5), (3.2, 2.2, 1.9)), 1),
    ):
        records.keep(who, text_piece(200), text_loss(200, *losses), np.asarray([[0] * 199, [likeliest] * 199]))
    records.keep(TEACHER, text_piece(60), text_loss(60, [2.0]), None)


def table_row(text: str, start: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.startswith(start)]
    return line.strip("| ").split(" | ")


def test_a_name_is_no_formula(tmp_path: Path) -> None:
    records, other = Records(tmp_path), contestant("$\\frac{$ <b>")
    records.register([other])
    records.keep(other, PIECE, [1, 1, 1, 0], None)
    assert "| $\\frac{$ <b> |" in write_report(tmp_path, None) and (tmp_path / "accuracy.png").stat().st_size


def test_tables(out: Path) -> None:
    said = write_report(out, None)
    text = (out / "report.md").read_text()
    assert said in text
    teacher, student = TEACHER.name, STUDENT.name  # 4 and 7 of 8 prompts; text of the one length that both read
    assert text.startswith(
        f"# Evaluation\n\n- **single-key**, prompts of 512 tokens: {teacher} 50%, {student} 88%\n"
        f"- **perplexity**, windows of 200 tokens: {teacher} "
    )
    single, tracking = said.split("\n\n")[1::2]
    assert said.startswith("single-key (niah_single_1, niah_single_2):\n")
    assert table_row(single, "| model") == ["model", "FA heads", "native", "512", "1K"]
    assert table_row(single, "| teacher") == [
        "teacher",
        "32 of 32",
        "512",
        "50.0 (21.5-78.5)",
        "-",
    ]  # one of two tasks at 1K
    assert table_row(single, "| a/b") == [
        "a/b",
        "8 of 32",
        "512",
        "87.5 (52.9-97.8)",
        "-",
    ]  # a bar would break the table
    assert table_row(tracking, "| teacher")[3] == "60.0 (20.5-89.7)"
    assert table_row(tracking, "| a/b")[3] == "-"
    assert "Scored by greedy decoding: vt; the others by teacher forcing" in text
    assert "| niah_single_1 | 1K | 0.0 (0.0-49.0) | - |" in text
    perplexity, agreement = text.index("## Held-out text"), text.index("## Short context")
    assert table_row(text[perplexity:agreement], "| teacher") == [
        "teacher",
        f"{np.exp(2):.2f}",
        f"{np.exp(TEACHER_NLL):.2f}",
    ]
    assert table_row(text[agreement : text.index("## Every task")], "| a/b") == ["a/b", "50.0"]
    for lines in (single, tracking):
        assert len({line.count("|") for line in lines.splitlines()}) == 1, "header, rule and rows have the same cells"


# mean over windows of (63 x first + 64 x second + 72 x third bin) / 199
TEACHER_NLL = (63 * 3.1 + 64 * 2.2 + 72 * 4.4) / 199


def test_trends_of_the_loss(out: Path) -> None:
    write_report(out, None)
    text = (out / "report.md").read_text()
    # differences by window: 2 and 2.4 (teacher, last - lowest), 0.5 and 0.3 (student, the bin before - last)
    assert (
        "- teacher: lowest, 2.200 at 64-128; at the end, 4.400 at 128-200, 2.200 +- 0.200 above that (2 windows of 200)"
        in text
    )
    assert "- a|b: falls to the end, 1.700 at 128-200, 0.400 +- 0.100 below the bin before (2 windows of 200)" in text


def test_json(out: Path) -> None:
    write_report(out, "a|b")
    raw = json.loads((out / "results.json").read_text())
    assert raw["format"] == 2 and list(raw["models"]) == ["teacher", "a|b"]
    teacher, student = raw["models"].values()
    first = {
        "task": "niah_single_1",
        "length": 512,
        "scoring": "teacher-forced",
        "correct": 3.0,
        "total": 4,
        "accuracy": 0.75,
    }
    assert first.items() <= teacher["tasks"][0].items() and len(teacher["tasks"]) == 4
    assert teacher["groups"][0] == {"group": "single-key", "length": 512, **score_json(Score(4, 8))}
    assert [group["group"] for group in teacher["groups"]] == ["single-key", "tracking"]
    assert (student["num_fa"], student["num_heads"], student["native_length"], student["dtype"]) == (8, 32, 512, "bf16")
    loss = teacher["text"][1]
    assert loss["nll"] == pytest.approx(TEACHER_NLL) and loss["tokens"] == 2 * 199
    assert loss["bits_per_byte"] == pytest.approx(TEACHER_NLL / np.log(2) * 2 * 199 / 800)
    assert loss["by_position"][1] == {"start": 64, "end": 128, "nll": pytest.approx(2.2), "error": pytest.approx(0.2)}
    assert loss["agreement"] == {"with": "a|b", "share": 0.5} and teacher["text"][0]["agreement"]["share"] is None
    with pytest.raises(InputError, match=r"--reference nobody: no such model; there are teacher, a.b"):
        write_report(out, "nobody")


def score_json(score: Score) -> dict:
    return {
        "correct": score.correct,
        "total": score.total,
        "accuracy": score.accuracy,
        "interval": list(score.interval),
    }


def test_all_models_show_the_set_that_most_of_them_took(out: Path) -> None:
    records = Records(out)
    larger = dataclasses.replace(PIECE, count=8, digest="5" * 64)
    records.keep(TEACHER, larger, [1] * 8, None)
    assert [line.pieces["niah_single_1", 512] for line in comparable(records.rows())] == [PIECE, PIECE]
    records.keep(STUDENT, larger, [0] * 8, None)
    results = comparable(records.rows())
    assert [line.scores["niah_single_1", 512] for line in results] == [Score(8, 8), Score(0, 8)]
    assert uneven(results) == [] and groups_of(results)["single-key"] == ("niah_single_1", "niah_single_2")
    third = contestant("third", fingerprint="c" * 64)
    records.register([third])
    records.keep(third, dataclasses.replace(PIECE, seed=1_000_001, digest="7" * 64), [1, 0, 0, 0], None)
    write_report(out, None)
    assert (
        "Not all models answered the same questions: niah_single_1 @512; ask them in one call"
        in (out / "report.md").read_text()
    )


def test_records_are_found_by_what_they_hold(out: Path) -> None:
    records, renamed = Records(out), contestant("new name")
    records.register([renamed])
    assert [row.contestant.name for row in records.rows()] == ["teacher", "new name"]
    assert records.holds(renamed, PIECE) and not records.holds(contestant("a|b", fingerprint="d" * 64), PIECE)
    assert not records.holds(dataclasses.replace(renamed, dtype="float32"), PIECE)
    assert not records.holds(renamed, dataclasses.replace(PIECE, digest="6" * 64))
    assert not records.holds(renamed, dataclasses.replace(PIECE, scoring="generation"))
    with pytest.raises(InputError, match="'teacher' is another model there"):
        records.check_names([contestant("teacher", fingerprint="d" * 64)])
    records.check_names([contestant("teacher"), dataclasses.replace(TEACHER, name="a|b")])  # names may change hands
    records.register([contestant("unfinished", fingerprint="e" * 64)])
    assert len(records.rows()) == 2
    row = records.rows()[0]
    assert row.contestant == TEACHER and set(row.text) == {text_piece(200), text_piece(60)}


def test_jobs_may_write_into_one_folder_at_once(tmp_path: Path) -> None:
    """The same files too: every writer has its own beside the target."""

    def job(_: int) -> None:
        for _ in range(100):
            records = Records(tmp_path)
            records.register([TEACHER])
            records.keep(TEACHER, text_piece(60), text_loss(60, [2.0]), np.zeros((1, 59)))
            assert records.rows()[0].text == {text_piece(60): text_loss(60, [2.0])}

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(job, range(4)))
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize(
    ("length", "said"),
    [(512, "512"), (1024, "1K"), (1500, "1500"), (40960, "40K"), (2**20, "1M"), (3 * 2**19, "1536K")],
)
def test_lengths_in_few_characters(length: int, said: str) -> None:
    assert short(length) == said
