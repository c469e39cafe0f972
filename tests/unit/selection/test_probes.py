# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Counterfactual pairs: what differs, what does not, and what cannot be asked for."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from hydra_mcore.errors import InputError
from hydra_mcore.ruler.haystack import Haystack, read_text
from hydra_mcore.ruler.material import PromptMaterial
from hydra_mcore.ruler.needle_format import NeedleFormat
from hydra_mcore.ruler.prompts import EVALUATION_SEEDS
from hydra_mcore.ruler.wording import RULER, own_wording, read_wording
from hydra_mcore.selection import probes
from hydra_mcore.selection.capabilities import BUILT_IN, GENERAL, RETRIEVAL
from hydra_mcore.selection.general import GENERAL_PROBES
from hydra_mcore.selection.probes import ProbeBatch, build_probes, check_seed
from hydra_mcore.tokenizer import load_tokenizer
from tests.support.paths import TINY_TEACHER

TASKS = BUILT_IN[RETRIEVAL]
IDS = ("clean_bs", "corrupt_bs", "answer_bp", "distractor_bp")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder as far as probes look: the tokenizer's."""
    folder = tmp_path_factory.mktemp("checkpoint")
    (folder / "tokenizer").symlink_to(TINY_TEACHER)
    return folder


@pytest.fixture(scope="module")
def source(checkpoint: Path) -> PromptMaterial:
    """The tiny teacher's needles in the source text of a module."""
    tokenizer = load_tokenizer(checkpoint)
    text = Path(dataclasses.__file__).read_text(encoding="utf-8")
    ids = np.asarray(tokenizer.encode(text, add_special_tokens=False))
    return PromptMaterial(tokenizer, own_wording(checkpoint), Haystack.of(tokenizer, ids))


@pytest.fixture
def own_file(tmp_path: Path) -> Path:
    """Two pairs of different lengths."""
    pairs = [
        {"clean": f"{before}a = 11; a", "corrupt": f"{before}a = 22; a", "answer": " = 11", "distractor": " = 22"}
        for before in ("", "b ")
    ]
    (tmp_path / "code.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    return tmp_path / "code.jsonl"


def tensors(batches: dict[str, list[ProbeBatch]]) -> list[torch.Tensor]:
    return [getattr(batch, name) for probe in batches.values() for batch in probe for name in IDS]


@pytest.mark.parametrize("text", [True, False], ids=["text", "noise"])
def test_only_the_queried_value_differs(text: bool, source: PromptMaterial) -> None:
    source = source if text else dataclasses.replace(source, haystack=None)
    found = build_probes(source, length=160, pairs=6, seed=4, capabilities=[RETRIEVAL])
    assert list(found) == list(TASKS)
    for task, (batch,) in found.items():
        assert (batch.probe, batch.capability) == (
            task,
            RETRIEVAL,
        ) and batch.clean_bs.shape == batch.corrupt_bs.shape == (6, 160)
        start, width = batch.answer_start, batch.answer_bp.shape[1]
        assert start + width == 160 and batch.source_bp.max() < start
        for ids_bs in (batch.clean_bs, batch.corrupt_bs):  # the true answer is teacher-forced in both
            assert torch.equal(ids_bs[:, start:], batch.answer_bp)
        assert torch.equal(batch.clean_bs.gather(1, batch.source_bp), batch.answer_bp)
        assert torch.equal(batch.corrupt_bs.gather(1, batch.source_bp), batch.distractor_bp)
        assert torch.equal(batch.corrupt_bs.scatter(1, batch.source_bp, batch.answer_bp), batch.clean_bs)
        assert (batch.answer_bp != batch.distractor_bp).all()


def test_noise_instead_of_text(source: PromptMaterial) -> None:
    batch = build_probes(dataclasses.replace(source, haystack=None), length=128, pairs=1, seed=4)["niah_single_2"][0]
    assert source.tokenizer.decode(batch.clean_bs[0]).count("The grass is green.") >= 2


def test_batches_bound_the_tokens_and_change_nothing(source: PromptMaterial, monkeypatch: pytest.MonkeyPatch) -> None:
    (whole,) = build_probes(source, length=128, pairs=5, seed=4)["niah_single_2"]
    monkeypatch.setattr(probes, "TOKENS_A_FORWARD", 300)
    parts = build_probes(source, length=128, pairs=5, seed=4)["niah_single_2"]
    assert [len(part.clean_bs) for part in parts] == [2, 2, 1]
    for name in (*IDS, "source_bp"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))


def test_the_seed_decides(source: PromptMaterial) -> None:
    first, again, other = (tensors(build_probes(source, length=64, pairs=4, seed=seed)) for seed in (5, 5, 6))
    assert all(map(torch.equal, first, again)) and len(first) == len(again)
    assert not any(
        one.shape == two.shape and torch.equal(one, two) for one, two in zip(first[::4], other[::4], strict=False)
    )


