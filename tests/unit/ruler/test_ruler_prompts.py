# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""What holds for prompts of every task: exact length, findable and unique answers, even depths."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest

from hydra_mcore.errors import InputError
from hydra_mcore.ruler.material import ROOM, PromptMaterial
from hydra_mcore.ruler.needles import NEEDLE_TASKS
from hydra_mcore.ruler.prompts import TASKS, Prompt
from hydra_mcore.ruler.sets import draw_prompts, prompt_set
from hydra_mcore.ruler.wording import RULER
from tests.support.small_tokenizers import KINDS, haystack, small_tokenizer

DRAWS = 200


@pytest.fixture(scope="module")
def sources() -> dict[str, PromptMaterial]:
    return {kind: PromptMaterial(small_tokenizer(kind), RULER, haystack(kind)) for kind in KINDS}


def repeating(source: PromptMaterial) -> PromptMaterial:
    return dataclasses.replace(source, haystack=dataclasses.replace(source.haystack, repeat=True))


def drawn(task: str, length: int, seed: int, source: PromptMaterial) -> tuple[int, Prompt]:
    """A prompt; where the length is too short, one of the length that the error names, or of the first longer one that
    does.
    """
    while True:
        try:
            return length, next(draw_prompts(task, length, 3, seed, source))
        except InputError as error:
            least = int(
                re.fullmatch(
                    rf"{task} with {length} tokens: too short, this tokenizer needs at least (\d+)", str(error)
                ).group(1)
            )
            assert least > length
            length = least


def check(task: str, length: int, prompt: Prompt, source: PromptMaterial) -> None:
    """All that can be said without knowing how the prompt was made."""
    tokenizer = source.tokenizer
    assert prompt.ids.dtype == prompt.answer_ids.dtype == np.int32
    assert len(prompt.ids) + prompt.room == length
    text = tokenizer.decode(prompt.ids)
    assert (
        len(set(prompt.answers)) == len(prompt.answers) == {"cwe": 10, "fwe": 3, "vt": 5}.get(task)
        or task in NEEDLE_TASKS
    )
    if TASKS[task].one_answer:
        assert prompt.room == len(prompt.answer_ids)
        assert tokenizer.decode([*prompt.ids, *prompt.answer_ids]) == f"{text} {prompt.answers[0]}"
        # as the tokenizer writes the end of the prompt by itself
        tail = tokenizer.encode(text[-20:] + " " + prompt.answers[0], add_special_tokens=False)
        assert tail[-prompt.room :] == prompt.answer_ids.tolist()
    else:
        assert prompt.room >= ROOM[task] and len(prompt.answer_ids) == 0
        assert prompt.room >= len(tokenizer.encode(", ".join(prompt.answers), add_special_tokens=False))
    if task in ("cwe", "fwe"):
        assert prompt.spans == prompt.depths == ()
        return
    named = [2, 2, 2, 2, 1] if task == "vt" else [1] * len(prompt.answers)
    assert [text.count(answer) for answer in prompt.answers] == named
    for (start, end), answer in zip(prompt.spans, prompt.answers, strict=True):
        assert answer in tokenizer.decode(prompt.ids[start:end])
    without = np.delete(prompt.ids, np.concatenate([np.arange(start, end) for start, end in prompt.spans]))
    assert not any(answer in tokenizer.decode(without) for answer in prompt.answers)


def test_two_hundred_draws(sources: dict[str, PromptMaterial]) -> None:
    rng = np.random.default_rng(11)
    for number in range(DRAWS):
        task, kind = str(rng.choice(list(TASKS))), KINDS[number % len(KINDS)]
        length = int(512 * 2 ** (rng.random() * (6 if number % 20 == 0 else 3)))
        length, prompt = drawn(task, length, 1_000_000 + number, sources[kind])
        check(task, length, prompt, sources[kind])


