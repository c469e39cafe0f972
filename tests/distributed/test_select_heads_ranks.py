# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The head selection command under a launcher: the same files as on one process, and one line for bad input."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hydra_mcore.heads import HeadMap
from hydra_mcore.selection.score import HeadScores
from tests.support.commands import ended
from tests.support.launch import run_ranks
from tools.select_heads import main

SMALL = ["--length", "128", "--pairs", "2", "--knock-out", "1", "--replaceable-by", "lightning"]


@pytest.fixture(scope="module")
def alone(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "alone"
    main(["--teacher", str(tiny_teacher), "--out", str(out), *SMALL])
    return out


def on_ranks(world_size: int, *flags: str) -> list[tuple[int, str]]:
    """Exit status and stderr of every rank."""

    def worker(rank: int) -> tuple[int, str]:
        return ended(main, flags)

    return run_ranks(worker, world_size)


@pytest.mark.parametrize(
    ("world_size", "flags"),
    [
        (2, ["--tensor-model-parallel-size", "2"]),
        pytest.param(
            4, ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"], marks=pytest.mark.slow
        ),
        pytest.param(4, ["--pipeline-model-parallel-size", "2"], marks=pytest.mark.slow),
    ],
    ids=["tp2", "tp2-pp2", "pp2-dp2"],
)
def test_ranks_find_what_one_process_finds(
    tiny_teacher: Path, alone: Path, tmp_path: Path, world_size: int, flags: list[str]
) -> None:
    out = tmp_path / "out"
    ended = on_ranks(world_size, "--teacher", str(tiny_teacher), "--out", str(out), *SMALL, *flags)
    assert [code for code, _ in ended] == [0] * world_size
    assert not any("piece" in said for _, said in ended[1:])  # one progress bar
    assert sorted(file.name for file in out.iterdir()) == sorted(file.name for file in alone.iterdir())
    assert HeadMap.load(out / "head_map.json").layers == HeadMap.load(alone / "head_map.json").layers
    found, expected = (HeadScores.load(folder / "scores.json") for folder in (out, alone))
    np.testing.assert_allclose(found.scores_lh, expected.scores_lh, rtol=1e-3, atol=1e-4)
    for name, imitated_lh in vars(expected.replaceability["lightning"]).items():
        np.testing.assert_allclose(vars(found.replaceability["lightning"])[name], imitated_lh, rtol=1e-3)
    for name, observed_lh in expected.observed.items():
        np.testing.assert_allclose(found.observed[name], observed_lh, rtol=1e-3, atol=1e-4)
    assert (out / "knock_out.json").read_text() == (alone / "knock_out.json").read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--tensor-model-parallel-size", "3"],
            "2 processes are no multiple of 3 tensor-parallel x 1 pipeline-parallel ranks",
        ),
        (["--ratio", "31:1"], "global_c keeps one in each of 4 layers"),
        (["--length", "96"], "holds an unfinished scoring whose"),  # which only the first rank reads
    ],
)
def test_bad_input_is_said_once_and_ends_every_rank(
    tiny_teacher: Path, tmp_path: Path, flags: list[str], message: str
) -> None:
    other = tmp_path / "out" / "unfinished" / "96"
    other.mkdir(parents=True)
    (other / "replica0.jsonl").write_text('{"teacher": "another"}\n["piece", 1]\n')
    ended = on_ranks(2, "--teacher", str(tiny_teacher), "--out", str(tmp_path / "out"), *SMALL, *flags)
    assert [code for code, _ in ended] == [2, 2]
    assert message in ended[0][1].splitlines()[-1] and "select_heads:" not in ended[1][1]
