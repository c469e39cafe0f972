# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Every task against its definition (RULER, arXiv:2404.06654), from the decoded text alone, for every kind of
tokenizer.
"""

from __future__ import annotations

import re
import uuid
from collections import Counter
from math import pi

import pytest

from hydra_mcore.ruler.lexicon import single_words
from hydra_mcore.ruler.material import PromptMaterial
from hydra_mcore.ruler.prompts import Prompt
from hydra_mcore.ruler.sets import draw_prompts
from hydra_mcore.ruler.wording import RULER
from tests.support.small_tokenizers import KINDS, haystack, small_tokenizer

NEEDLE = re.compile(r"One of the special magic (numbers|uuids) for (\S(?:[^\n]*?\S)?) is: ([0-9a-f-]+)\.")
LENGTHS = {"gpt2": 6000, "qwen": 6000, "llama": 6000, "byte": 12_000}

each_kind = pytest.mark.parametrize("kind", KINDS)


def prompts(task: str, kind: str, count: int = 3, length: int | None = None) -> list[tuple[Prompt, str]]:
    """Prompts with their texts."""
    tokenizer = small_tokenizer(kind)
    source = PromptMaterial(tokenizer, RULER, haystack(kind))
    drawn = draw_prompts(task, length or LENGTHS[kind], count, 1_000_007, source)
    return [(prompt, tokenizer.decode(prompt.ids).removeprefix("<s>").lstrip()) for prompt in drawn]


def is_value(word: str, kind: str) -> bool:
    if kind == "uuids":
        return uuid.UUID(word).version == 4 and str(uuid.UUID(word)) == word
    return re.fullmatch(r"[1-9]\d{6}", word) is not None


@each_kind
@pytest.mark.parametrize("number, values", [(1, "numbers"), (2, "numbers"), (3, "uuids")])
def test_single(kind: str, number: int, values: str) -> None:
    for prompt, text in prompts(f"niah_single_{number}", kind):
        ((found, key, value),) = NEEDLE.findall(text)
        assert (found, value) == (values, *prompt.answers) and is_value(value, values)
        adjective, _, noun = key.partition("-")
        assert adjective and noun
        one = values[:-1]
        assert text.startswith(
            f"A special magic {one} is hidden within the following text. Make sure to memorize it. I will"
        )
        assert text.endswith(
            f"\nWhat is the special magic {one} for {key} mentioned in the provided text? "
            f"The special magic {one} for {key} mentioned in the provided text is:"
        )
        if number == 1:  # nothing else but lines of noise, the last one cut
            lines = NEEDLE.sub("", text.removesuffix(text[text.index("\nWhat is the") :])).split("\n")[1:]
            noise = [line for line in lines if line]
            assert (
                len(lines) - len(noise) == 1 and set(noise[:-1]) == {RULER.noise} and RULER.noise.startswith(noise[-1])
            )


@each_kind
def test_multikey_1(kind: str) -> None:
    for prompt, text in prompts("niah_multikey_1", kind):
        found = NEEDLE.findall(text)
        assert len(found) == len({key for _, key, _ in found}) == len({value for *_, value in found}) == 4
        assert all(is_value(value, "numbers") for *_, value in found)
        (key,) = [key for _, key, value in found if value == prompt.answers[0]]
        assert text.endswith(f" for {key} mentioned in the provided text is:")


@each_kind
@pytest.mark.parametrize("number, values", [(2, "numbers"), (3, "uuids")])
def test_a_haystack_of_needles(kind: str, number: int, values: str) -> None:
    for prompt, text in prompts(f"niah_multikey_{number}", kind):
        found = NEEDLE.findall(text)
        keys, given = {key for _, key, _ in found}, {value for *_, value in found}
        assert len(keys) == len(given) == len(found) > 30
        assert all(each == values and is_value(value, values) for each, _, value in found)
        if number == 3:
            assert all(is_value(key, "uuids") for key in keys)
        (key,) = [key for _, key, value in found if value == prompt.answers[0]]
        # Word for word: nothing else but what is left over, which is less than a needle.
        lines = [f"One of the special magic {values} for {key} is: {value}." for _, key, value in found]
        question = text[text.index("\nWhat is the") :]
        rest = text.removesuffix(question).removeprefix("\n".join([text.split("\n")[0], *lines]))
        assert (f"\n{RULER.noise}" * 2).startswith(rest)
        tokenize = small_tokenizer(kind).tokenize
        assert len(tokenize(rest)) <= max(len(tokenize(line)) for line in lines) + 2
        assert f" for {key} mentioned" in question


@each_kind
def test_multivalue(kind: str) -> None:
    for prompt, text in prompts("niah_multivalue", kind):
        found = NEEDLE.findall(text)
        assert len(found) == 4 and len({key for _, key, _ in found}) == 1
        assert sorted(value for *_, value in found) == sorted(prompt.answers)
        assert text.startswith("Some special magic numbers are hidden within the following text.")
        assert text.endswith(f"numbers for {found[0][1]} mentioned in the provided text are")


@each_kind
def test_multiquery(kind: str) -> None:
    for prompt, text in prompts("niah_multiquery", kind):
        value_of = {key: value for _, key, value in NEEDLE.findall(text)}
        first, second, third, last = [
            key for answer in prompt.answers for key, value in value_of.items() if value == answer
        ]
        assert len(value_of) == 4
        keys = f"{first}, {second}, {third}, and {last}"
        assert (
            f"\nWhat are all the special magic numbers for {keys} mentioned in the provided text? The special" in text
        )
        assert text.endswith(f" The special magic numbers for {keys} mentioned in the provided text are")


def followed(text: str) -> tuple[str, list[str]]:
    """The value of the chain in a text, and its variables in order, by following it."""
    value_of = dict(re.findall(r"^VAR ([A-Z]+) = (?:VAR )?(\w+)$", text, flags=re.MULTILINE))
    ((first, value),) = [(name, value) for name, value in value_of.items() if value.isdigit()]
    chain = [first]
    while nexts := [name for name, value in value_of.items() if value == chain[-1]]:
        chain += nexts
    assert len(chain) == len(value_of)
    return value, chain


@each_kind
def test_variable_tracking(kind: str) -> None:
    seen = set()
    for prompt, text in prompts("vt", kind):
        example, text = text.split("\n\nMemorize")
        value, chain = followed(text)
        assert tuple(chain) == prompt.answers and [len(name) for name in chain] == [5] * 5 and len(value) == 5
        assert text.endswith(
            f"Question: Find all variables that are assigned the value {value} in the text above. Answer: According to"
            f" the chain(s) of variable assignment in the text above, 5 variables are assigned the value {value}, they"
            " are:"
        )
        places = [text.index(f"VAR {name} = ") for name in chain]
        assert places == sorted(places)
        context = re.sub(
            r"^VAR .*\n",
            "",
            text.split("hidden in the following text.\n\n")[1].split("\nQuestion:")[0] + "\n",
            flags=re.M,
        )
        *lines, cut = context.splitlines()
        assert set(lines) == {RULER.noise} and RULER.noise.startswith(cut)
        shown, solved = followed(example)
        assert shown != value and example.endswith(f"the value {shown}, they are: {' '.join(solved)}")
        assert [len(name) for name in solved] == [3] * 5
        seen.add((shown, *solved))
    assert len(seen) == 3  # each prompt has another example


def test_short_variable_tracking_has_no_example() -> None:
    ((_, text),) = prompts("vt", "gpt2", count=1, length=1024)
    assert len(text.split("Memorize")) == 2


COMMON = [(4095, 6, 1, (3, 1, 20)), (4096, 30, 3, (10, 3, 40)), (12_000, 30, 3, (10, 3, 40))]
LISTS = [
    (kind, *case) for kind in KINDS for case in COMMON if (kind, case[0]) != ("byte", 4096)
]  # where 300 words do not fit


@pytest.mark.parametrize("kind, length, many, few, shown", LISTS)
def test_common_words(kind: str, length: int, many: int, few: int, shown: tuple[int, ...]) -> None:
    for prompt, text in prompts("cwe", kind, count=2, length=length):
        *example, text = re.split(r"(?:^|\n)Below is", text)[1:]
        entries = re.findall(r"(\d+)\. (\D+?)(?= \d+\.|\n| \.\.\.| \.|$)", text.split("\nQuestion:")[0])
        assert [int(number) for number, _ in entries] == list(range(1, len(entries) + 1))
        counts = Counter(word for _, word in entries)
        assert {word for word, count in counts.items() if count == many} == set(prompt.answers)
        assert set(counts.values()) == {many, few} and len(counts) >= 20 and set(counts) <= set(single_words())
        assert text.endswith(
            "\nQuestion: What are the 10 most common words in the above list? "
            "Answer: The top 10 words that appear most often in the list are:"
        )
        if example:
            listed, solved = example[0].split("\nQuestion:")
            counts = Counter(word for _, word in re.findall(r"(\d+)\. (\D+?)(?= \d+\.|$)", listed))
            best = [word for _, word in re.findall(r"(\d+)\. (\D+?)(?= \d+\.|$)", solved)]
            assert sorted(counts.values()) == [shown[1]] * (shown[2] - 10) + [shown[0]] * 10
            assert {word for word, count in counts.items() if count == shown[0]} == set(best) and not set(best) & set(
                prompt.answers
            )
        assert example or length == 4096  # where it is too long for these small vocabularies


@pytest.mark.slow
def test_common_words_beyond_the_single_ones() -> None:
    """Where the list of words is too short, every word is a compound: none is told by its form."""
    ((prompt, text),) = prompts("cwe", "gpt2", count=1, length=260_000)
    counts = Counter(
        word for _, word in re.findall(r"(\d+)\. (\D+?)(?= \d+\.|\n| \.)", text[text.rindex("Below is") :])
    )
    assert {word for word, count in counts.items() if count == 30} == set(prompt.answers)
    assert len(counts) > 5000 and all("-" in word for word in counts)


@each_kind
@pytest.mark.parametrize("length", [700, 2048, 12_000])
def test_frequent_words(kind: str, length: int) -> None:
    for prompt, text in prompts("fwe", kind, length=length):
        coded = text.split("coded words. ")[1].split("\nQuestion:")[0].split(" ")
        counts = Counter(word for word in coded if set(word) - {"."})
        assert all(re.fullmatch("[a-z]{6}", word) for word in counts)
        ranked = [count for _, count in counts.most_common()]
        assert [word for word, _ in counts.most_common(3)] == sorted(prompt.answers, key=lambda word: -counts[word])
        assert len(ranked) == 3 or ranked[2] > ranked[3]
        # The shares are those of a zeta distribution with alpha 2, words that should stand there less than once left
        # out.
        size = next(n for n in range(2 * len(coded), 0, -1) if int(n * 6 / pi**2 / 4) == ranked[0])
        assert [int(size * 6 / pi**2 / rank**2) for rank in range(2, len(ranked) + 2)] == pytest.approx(ranked, abs=1)
        assert coded.count("...") >= int(size * 6 / pi**2) - 5