def test_capabilities_and_files(source: PromptMaterial, own_file: Path) -> None:
    found = build_probes(source, length=128, pairs=3, seed=4, files={"coding": own_file})
    assert list(found) == [*TASKS, *GENERAL_PROBES, "code"]
    for name, batches in found.items():
        capability = RETRIEVAL if name in TASKS else GENERAL if name in GENERAL_PROBES else "coding"
        assert {(batch.probe, batch.capability) for batch in batches} == {(name, capability)}
        assert len({(batch.clean_bs.shape[1], batch.answer_bp.shape[1]) for batch in batches}) == len(batches)
        assert sum(len(batch.clean_bs) for batch in batches) == (2 if name == "code" else 3)  # a file gives all it has
        for batch in batches:
            assert batch.answer_start + batch.answer_bp.shape[1] == batch.clean_bs.shape[1] <= 128
            assert (batch.source_bp is not None) == (name in TASKS or name == "copying")
            assert all(getattr(batch, ids).dtype == torch.int64 for ids in IDS)
    assert list(build_probes(source, 128, 3, 4, capabilities=["coding"], files={"coding": own_file})) == ["code"]
    assert list(build_probes(source, 128, 3, 4, capabilities=[GENERAL])) == list(GENERAL_PROBES)


def test_a_general_probe_that_does_not_fit_is_left_out(
    source: PromptMaterial, capsys: pytest.CaptureFixture[str]
) -> None:
    assert list(build_probes(source, length=14, pairs=2, seed=0, capabilities=[GENERAL])) == ["copying"]
    reason = "this tokenizer leaves it no pair of at most 14 tokens"
    assert capsys.readouterr().err.splitlines() == [
        f"probe {name} is left out: {reason}" for name in ("agreement", "arithmetic")
    ]
    with pytest.raises(InputError, match="no probe has a pair of at most 13 tokens; give a longer --length"):
        build_probes(source, length=13, pairs=2, seed=0, capabilities=[GENERAL])


def test_names_that_clash_or_that_nobody_knows(source: PromptMaterial, own_file: Path, tmp_path: Path) -> None:
    (tmp_path / "copying.jsonl").write_bytes(own_file.read_bytes())
    (tmp_path / "twin").mkdir()
    (tmp_path / "twin" / "code.jsonl").write_bytes(own_file.read_bytes())
    for changes, message in (
        ({"capabilities": ["maths"]}, "unknown capability 'maths': choose from retrieval, general"),
        ({"files": {GENERAL: own_file}}, "capability 'general' of .*code.jsonl is built in"),
        ({"files": {"mine": tmp_path / "copying.jsonl"}}, "another probe is called 'copying' too"),
        ({"files": {"one": own_file, "two": tmp_path / "twin" / "code.jsonl"}}, "another probe is called 'code' too"),
        ({"files": {"mine": tmp_path / "none.jsonl"}}, "none.jsonl: No such file"),
    ):
        with pytest.raises(InputError, match=message):
            build_probes(source, length=64, pairs=2, seed=0, **changes)
    mine = {"mine": tmp_path / "copying.jsonl"}
    assert build_probes(source, 128, 2, 0, capabilities=[RETRIEVAL], files=mine)["copying"][0].capability == "mine"


def test_seeds_of_evaluation_are_refused() -> None:
    check_seed(0), check_seed(EVALUATION_SEEDS - 1)
    for seed in (-1, EVALUATION_SEEDS):
        with pytest.raises(InputError, match=f"seed {seed}"):
            check_seed(seed)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"length": 5}, "needle probe: niah_single_1 with 5 tokens: too short.*; give a longer --length"),
        ({"length": 0}, "0 tokens a prompt"),
        (
            {"length": 10**7},
            (
                "the text has [0-9]+ tokens, a prompt 10000000; give a longer --text, a shorter --length, or"
                " --text noise"
            ),
        ),
        ({"pairs": 0}, "0 pairs"),
        ({"seed": 10**6}, "seed"),
    ],
)
def test_prompts_that_cannot_be_built(changes: dict, message: str, source: PromptMaterial) -> None:
    with pytest.raises(InputError, match=message) as caught:
        build_probes(source, **{"length": 64, "pairs": 2, "seed": 0, **changes})
    assert "\n" not in str(caught.value)


def test_wording_is_the_files_then_the_teachers_then_rulers(checkpoint: Path, tmp_path: Path) -> None:
    fmt = NeedleFormat.load(TINY_TEACHER / "needles.json")
    assert own_wording(checkpoint).own == own_wording(TINY_TEACHER).own == fmt
    assert own_wording(tmp_path) == RULER
    dataclasses.replace(fmt, noise=" Rain.").save(tmp_path / "own.json")
    assert read_wording(tmp_path / "own.json").own == dataclasses.replace(fmt, noise=" Rain.")
    (tmp_path / "bad.json").write_text('{"value_pieces": []}')
    (tmp_path / "needles.json").write_text("{}")
    for name, message in (("none.json", "No such file"), ("bad.json", "key 'needle' is missing")):
        with pytest.raises(InputError, match=message):
            read_wording(tmp_path / name)
    with pytest.raises(InputError, match="key 'needle' is missing"):
        own_wording(tmp_path)


def test_haystack(source: PromptMaterial, tmp_path: Path) -> None:
    tokenizer = source.tokenizer
    assert len(read_text(tokenizer)) > 50_000
    (tmp_path / "a.txt").write_text("plain words")
    assert tokenizer.decode(read_text(tokenizer, tmp_path / "a.txt")) == "plain words"
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\xff")
    for name, message in (("none.txt", "No such file"), ("empty.txt", "no text in it"), ("binary.txt", "not UTF-8")):
        with pytest.raises(InputError, match=message):
            read_text(tokenizer, tmp_path / name)


def test_a_checkpoint_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no tokenizer beside the checkpoint"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer").mkdir()
    with pytest.raises(InputError, match="does not load"):
        load_tokenizer(tmp_path)
