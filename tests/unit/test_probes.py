# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Counterfactual pairs: what differs, what does not, and what cannot be asked for."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from hydra_mcore.heads import InputError
from hydra_mcore.selection import probes
from hydra_mcore.selection.needles import RULER_FORMAT, TASKS, NeedleFormat
from hydra_mcore.selection.probes import EVALUATION_SEEDS, check_seed, load_format, load_tokenizer, probe_batches, read_haystack

TEACHER = Path(__file__).parents[2] / "examples" / "tiny" / "teacher"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder as far as probes look: the tokenizer's."""
    folder = tmp_path_factory.mktemp("checkpoint")
    (folder / "tokenizer").symlink_to(TEACHER)
    return folder


@pytest.fixture(scope="module")
def writer(checkpoint: Path) -> tuple:
    tokenizer = load_tokenizer(checkpoint)
    source = Path(dataclasses.__file__).read_text(encoding="utf-8")
    ids = np.asarray(tokenizer.encode(source, add_special_tokens=False), dtype=np.int64)
    return load_format(checkpoint), tokenizer, ids


@pytest.mark.parametrize("task", TASKS)
def test_only_the_queried_value_differs(task: str, writer: tuple) -> None:
    (batch,) = probe_batches(task, *writer, length=160, pairs=6, seed=4)
    assert batch.task == task and batch.clean_bs.shape == batch.corrupt_bs.shape == (6, 160)
    start, width = batch.answer_start, batch.answer_bp.shape[1]
    assert start + width == 160 and torch.equal(batch.clean_bs[:, start:], batch.answer_bp)
    for clean, corrupt, answer, distractor in zip(batch.clean_bs, batch.corrupt_bs, batch.answer_bp, batch.distractor_bp, strict=True):
        changed = (clean != corrupt).nonzero().flatten().tolist()
        assert changed == list(range(changed[0], changed[0] + width)) and changed[-1] < start
        assert torch.equal(clean[changed], answer) and torch.equal(corrupt[changed], distractor)


def test_batches_bound_the_tokens_and_change_nothing(writer: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    (whole,) = probe_batches("niah_single_2", *writer, length=128, pairs=5, seed=4)
    monkeypatch.setattr(probes, "TOKENS_A_FORWARD", 300)
    parts = list(probe_batches("niah_single_2", *writer, length=128, pairs=5, seed=4))
    assert [len(part.clean_bs) for part in parts] == [2, 2, 1]
    for name in ("clean_bs", "corrupt_bs", "answer_bp", "distractor_bp"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))
    (other,) = probe_batches("niah_single_2", *writer, length=64, pairs=4, seed=5)
    (again,) = probe_batches("niah_single_2", *writer, length=64, pairs=4, seed=5)
    (unlike,) = probe_batches("niah_single_2", *writer, length=64, pairs=4, seed=6)
    assert torch.equal(other.clean_bs, again.clean_bs) and not torch.equal(other.clean_bs, unlike.clean_bs)


def test_seeds_of_evaluation_are_refused() -> None:
    check_seed(0), check_seed(EVALUATION_SEEDS - 1)
    for seed in (-1, EVALUATION_SEEDS):
        with pytest.raises(InputError, match=f"seed {seed}"):
            check_seed(seed)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"length": 5}, "probe niah_single_2 with 5 tokens"),
        ({"length": 0}, "0 tokens a prompt"),
        ({"length": 10**7}, "haystack text has"),
        ({"pairs": 0}, "0 pairs"),
        ({"seed": 10**6}, "seed"),
    ],
)
def test_prompts_that_cannot_be_built(changes: dict, message: str, writer: tuple) -> None:
    with pytest.raises(InputError, match=message):
        list(probe_batches("niah_single_2", *writer, **{"length": 64, "pairs": 2, "seed": 0, **changes}))


def test_format_is_the_files_then_the_teachers_then_rulers(checkpoint: Path, tmp_path: Path) -> None:
    assert load_format(checkpoint) == NeedleFormat.load(TEACHER / "needles.json")
    assert load_format(tmp_path) == RULER_FORMAT
    RULER_FORMAT.save(tmp_path / "own.json")
    assert load_format(checkpoint, tmp_path / "own.json") == RULER_FORMAT
    (tmp_path / "bad.json").write_text("{}")
    for name, message in (("none.json", "No such file"), ("bad.json", "is not a needle format")):
        with pytest.raises(InputError, match=message):
            load_format(checkpoint, tmp_path / name)


def test_haystack(writer: tuple, tmp_path: Path) -> None:
    _, tokenizer, _ = writer
    assert len(read_haystack(tokenizer)) > 50_000
    (tmp_path / "a.txt").write_text("plain words")
    assert tokenizer.decode(read_haystack(tokenizer, tmp_path / "a.txt")) == "plain words"
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\xff")
    for name, message in (("none.txt", "No such file"), ("empty.txt", "no text in it"), ("binary.txt", "not UTF-8")):
        with pytest.raises(InputError, match=message):
            read_haystack(tokenizer, tmp_path / name)


def test_a_checkpoint_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no tokenizer beside the checkpoint"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer").mkdir()
    with pytest.raises(InputError, match="the tokenizer does not load"):
        load_tokenizer(tmp_path)
