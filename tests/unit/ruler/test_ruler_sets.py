# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Sets of prompts: their wording, their files, and what users may get wrong."""

from __future__ import annotations

import copy
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import normalizers
from transformers import AutoTokenizer

from hydra_mcore.errors import InputError
from hydra_mcore.ruler import sets
from hydra_mcore.ruler.haystack import read_haystack
from hydra_mcore.ruler.material import PromptMaterial, tokenizer_fingerprint
from hydra_mcore.ruler.needle_format import NeedleFormat
from hydra_mcore.ruler.needles import NEEDLE_TASKS
from hydra_mcore.ruler.sets import prompt_set
from hydra_mcore.ruler.wording import RULER, load_wording
from tests.support.paths import ROOT, TINY_TEACHER
from tests.support.small_tokenizers import KINDS, haystack, small_tokenizer

SEED = 1_000_000


@pytest.fixture(scope="module")
def source() -> PromptMaterial:
    return PromptMaterial(small_tokenizer("qwen"), RULER, haystack("qwen"))


@pytest.fixture(scope="module")
def own() -> PromptMaterial:
    """The tiny teacher's own needles."""
    tokenizer = AutoTokenizer.from_pretrained(TINY_TEACHER)
    return PromptMaterial(tokenizer, load_wording(None, tokenizer, TINY_TEACHER), None).in_noise()


def test_the_same_arguments_give_the_same_set_in_any_process(source: PromptMaterial) -> None:
    code = (
        "from tests.support.small_tokenizers import small_tokenizer\n"
        "from hydra_mcore.ruler.sets import prompt_set, PromptMaterial\n"
        "from hydra_mcore.ruler.wording import RULER\n"
        "source = PromptMaterial(small_tokenizer('qwen'), RULER, None)\n"
        f"print([prompt_set(task, 2048, 2, {SEED}, source).digest for task in ('niah_multikey_3', 'vt', 'cwe', 'fwe')])"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONHASHSEED": "7"},
        cwd=ROOT,
    )
    bare = dataclasses.replace(source, haystack=None)
    assert run.stdout.strip() == str(
        [prompt_set(task, 2048, 2, SEED, bare).digest for task in ("niah_multikey_3", "vt", "cwe", "fwe")]
    )
    seeds = {prompt_set("niah_single_1", 600, 2, SEED + more, source).digest for more in range(3)}
    assert len(seeds) == 3