@pytest.mark.parametrize("task", ["niah_single_3", "niah_multikey_3", "vt", "cwe", "fwe"])
def test_128k_tokens(task: str, sources: dict[str, PromptMaterial]) -> None:
    source = repeating(sources["gpt2"])
    length, prompt = drawn(task, 131_072, 1_000_000, source)
    assert length == 131_072
    check(task, length, prompt, source)


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_million_tokens(kind: str, task: str, sources: dict[str, PromptMaterial]) -> None:
    source = repeating(sources[kind])
    length, prompt = drawn(task, 1_048_576, 1_000_000, source)
    assert length == 1_048_576
    check(task, length, prompt, source)


@pytest.mark.parametrize("task", [*NEEDLE_TASKS, "vt"])
def test_depths_are_even(task: str, sources: dict[str, PromptMaterial]) -> None:
    """Every needle has one prompt of the set in each of 20 equal parts of the haystack; those of a chain do so
    together.
    """
    count = 20
    prompts = prompt_set(task, 24_576, count, 1_000_000, sources["qwen"]).prompts
    depths = np.asarray([prompt.depths for prompt in prompts])
    found = np.sort(depths.ravel()) if task == "vt" else np.sort(depths, axis=0)
    needles = depths.shape[1]
    wanted = np.repeat((np.arange(count) + 0.5) / count, needles)
    assert needles == (5 if task == "vt" else 4 if task in ("niah_multivalue", "niah_multiquery") else 1)
    assert np.abs(found.ravel() - wanted).max() < 0.024  # what is left for sentences and the other needles
    assert np.histogram(depths, bins=count, range=(0, 1))[0].tolist() == [needles] * count
    head = len(sources["qwen"].pieces.first(RULER.one.intro))
    for prompt in prompts if task != "vt" else ():  # whose example takes tokens, too
        for (start, end), depth in zip(prompt.spans, prompt.depths, strict=True):
            assert abs((start - head) / (24_576 - 2 * head - (end - start)) - depth) < 0.02


def test_each_needle_has_an_order_of_its_own(sources: dict[str, PromptMaterial]) -> None:
    depths = np.asarray(
        [prompt.depths for prompt in prompt_set("niah_multiquery", 8192, 12, 1_000_000, sources["qwen"]).prompts]
    )
    orders = {tuple(np.argsort(each).tolist()) for each in depths.T}
    assert len(orders) == 4 and tuple(range(12)) not in orders


def test_each_prompt_takes_another_part_of_the_text(sources: dict[str, PromptMaterial]) -> None:
    prompts = prompt_set("niah_single_2", 2048, 8, 1_000_000, sources["gpt2"]).prompts
    starts = {tuple(prompt.ids[60:100].tolist()) for prompt in prompts}
    assert len(starts) == 8


def test_needles_stand_between_sentences(sources: dict[str, PromptMaterial]) -> None:
    """Nearly all: where none ends near a depth, between words."""
    for kind in KINDS:
        between_words = 0
        for prompt in prompt_set("niah_multivalue", 4096, 4, 1_000_000, sources[kind]).prompts:
            decode = sources[kind].tokenizer.decode
            for start, end in prompt.spans:
                before, behind = decode(prompt.ids[start - 30 : start]), decode(prompt.ids[end - 1 : end + 300])
                behind = re.sub(r" One of the special magic numbers for .*? is: \d+\.", "", behind)  # at the same place
                paragraph = re.match(r"\.[^\S\n]*\n\s*\n", behind)
                between_words += not (paragraph or re.search(r"""[.!?]["')\]]*\s*$|afterwards\.\n$""", before))
                assert re.match(r"\.\s", behind), behind
        assert between_words <= 3


@pytest.mark.parametrize("task", TASKS)
def test_the_shortest_prompts(task: str, sources: dict[str, PromptMaterial]) -> None:
    """From the least length on each length works or says what the least is."""
    source = sources["gpt2"]
    least, _ = drawn(task, 100, 1_000_000, source)
    for length in range(least, least + 12):
        length, prompt = drawn(task, length, 1_000_001 + length, source)
        check(task, length, prompt, source)
