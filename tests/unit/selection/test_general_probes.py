# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""General probes mean what they say, in tokenizers that cut words differently."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hydra_mcore.ruler.needle_format import NeedleFormat
from hydra_mcore.selection import general
from hydra_mcore.selection.general import GENERAL_PROBES, NOUNS, VERBS, general_pairs
from hydra_mcore.selection.jsonl import Pair
from tests.support.paths import TINY_TEACHER

KNOWN = [Path(general.__file__).read_text(encoding="utf-8")]  # has every word of the probes


def byte_pairs() -> PreTrainedTokenizerFast:
    """A small byte-level BPE: most words are several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        KNOWN, trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def whole_words(digits: bool) -> PreTrainedTokenizerFast:
    """Every word one token, and one for all that it does not know."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    texts = [*KNOWN, " ".join(word for pair in NOUNS for word in pair), *(map(str, range(1, 19)) if digits else ())]
    words = [word for text in texts for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
    known = [word for word in words if digits or not word.isdigit()]
    tokenizer.train_from_iterator(known, trainers.WordLevelTrainer(special_tokens=["[UNK]"], show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


@pytest.fixture(scope="module", params=["teacher", "byte pairs", "whole words"])
def language(request: pytest.FixtureRequest) -> tuple:
    if request.param == "teacher":
        return PreTrainedTokenizerFast.from_pretrained(TINY_TEACHER), NeedleFormat.load(TINY_TEACHER / "needles.json")
    return byte_pairs() if request.param == "byte pairs" else whole_words(digits=True), None


def sentences(tokenizer: PreTrainedTokenizerFast, pair: Pair) -> list[str]:
    """Clean with its answer and corrupt with its own: both must be right."""
    ends = ((pair.clean_ids, pair.answer_ids), (pair.corrupt_ids, pair.distractor_ids))
    return [tokenizer.decode(np.append(*parts), clean_up_tokenization_spaces=False) for parts in ends]


def changed(pair: Pair) -> np.ndarray:
    """Places where the prompts differ; there must be no gap between them."""
    places = np.flatnonzero(pair.clean_ids != pair.corrupt_ids)
    assert places[-1] - places[0] < 4  # tokens of one word
    return places


def test_copying_goes_on_with_a_list(language: tuple) -> None:
    tokenizer, fmt = language
    pairs = general_pairs("copying", tokenizer, fmt, 256, 12, seed=3)
    assert len(pairs) == 12 and len({len(pair.clean_ids) + len(pair.answer_ids) for pair in pairs}) == 1
    for pair in pairs:
        assert np.array_equal(pair.clean_ids[pair.source], pair.answer_ids)
        assert np.array_equal(pair.corrupt_ids[pair.source], pair.distractor_ids)
        assert set(changed(pair)) <= set(pair.source.tolist())
        for text in sentences(tokenizer, pair):
            words = text.split()
            size = words.index(words[-1])  # the answer's place in the list
            assert len(words) == general.COPYING_WORDS and words[-size - 1 :] == words[: size + 1]
            assert len(set(words)) == len(words) - size - 1 in general.LIST_SIZES
    assert len({len(pair.clean_ids) - pair.source[0] for pair in pairs}) > 1  # no fixed distance


def test_agreement_follows_the_subject(language: tuple) -> None:
    tokenizer, fmt = language
    pairs = general_pairs("agreement", tokenizer, fmt, 256, 12, seed=3)
    number = {form: index for forms in (*NOUNS, *VERBS) for index, form in enumerate(forms)}
    assert len(pairs) == 12
    for pair in pairs:
        assert pair.source is None and len(changed(pair)) <= 4
        verbs = []
        for text in sentences(tokenizer, pair):
            *shown, asked = [sentence.split() for sentence in text.split(".")]
            assert {len(words) for words in shown} == {7} and len(asked) == 6
            assert all(number[words[1]] == number[words[5]] for words in [*shown, asked])
            verbs.append(asked[5])
        assert tuple(sorted(verbs, key=number.get)) in VERBS


def test_arithmetic_adds_up(language: tuple) -> None:
    tokenizer, fmt = language
    pairs = general_pairs("arithmetic", tokenizer, fmt, 256, 12, seed=3)
    assert len(pairs) == 12
    for pair in pairs:
        assert pair.source is None and len(changed(pair)) == 1
        for text in sentences(tokenizer, pair):
            words = text.replace("\n", " ").split()
            sums = [words[i : i + 5] for i in range(0, len(words), 5)]
            assert len(sums) == 4 and all(int(a) + int(b) == int(c) for a, _, b, _, c in sums)
            asked = {sums[-1][0], sums[-1][2]}
            assert all({a, b} != asked for a, _, b, _, _ in sums[:-1])  # nothing to look up


@pytest.mark.parametrize("probe", GENERAL_PROBES)
def test_pairs_are_different_and_the_seed_decides(probe: str, language: tuple) -> None:
    drawn = [general_pairs(probe, *language, 256, 10, seed) for seed in (1, 1, 2)]
    first, again, other = ([(*pair.clean_ids, *pair.answer_ids) for pair in pairs] for pairs in drawn)
    assert first == again and first != other and len(set(first)) == 10
    for pairs in drawn:
        for pair in pairs:  # an answer begins where it can be told from its distractor
            assert pair.answer_ids[0] != pair.distractor_ids[0]


@pytest.mark.parametrize("probe", GENERAL_PROBES)
def test_length_is_never_exceeded(probe: str, language: tuple) -> None:
    lengths = [len(pair.clean_ids) + len(pair.answer_ids) for pair in general_pairs(probe, *language, 256, 10, seed=1)]
    for limit in (max(lengths), min(lengths), 5):
        kept = [
            len(pair.clean_ids) + len(pair.answer_ids) for pair in general_pairs(probe, *language, limit, 10, seed=1)
        ]
        assert all(length <= limit for length in kept) and bool(kept) == (limit > 5)


def test_words_that_a_tokenizer_does_not_know_are_not_used() -> None:
    tokenizer = whole_words(digits=False)
    drawn = {probe: general_pairs(probe, tokenizer, None, 256, 5, seed=1) for probe in GENERAL_PROBES}
    assert {probe: len(pairs) for probe, pairs in drawn.items()} == {"copying": 5, "agreement": 5, "arithmetic": 0}


def test_lists_need_different_words() -> None:
    few = NeedleFormat(" {key}:{value};", " {key}:", ("apple", "pear"), ("0", "1"), 2, 4, " The grass is green.")
    assert general_pairs("copying", byte_pairs(), few, 256, 5, seed=1) == []
