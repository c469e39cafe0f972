# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""tools/evaluate.py on several ranks writes the report of one."""

import json
from pathlib import Path

import pytest

from tests.support.contestants import write_contestants
from tests.support.launch import run_ranks

TASKS = ("niah_single_1", "niah_multikey_1", "niah_multivalue")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    run_ranks(lambda rank: write_contestants(root), 1)
    return root


def evaluated(runs: Path, out: Path, ranks: int, *flags: str) -> dict[str, dict]:
    """The models of results.json; an odd number of prompts, so that replicas have unequal shares."""
    from tools.evaluate import main

    models = [f"{name}={runs / name}" for name in ("teacher", "student")]
    asked = ["--lengths", "192", "256", "--prompts", "5", "--tasks", *TASKS, "--text", str(runs / "text.txt")]
    run_ranks(lambda rank: main(["--models", *models, *asked, "--out", str(out), *flags]), ranks)
    return json.loads((out / "results.json").read_text())["models"]


@pytest.fixture(scope="module")
def alone(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    return evaluated(runs, tmp_path_factory.mktemp("alone") / "out", 1)


@pytest.mark.parametrize(
    ("ranks", "flags"),
    [
        (2, ()),
        (2, ("--tensor-model-parallel-size", "2")),
        pytest.param(4, ("--context-parallel-size", "2"), marks=pytest.mark.slow),
        pytest.param(
            4, ("--pipeline-model-parallel-size", "2", "--tensor-model-parallel-size", "2"), marks=pytest.mark.slow
        ),
    ],
    ids=["2 replicas", "TP 2", "CP 2 x 2 replicas", "TP 2 x PP 2"],
)
def test_the_report_of_several_ranks_is_that_of_one(
    runs: Path, alone: dict[str, dict], tmp_path: Path, ranks: int, flags: tuple[str, ...]
) -> None:
    found = evaluated(runs, tmp_path / "out", ranks, *flags)
    assert list(found) == list(alone)
    for name, entry in found.items():
        for key, value in entry.items():
            if key != "text":
                assert value == alone[name][key], (name, key)
        for text, expected in zip(entry["text"], alone[name]["text"], strict=True):
            assert text["nll"] == pytest.approx(expected["nll"], rel=1e-5)
            assert [part["nll"] for part in text["by_position"]] == pytest.approx(
                [p["nll"] for p in expected["by_position"]], rel=1e-5
            )
            assert text["agreement"]["share"] == expected["agreement"]["share"]
    assert alone["teacher"]["text"][0]["nll"] != alone["student"]["text"][0]["nll"]
    assert len({task["digest"] for task in alone["teacher"]["tasks"]}) == 6
