# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""A model's own needles: exact length, one findable answer, and a counterfactual that touches nothing else."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hydra_mcore.errors import InputError
from hydra_mcore.ruler.haystack import Haystack
from hydra_mcore.ruler.material import PromptMaterial
from hydra_mcore.ruler.needle_format import NeedleFormat
from hydra_mcore.ruler.needles import NEEDLE_TASKS, needle_pair
from hydra_mcore.ruler.prompts import TASKS, Prompt
from hydra_mcore.ruler.sets import draw_pairs, draw_prompts
from hydra_mcore.ruler.wording import format_wording
from hydra_mcore.tokenizer import open_tokenizer
from tests.support.paths import TINY_TEACHER

ONE_ANSWER = [task for task in NEEDLE_TASKS if TASKS[task].one_answer]


@pytest.fixture(scope="module")
def fmt() -> NeedleFormat:
    return NeedleFormat.load(TINY_TEACHER / "needles.json")


@pytest.fixture(scope="module")
def source(fmt: NeedleFormat) -> PromptMaterial:
    """The tiny teacher's needles in the source text of a module."""
    tokenizer = open_tokenizer(TINY_TEACHER)
    text = Path(dataclasses.__file__).read_text(encoding="utf-8")
    ids = np.asarray(tokenizer.encode(text, add_special_tokens=False))
    return PromptMaterial(tokenizer, format_wording(fmt), Haystack.of(tokenizer, ids))


def worded(source: PromptMaterial, fmt: NeedleFormat, **changes: Any) -> PromptMaterial:
    return dataclasses.replace(source, wording=format_wording(dataclasses.replace(fmt, **changes)))


def places_of(part: np.ndarray, ids: np.ndarray) -> list[int]:
    """Where `part` stands in `ids`, by plain search."""
    windows = np.lib.stride_tricks.sliding_window_view(ids, len(part))
    return np.flatnonzero((windows == part).all(-1)).tolist()


def value_span(prompt: Prompt) -> tuple[int, int]:
    """Where the value stands in the haystack: in the tiny teacher's needles only ";" comes behind it."""
    ((_, end),) = prompt.spans
    return end - 1 - prompt.room, end - 1


@pytest.mark.parametrize("task", ONE_ANSWER)
def test_length_and_answer_over_many_draws(task: str, source: PromptMaterial, fmt: NeedleFormat) -> None:
    rng = np.random.default_rng(7)
    for _ in range(40):
        length, depths = int(rng.integers(64, 700)), rng.random(NEEDLE_TASKS[task].placed).tolist()
        prompt, _ = needle_pair(task, length, source, depths, rng)
        pieces = fmt.long_pieces if NEEDLE_TASKS[task].uuid_values else fmt.short_pieces
        assert len(prompt.ids) + prompt.room == length and len(prompt.answer_ids) == prompt.room == pieces
        mark, key = source.tokenizer.encode(" # river", add_special_tokens=False)[0], prompt.ids[-1]
        assert prompt.ids[-2] == mark and source.tokenizer.decode(key).strip() in fmt.keys
        # The needle and the query with its answer are the only places, and the needle is first.
        whole = np.concatenate([prompt.ids, prompt.answer_ids])
        start, end = value_span(prompt)
        assert places_of(np.asarray([mark, key, *prompt.answer_ids]), whole) == [start - 2, length - pieces - 2]
        assert end <= len(prompt.ids) and (prompt.ids[start:end] == prompt.answer_ids).all()


@pytest.mark.parametrize("task", ONE_ANSWER)
def test_answer_is_gone_with_the_needle(task: str, source: PromptMaterial) -> None:
    for prompt in draw_prompts(task, 256, 20, 3, source):
        start, end = value_span(prompt)
        assert places_of(prompt.answer_ids, np.concatenate([prompt.ids[:start], prompt.ids[end:]])) == []