@pytest.mark.parametrize("task", ["niah_multiquery", "niah_single_3", "cwe"])
def test_a_set_is_kept(task: str, source: PromptMaterial, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = prompt_set(task, 2048, 3, SEED, source, tmp_path)
    (file,) = tmp_path.iterdir()
    stored = file.read_bytes()
    monkeypatch.setattr(sets, "draw_prompts", None)  # nothing is made again
    found = prompt_set(task, 2048, 3, SEED, source, tmp_path)
    assert found.digest == made.digest and found.max_id == made.max_id
    for one, other in zip(made.prompts, found.prompts, strict=True):
        for field in dataclasses.fields(one):
            assert np.array_equal(getattr(one, field.name), getattr(other, field.name)), field.name
        assert one.ids.dtype == other.ids.dtype
    monkeypatch.undo()
    for broken in (
        b"",
        b"nothing of the kind",
        stored[: len(stored) // 2],
        bytes([stored[5000] ^ 1]).join((stored[:5000], stored[5001:])),
    ):
        file.write_bytes(broken)
        assert prompt_set(task, 2048, 3, SEED, source, tmp_path).digest == made.digest
        assert file.read_bytes() == stored and list(tmp_path.iterdir()) == [file]


def test_what_decides_about_a_set_is_in_its_name(
    source: PromptMaterial, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = source.haystack
    others = [
        source,
        dataclasses.replace(source, wording=dataclasses.replace(RULER, needle=RULER.needle + " ")),
        dataclasses.replace(source, tokenizer=small_tokenizer("gpt2")),
        dataclasses.replace(source, haystack=dataclasses.replace(text, repeat=True)),
        dataclasses.replace(source, haystack=dataclasses.replace(text, ids=text.ids[::-1].copy())),
    ]
    for number, other in enumerate(others, start=1):
        prompt_set("niah_single_1", 600, 1, SEED, other, tmp_path)
        assert len(list(tmp_path.iterdir())) == number
    for number, changed in enumerate(
        [("niah_single_1", 601, 1, SEED), ("niah_single_1", 600, 2, SEED), ("niah_single_1", 600, 1, SEED + 1)]
    ):
        prompt_set(*changed, source, tmp_path)
        assert len(list(tmp_path.iterdir())) == len(others) + 1 + number
    monkeypatch.setattr(sets, "VERSION", 0)
    prompt_set("niah_single_1", 600, 1, SEED, source, tmp_path)
    assert len(list(tmp_path.iterdir())) == len(others) + 4


def test_a_tokenizers_fingerprint_outlives_its_use() -> None:
    prints = set()
    for kind in KINDS:
        tokenizer = small_tokenizer(kind)
        before = tokenizer_fingerprint(tokenizer)
        tokenizer("a b c", truncation=True, max_length=2, padding="max_length") if tokenizer.pad_token else tokenizer(
            "a", truncation=True
        )
        assert tokenizer_fingerprint(tokenizer) == before
        prints.add(before)
    assert len(prints) == len(KINDS)


def test_the_chat_template_stands_around_the_question() -> None:
    tokenizer = small_tokenizer("qwen")
    source = PromptMaterial(tokenizer, load_wording("chat", tokenizer, Path("none")), haystack("qwen"))
    assert source.wording.name == "chat" and source.wording.digest != RULER.digest
    for task in ("niah_single_2", "niah_multivalue", "vt", "cwe", "fwe"):
        (prompt,) = prompt_set(task, 4096, 1, SEED, source).prompts
        text = tokenizer.decode(prompt.ids)
        head, tail = "<|im_start|>user\n", "?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
        if task == "vt":
            tail = tail.replace("?", " in the text above.", 1)
        assert text.startswith(head) and text.count(tail) == 1 and len(prompt.ids) + prompt.room == 4096
        assert text.rsplit(tail)[1].startswith(("The special magic", "Answer:"))
        assert prompt.ids[0] == tokenizer.convert_tokens_to_ids("<|im_start|>")
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Q?"}], tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    assert rendered == "Q".join(source.wording.chat[:1]) + "Q?" + source.wording.chat[1]
    with pytest.raises(InputError, match="the tokenizer has no chat template; use --template ruler"):
        load_wording("chat", small_tokenizer("gpt2"), Path("none"))


def test_a_bos_counts_and_comes_once() -> None:
    tokenizer = small_tokenizer("llama")
    (prompt,) = prompt_set("niah_single_1", 777, 1, SEED, PromptMaterial(tokenizer, RULER, None)).prompts
    assert prompt.ids[0] == tokenizer.bos_token_id and (prompt.ids == tokenizer.bos_token_id).sum() == 1
    wording = dataclasses.replace(RULER, chat=("<s>[INST] ", " [/INST]"))
    (prompt,) = prompt_set("niah_single_1", 777, 1, SEED, PromptMaterial(tokenizer, wording, None)).prompts
    assert (prompt.ids == tokenizer.bos_token_id).sum() == 1 and prompt.ids[0] == tokenizer.bos_token_id


@pytest.mark.parametrize("task", NEEDLE_TASKS)
def test_a_models_own_needles(task: str, own: PromptMaterial) -> None:
    fmt = NeedleFormat.load(TINY_TEACHER / "needles.json")
    pieces = fmt.long_pieces if NEEDLE_TASKS[task].uuid_values else fmt.short_pieces
    for prompt in prompt_set(task, 1500, 3, SEED, own).prompts:
        text = own.tokenizer.decode(prompt.ids)
        context, query = text.rsplit(" # ", 1)
        needles = dict(needle.split(" ", 1) for needle in (part.split(";")[0] for part in context.split(" # ")[1:]))
        count = context.count(" # ")
        assert count == (1 if "single" in task else 4) if NEEDLE_TASKS[task].filler != "needles" else count > 80
        assert len(needles) == (1 if task == "niah_multivalue" else count)
        if task not in ("niah_multivalue", "niah_multiquery"):
            assert needles[query] == prompt.answers[0] and prompt.room == pieces
            assert own.tokenizer.decode(prompt.answer_ids) == " " + prompt.answers[0]
        if task == "niah_multiquery":
            assert [needles[key] for key in query.replace("and ", "").split(", ")] == list(prompt.answers)
        assert all(len(answer.split()) == pieces and text.count(answer) == 1 for answer in prompt.answers)


def test_noise_is_spread_where_keys_run_out(own: PromptMaterial) -> None:
    for prompt in prompt_set("niah_multikey_2", 4096, 2, SEED, own).prompts:
        text = own.tokenizer.decode(prompt.ids)
        gaps = [len(own.tokenizer.tokenize(part.split(";")[-1])) for part in text.split(" # ")[1:-1]]
        assert text.count(" # ") == 257 and min(gaps) >= max(gaps) - 3 > 3


def test_a_wording_of_ones_own(tmp_path: Path, source: PromptMaterial) -> None:
    file = tmp_path / "plain.json"
    file.write_text(
        json.dumps(
            {
                "needle": "{key} has {value}.",
                "one": {"intro": "Read.", "question": "\n{query}?", "prefix": " {query} has "},
            }
        )
    )
    wording = load_wording(str(file), source.tokenizer, tmp_path)
    assert wording.name == "plain" and wording.cwe == RULER.cwe and wording.many == RULER.many
    (prompt,) = prompt_set("niah_single_1", 512, 1, SEED, dataclasses.replace(source, wording=wording)).prompts
    text = source.tokenizer.decode(prompt.ids)
    key = text.split("\n")[-1].split("?")[0]
    assert (
        text.startswith("Read.\nThe grass")
        and text.endswith(f"\n{key}? {key} has")
        and f"\n{key} has {prompt.answers[0]}.\n" in text
    )
    assert load_wording(str(TINY_TEACHER / "needles.json"), source.tokenizer, tmp_path).own == NeedleFormat.load(
        TINY_TEACHER / "needles.json"
    )
    assert (
        load_wording(None, source.tokenizer, tmp_path) is load_wording("ruler", source.tokenizer, TINY_TEACHER) is RULER
    )


@pytest.mark.parametrize(
    "content, complaint",
    [
        (None, "No such file or directory; the built-in ones are ruler and chat"),
        ("{", "not JSON"),
        ("[]", "not a wording"),
        ('{"neddle": "x"}', "unknown key 'neddle'"),
        ('{"needle": "{key}"}', "needle must hold {value}"),
        ('{"vt": {"question": "?", "prefix": ""}}', "vt must hold {query}"),
        ('{"noise": " "}', "noise must hold some text"),
        ('{"value_pieces": [1]}', "key 'needle' is missing"),
    ],
)
def test_bad_wordings(content: str | None, complaint: str, tmp_path: Path, source: PromptMaterial) -> None:
    file = tmp_path / "wording.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(InputError, match=complaint) as error:
        load_wording(str(file), source.tokenizer, tmp_path)
    assert "\n" not in str(error.value)


def test_bad_haystacks(tmp_path: Path, source: PromptMaterial) -> None:
    file = tmp_path / "book.txt"
    file.write_text("A short one. It ends.")
    short = dataclasses.replace(source, haystack=read_haystack(source.tokenizer, file))
    with pytest.raises(
        InputError, match=r"the text has \d+ tokens, a prompt needs \d+; give a longer one, or --repeat-text"
    ):
        prompt_set("niah_single_2", 512, 1, SEED, short)
    assert prompt_set("niah_single_1", 512, 1, SEED, short)
    again = dataclasses.replace(source, haystack=read_haystack(source.tokenizer, file, repeat=True))
    (prompt,) = prompt_set("niah_single_2", 512, 1, SEED, again).prompts
    assert source.tokenizer.decode(prompt.ids).count("A short one. It ends.") > 10
    with pytest.raises(InputError, match="niah_single_2 hides its needles in text; give it some with --text FILE"):
        prompt_set(
            "niah_single_2", 512, 1, SEED, dataclasses.replace(source, haystack=read_haystack(source.tokenizer, None))
        )
    with pytest.raises(InputError, match="No such file"):
        read_haystack(source.tokenizer, tmp_path / "none")


def test_bad_requests(source: PromptMaterial, own: PromptMaterial) -> None:
    for changed, complaint in [
        ({"task": "niah"}, "unknown task 'niah'; choose from niah_single_1"),
        ({"count": 0}, "0 prompts of 512 tokens from seed 1000000: give at least 1 prompt"),
        ({"seed": -1}, "seed -1: give at least 1 prompt, 1 token and a seed from 0 on"),
        ({"length": 60}, r"niah_single_1 with 60 tokens: too short, this tokenizer needs at least \d+"),
        ({"length": 0}, "1 prompts of 0 tokens from"),
    ]:
        asked = {"task": "niah_single_1", "length": 512, "count": 1, "seed": SEED} | changed
        with pytest.raises(InputError, match=complaint):
            prompt_set(**asked, material=source)
    few = dataclasses.replace(own.wording, own=dataclasses.replace(own.wording.own, keys=("a", "b")))
    with pytest.raises(InputError, match="niah_multiquery needs 4 keys, the wording needles has 2"):
        prompt_set("niah_multiquery", 512, 1, SEED, dataclasses.replace(own, wording=few))
    same = dataclasses.replace(
        own.wording, own=dataclasses.replace(own.wording.own, value_pieces=(" 1", " 2"), short_pieces=1)
    )
    with pytest.raises(InputError, match="the wording needles has too few values"):
        prompt_set("niah_multivalue", 512, 1, SEED, dataclasses.replace(own, wording=same))


def test_tokenizers_that_cannot_write_a_prompt(source: PromptMaterial) -> None:
    tokenizer = copy.deepcopy(small_tokenizer("gpt2"))
    tokenizer.add_tokens([f"is: {digit}" for digit in range(1, 10)])
    with pytest.raises(InputError, match=r"the tokenizer splits the answer ' \d{7}' unexpectedly behind '.*text is:'"):
        prompt_set("niah_single_1", 512, 1, SEED, PromptMaterial(tokenizer, RULER, None))
    tokenizer = copy.deepcopy(small_tokenizer("gpt2"))
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(
        InputError, match=r"the tokenizer does not keep the text '.*'; word it otherwise \(--template\)"
    ):
        prompt_set("niah_single_1", 512, 1, SEED, PromptMaterial(tokenizer, RULER, None))
