# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Needle prompts: exact length, one findable answer, and a corruption that touches nothing else."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from hydra_mcore.selection.needles import (
    RULER_FORMAT,
    TASKS,
    NeedleFormat,
    NeedlePrompt,
    build_prompt,
    build_prompts,
)

TEACHER = Path(__file__).parents[2] / "examples" / "tiny" / "teacher"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(TEACHER)


@pytest.fixture(scope="module")
def fmt() -> NeedleFormat:
    return NeedleFormat.load(TEACHER / "needles.json")


@pytest.fixture(scope="module")
def text(tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    source = Path(dataclasses.__file__).read_text(encoding="utf-8")
    return np.asarray(tokenizer.encode(source, add_special_tokens=False), dtype=np.int64)


def places_of(part: np.ndarray, ids: np.ndarray) -> list[int]:
    """Where `part` stands in `ids`, by plain search."""
    windows = np.lib.stride_tricks.sliding_window_view(ids, len(part))
    return np.flatnonzero((windows == part).all(-1)).tolist()


def needle_ids(prompt: NeedlePrompt, fmt: NeedleFormat, tokenizer) -> np.ndarray:
    """The queried needle up to its value's end, which is what a reader searches for."""
    head = fmt.needle.split("{value}")[0].replace("{key}", prompt.key)
    return np.asarray([*tokenizer.encode(head, add_special_tokens=False), *prompt.answer])


@pytest.mark.parametrize("task", TASKS)
def test_length_and_answer_over_many_draws(task, tokenizer, fmt, text):
    rng = np.random.default_rng(7)
    for _ in range(40):
        length, depth = int(rng.integers(64, 700)), float(rng.random())
        prompt = build_prompt(task, fmt, tokenizer, text, length, depth, rng)
        assert prompt.ids.dtype == np.int64 and prompt.ids.shape == (length,)
        pieces = fmt.long_pieces if TASKS[task].long_value else fmt.short_pieces
        assert len(prompt.answer) == pieces == length - prompt.answer_start
        query = fmt.query.replace("{key}", prompt.key)
        query_ids = tokenizer.encode(query, add_special_tokens=False)
        assert prompt.ids[: prompt.answer_start][-len(query_ids) :].tolist() == query_ids
        ((start, end),) = prompt.value_spans
        # The needle and the query with its answer are the only places, and the needle is first.
        found = places_of(needle_ids(prompt, fmt, tokenizer), prompt.ids)
        assert found == [end - len(needle_ids(prompt, fmt, tokenizer)), length - pieces - 2]
        assert end <= prompt.answer_start and (prompt.ids[start:end] == prompt.answer).all()


@pytest.mark.parametrize("task", TASKS)
def test_answer_is_gone_with_the_needle(task, tokenizer, fmt, text):
    for prompt in build_prompts(task, fmt, tokenizer, text, 256, 20, seed=3):
        ((start, end),) = prompt.value_spans
        rest = np.concatenate([prompt.ids[:start], prompt.ids[end : prompt.answer_start]])
        assert places_of(prompt.answer, rest) == []


@pytest.mark.parametrize("task", TASKS)
def test_keys_and_values_differ(task, tokenizer, fmt, text):
    known = {tokenizer.encode(f" {key}")[0]: key for key in fmt.keys}
    mark = tokenizer.encode(fmt.needle.split("{key}")[0].rstrip(), add_special_tokens=False)[-1]
    for prompt in build_prompts(task, fmt, tokenizer, text, 512, 5, seed=1):
        body = prompt.ids[: prompt.answer_start - 2]
        at = [i for i in np.flatnonzero(body[:-1] == mark) if int(body[i + 1]) in known]
        size = len(prompt.answer)
        keys = [known[int(body[i + 1])] for i in at]
        values = [tuple(body[i + 2 : i + 2 + size].tolist()) for i in at]
        assert len(set(keys)) == len(keys) and len(set(values)) == len(values)
        expected = {"niah_multikey_1": 4, "niah_multikey_2": (512 - 4) // 5}.get(task, 1)
        assert len(keys) == expected and prompt.key in keys


@pytest.mark.parametrize("task", TASKS)
def test_depth_spreads_evenly(task, tokenizer, fmt, text):
    prompts = build_prompts(task, fmt, tokenizer, text, 512, 20, seed=5)
    starts = np.asarray([prompt.value_spans[0][0] for prompt in prompts])
    assert np.abs(starts / 512 - (np.arange(20) + 0.5) / 20).max() < 0.08


def test_same_seed_same_prompts(tokenizer, fmt, text):
    def draw(seed: int) -> np.ndarray:
        prompts = build_prompts("niah_multikey_1", fmt, tokenizer, text, 128, 6, seed)
        return np.stack([prompt.ids for prompt in prompts])

    assert (draw(4) == draw(4)).all()
    assert (draw(4) != draw(5)).any(-1).all()


@pytest.mark.parametrize("task", TASKS)
def test_corruption_changes_only_the_value(task, tokenizer, fmt, text):
    for prompt in build_prompts(task, fmt, tokenizer, text, 200, 10, seed=9):
        corrupted = prompt.with_value(prompt.distractor)
        ((start, end),) = prompt.value_spans
        assert np.flatnonzero(corrupted != prompt.ids).tolist() == list(range(start, end))
        assert (corrupted[start:end] == prompt.distractor).all()
        assert (prompt.ids[start:end] == prompt.answer).all()
        assert places_of(prompt.distractor, prompt.ids) == []
    with pytest.raises(ValueError, match="its replacement 1"):
        prompt.with_value([5])


def test_noise_fills_in_when_keys_run_out(tokenizer, fmt, text):
    few = dataclasses.replace(fmt, keys=fmt.keys[:10])
    (prompt,) = build_prompts("niah_multikey_2", few, tokenizer, text, 500, 1, seed=0)
    assert len(prompt.ids) == 500
    assert 200 < prompt.value_spans[0][0] < 300


def test_ruler_format_round_trip(tokenizer, text, tmp_path):
    RULER_FORMAT.save(tmp_path / "needles.json")
    assert NeedleFormat.load(tmp_path / "needles.json") == RULER_FORMAT
    # The tiny tokenizer joins digits, so a value's length varies: what the check is for.
    with pytest.raises(ValueError, match="no distractor fits"):
        build_prompts("niah_single_2", RULER_FORMAT, tokenizer, text, 600, 50, seed=0)


def test_intro_comes_first(tokenizer, fmt, text):
    intro = "Remember the numbers.\n"
    ids = tokenizer.encode(intro, add_special_tokens=False)
    prompt = build_prompt(
        "niah_single_2",
        dataclasses.replace(fmt, intro=intro),
        tokenizer,
        text,
        128,
        0.0,
        np.random.default_rng(0),
    )
    assert prompt.ids[: len(ids)].tolist() == ids
    ((start, end),) = prompt.value_spans
    assert (prompt.ids[start:end] == prompt.answer).all() and start == len(ids) + 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "niah_many"}, "unknown needle task 'niah_many'"),
        ({"depth": 1.5}, "depth must be between 0 and 1"),
        ({"length": 8}, "too short for a prompt of niah_single_2"),
        ({"task": "niah_multikey_2", "length": 13}, "too short for a prompt of niah_multikey_2"),
        ({"haystack_ids": np.arange(10)}, "haystack text has 10 tokens, 119 are needed"),
    ],
)
def test_bad_requests(change, message, tokenizer, fmt, text):
    request = {"task": "niah_single_2", "haystack_ids": text, "length": 128, "depth": 0.5, **change}
    with pytest.raises(ValueError, match=message) as caught:
        build_prompt(fmt=fmt, tokenizer=tokenizer, rng=np.random.default_rng(0), **request)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"value_pieces": (" 01", " 123456")}, "different lengths, 2 and 10 tokens: no distractor"),
        ({"value_pieces": (" 01", " 02"), "short_pieces": 1}, "too few different values"),
        ({"keys": ("river", "oak")}, "niah_multikey_1 needs 4 keys, the format has 2"),
    ],
)
def test_unusable_formats(change, message, tokenizer, fmt, text):
    broken = dataclasses.replace(fmt, **change)
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match=message):
        for task in ("niah_single_1", "niah_multikey_1"):
            build_prompt(task, broken, tokenizer, text, 128, 0.5, rng)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"needle": "{value} is for {key}"}, "needle must hold {key}, then {value}"),
        ({"query": "which?"}, "and query {key}"),
        ({"keys": ("oak", "oak")}, "keys must be different"),
        ({"noise": ""}, "no noise text"),
        ({"value_pieces": ("1",)}, "at least two different pieces"),
    ],
)
def test_impossible_formats(change, message, fmt):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(fmt, **change)


@pytest.mark.parametrize("content", ["no json", "{}", '{"keys": [], "value_pieces": [], "x": 1}'])
def test_unreadable_format(content, tmp_path):
    path = tmp_path / "needles.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"^needle format .*needles.json: (not JSON|key .* is missing|unknown key)"):
        NeedleFormat.load(path)