@pytest.mark.parametrize("task", ONE_ANSWER)
def test_keys_and_values_differ(task: str, source: PromptMaterial, fmt: NeedleFormat) -> None:
    known = {source.tokenizer.encode(f" {key}")[0]: key for key in fmt.keys}
    mark = source.tokenizer.encode(fmt.needle.split("{key}")[0].rstrip(), add_special_tokens=False)[-1]
    for prompt in draw_prompts(task, 512, 5, 1, source):
        body, size = prompt.ids[:-2], prompt.room
        at = [i for i in np.flatnonzero(body[:-1] == mark) if int(body[i + 1]) in known]
        keys = [known[int(body[i + 1])] for i in at]
        values = [tuple(body[i + 2 : i + 2 + size].tolist()) for i in at]
        assert len(set(keys)) == len(keys) and len(set(values)) == len(values)
        room = {"niah_multikey_2": (512 - 4) // 5, "niah_multikey_3": (512 - 6) // 7}
        assert len(keys) == {"niah_multikey_1": 4, **room}.get(task, 1)
        assert known[int(prompt.ids[-1])] in keys


@pytest.mark.parametrize("task", ONE_ANSWER)
def test_depth_spreads_evenly(task: str, source: PromptMaterial) -> None:
    starts = np.sort([value_span(prompt)[0] for prompt in draw_prompts(task, 512, 20, 5, source)])
    assert np.abs(starts / 512 - (np.arange(20) + 0.5) / 20).max() < 0.08


def test_same_seed_same_prompts(source: PromptMaterial) -> None:
    def draw(seed: int) -> np.ndarray:
        pairs = draw_pairs("niah_multikey_1", 128, 6, seed, source)
        return np.stack([np.concatenate([prompt.ids for prompt in pair]) for pair in pairs])

    assert (draw(4) == draw(4)).all()
    assert (draw(4) != draw(5)).any(-1).all()


@pytest.mark.parametrize("task", ONE_ANSWER)
def test_corruption_changes_only_the_value(task: str, source: PromptMaterial) -> None:
    for prompt, corrupt in draw_pairs(task, 200, 10, 9, source):
        start, end = value_span(prompt)
        assert np.flatnonzero(corrupt.ids != prompt.ids).tolist() == list(range(start, end))
        assert (corrupt.ids[start:end] == corrupt.answer_ids).all() and corrupt.spans == prompt.spans
        assert (prompt.ids[start:end] == prompt.answer_ids).all()
        assert places_of(corrupt.answer_ids, prompt.ids) == []


def test_noise_fills_in_when_keys_run_out(source: PromptMaterial, fmt: NeedleFormat) -> None:
    few = worded(source, fmt, keys=fmt.keys[:10])
    (prompt,) = draw_prompts("niah_multikey_2", 500, 1, 0, few)
    assert len(prompt.ids) + prompt.room == 500
    assert 190 < value_span(prompt)[0] < 310


def test_intro_comes_first(source: PromptMaterial, fmt: NeedleFormat) -> None:
    intro = "Remember the numbers.\n"
    ids = source.tokenizer.encode(intro, add_special_tokens=False)
    first = worded(source, fmt, intro=intro)
    prompt, _ = needle_pair("niah_single_2", 128, first, [0.0], np.random.default_rng(0))
    assert prompt.ids[: len(ids)].tolist() == ids
    start, end = value_span(prompt)
    assert (prompt.ids[start:end] == prompt.answer_ids).all() and start == len(ids) + 2


@pytest.mark.parametrize(
    ("task", "length", "message"),
    [
        ("niah_many", 128, "unknown task 'niah_many'"),
        ("niah_multiquery", 128, "niah_multiquery asks for several values"),
        ("niah_single_2", 8, "niah_single_2 with 8 tokens: too short"),
        ("niah_multikey_2", 13, "niah_multikey_2 with 13 tokens: too short"),
        ("niah_single_2", 10**6, "the text has [0-9]+ tokens, a prompt needs [0-9]+"),
    ],
)
def test_bad_requests(task: str, length: int, message: str, source: PromptMaterial) -> None:
    with pytest.raises(InputError, match=message) as caught:
        list(draw_pairs(task, length, 1, 0, source))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"value_pieces": (" 01", " 123456"), "short_pieces": 1}, "has no value of as many tokens as '01|123456'"),
        ({"value_pieces": (" 01", " 02"), "short_pieces": 1}, "too few values"),
        ({"keys": ("river", "oak")}, "niah_multikey_1 needs 4 keys, the wording needles has 2"),
    ],
)
def test_unusable_formats(change: dict[str, Any], message: str, source: PromptMaterial, fmt: NeedleFormat) -> None:
    broken = worded(source, fmt, **change).in_noise()
    with pytest.raises(InputError, match=message):
        for task in ("niah_single_1", "niah_multikey_1"):
            list(draw_pairs(task, 128, 1, 0, broken))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"needle": "{value} is for {key}"}, "needle must hold {key}, then {value}"),
        ({"query": "which?"}, "and query {key}"),
        ({"keys": ("oak", "oak")}, "keys must be different"),
        ({"noise": " "}, "no noise text"),
        ({"value_pieces": ("1",)}, "at least two different pieces"),
    ],
)
def test_impossible_formats(change: dict[str, Any], message: str, fmt: NeedleFormat) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(fmt, **change)


def test_format_round_trip(fmt: NeedleFormat, tmp_path: Path) -> None:
    fmt.save(tmp_path / "needles.json")
    assert NeedleFormat.load(tmp_path / "needles.json") == fmt


@pytest.mark.parametrize("content", ["no json", "{}", '{"keys": [], "value_pieces": [], "x": 1}'])
def test_unreadable_format(content: str, tmp_path: Path) -> None:
    path = tmp_path / "needles.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"^needle format .*needles.json: (not JSON|key .* is missing|unknown key)"):
        NeedleFormat.load(path)
