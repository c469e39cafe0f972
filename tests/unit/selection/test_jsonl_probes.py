# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""A user's own pairs: what is taken as it stands, and the one line for what cannot be used."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hydra_mcore.errors import InputError
from hydra_mcore.selection.jsonl import load_pairs
from tests.support.paths import TINY_TEACHER

GOOD = {"clean": "The dog", "corrupt": "The cat", "answer": " barks", "distractor": " meows"}


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerFast:
    """Every word one token."""
    vocabulary = {word: index for index, word in enumerate("The dog cat barks meows and big".split())}
    tokenizer = Tokenizer(models.WordLevel({**vocabulary, "?": len(vocabulary)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?")


def test_all_lines_are_taken(words: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    second = {
        **GOOD,
        "clean": "The big dog",
        "corrupt": "The big cat",
        "answer": "barks and barks",
        "distractor": "meows and meows",
    }
    lines = ["\ufeff" + json.dumps(GOOD), "", json.dumps(second, ensure_ascii=False)]
    (tmp_path / "own.jsonl").write_bytes("\r\n".join(lines).encode())  # as an editor on Windows leaves it
    one, two = load_pairs(words, tmp_path / "own.jsonl")
    assert [one.clean_ids.tolist(), one.corrupt_ids.tolist(), one.answer_ids.tolist(), one.distractor_ids.tolist()] == [
        [0, 1],
        [0, 2],
        [3],
        [4],
    ]
    assert two.answer_ids.tolist() == [3, 5, 3] and len(two.clean_ids) == 3 and one.source is two.source is None


def test_prompt_and_answer_are_encoded_separately(tmp_path: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(TINY_TEACHER)
    (tmp_path / "own.jsonl").write_text(
        json.dumps({"clean": "an = 11\u2028", "corrupt": "an = 22\u2028", "answer": "1", "distractor": "2"})
    )
    (pair,) = load_pairs(tokenizer, tmp_path / "own.jsonl")  # a line separator in a text ends no line
    assert np.array_equal(pair.answer_ids, tokenizer.encode("1")) and np.array_equal(
        pair.clean_ids, tokenizer.encode("an = 11\u2028")
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"corrupt": "The big cat"}, "clean and corrupt have 2 and 3 tokens; reword one"),
        ({"distractor": " barks and meows"}, "answer and distractor have 1 and 3 tokens; reword one"),
        ({"corrupt": "The dog"}, "clean and corrupt are the same tokens; make them differ"),
        ({"distractor": " barks"}, "answer and distractor are the same tokens"),
        ({"answer": " lion", "distractor": " wolf"}, "answer and distractor are the same tokens"),  # both unknown words
        ({"answer": "", "distractor": ""}, "answer has no tokens; give it some text"),
        ({"distractor": " "}, "distractor has no tokens"),
        ({"clean": "", "corrupt": ""}, "clean has no tokens"),
        ({"answer": 7}, "answer is no text; put it in quotes"),
        ({"answer": None}, "the object lacks key 'answer'; give clean, corrupt, answer, distractor"),
        ({"anwser": "x"}, "the object has the unknown key 'anwser'; give clean"),
        ({"clean": "\ud800"}, "clean holds half of a surrogate pair"),
    ],
)
def test_a_line_that_is_no_pair(changes: dict, message: str, words: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    fields = {key: value for key, value in {**GOOD, **changes}.items() if value is not None}
    (tmp_path / "own.jsonl").write_text(f"{json.dumps(GOOD)}\n{json.dumps(fields)}\n")
    refused(words, tmp_path / "own.jsonl", f"own.jsonl, line 2: {message}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "own.jsonl: no pair in it; give an object a line with the keys clean, corrupt, answer, distractor"),
        (b" \n\n", "own.jsonl: no pair in it"),
        (b"{}\n{", "own.jsonl, line 1: the object lacks key 'answer'"),
        (b'\n{"clean": ', "own.jsonl, line 2: not JSON (Expecting value at column 11); write one object a line"),
        (b'["clean"]', "own.jsonl, line 1: a JSON list; write an object"),
        ("é".encode("latin-1"), "own.jsonl, line 1: not UTF-8 text; save the file as UTF-8"),
        (json.dumps(GOOD).encode("utf-16"), "own.jsonl, line 1: not UTF-8 text"),
    ],
)
def test_a_file_that_is_none(content: bytes, message: str, words: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    (tmp_path / "own.jsonl").write_bytes(content)
    refused(words, tmp_path / "own.jsonl", message)


def test_a_file_that_cannot_be_read(words: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    refused(words, tmp_path / "none.jsonl", "none.jsonl: No such file")
    refused(words, tmp_path, "Is a directory")


def refused(tokenizer: PreTrainedTokenizerFast, path: Path, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        load_pairs(tokenizer, path)
    assert "\n" not in str(caught.value)
