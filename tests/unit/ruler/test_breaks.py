# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: RUF001
"""Where needles may stand in a text: sentences of every script, words where there are none, and even depths
either way.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import regex

from hydra_mcore.ruler.breaks import CHARACTER, NOTHING, SENTENCE, WORD, break_between, what_ends
from hydra_mcore.ruler.haystack import ASTRAY, Haystack, nearest, read_haystack
from hydra_mcore.ruler.material import PromptMaterial
from hydra_mcore.ruler.pieces import Pieces
from hydra_mcore.ruler.sets import draw_prompts
from hydra_mcore.ruler.wording import RULER
from tests.support.small_tokenizers import KINDS, small_tokenizer

# A sentence each, as Wikipedia's languages write them, and whether a space follows.
SCRIPTS = {
    "English": "The house is old. Who lives there? “Nobody.” ",
    "Hindi": "यह घर पुराना है। वहाँ कौन रहता है? कोई नहीं॥ ",
    "Bengali": "বাড়িটি পুরানো। সেখানে কে থাকে? ",
    "Urdu": "یہ گھر پرانا ہے۔ وہاں کون رہتا ہے؟ ",
    "Arabic": "البيت قديم. من يسكن هناك؟ ",
    "Burmese": "ဒီအိမ်ဟောင်းတယ်။ဘယ်သူနေလဲ။",
    "Khmer": "ផ្ទះនេះចាស់។អ្នកណារស់នៅទីនោះ។",
    "Tibetan": "ཁང་པ་འདི་རྙིང་པ་རེད། དེར་སུ་སྡོད་ཀྱི་ཡོད། ",
    "Amharic": "ቤቱ አሮጌ ነው። እዚያ ማን ይኖራል፧ ",
    "Armenian": "Տունը հին է։ Այնտեղ մարդ չկա։ ",
    "Mongolian": "ᠭᠡᠷ ᠬᠠᠭᠤᠴᠢᠨ᠃ ᠬᠡᠨ ᠪᠠᠢᠨᠠ᠃ ",
    "Chinese": "房子很旧。谁住在那里？“没有人。”",
    "Japanese": "家は古い。「誰もいない。」",
    "Greek": "Το σπίτι είναι παλιό. Κανείς δεν μένει εκεί! ",
    "Vai": "ꕉꕜꕮ꘎ ꔔꘋ꘎ ",
}
SOME_KINDS = [pytest.param(kind, marks=[pytest.mark.slow] if kind in ("qwen", "byte") else []) for kind in KINDS]
TERMINATOR = r"[\p{STerm}\u0f0d-\u0f12]"


def ends_of(kind: str, text: str) -> list[tuple[str, int]]:
    """Each token's end in the text, from the text's own characters: the text before it and what ends there."""
    tokenizer = small_tokenizer(kind)
    ids = np.asarray(tokenizer.encode(text, add_special_tokens=False), dtype=np.int32)
    pieces = Pieces(tokenizer)
    return [(pieces.decode([ids[: at + 1].tolist()])[0], int(end)) for at, end in enumerate(what_ends(pieces, ids))]


@pytest.mark.parametrize("kind", SOME_KINDS)
@pytest.mark.parametrize("script", SCRIPTS)
def test_sentences_of_every_script(script: str, kind: str) -> None:
    """Every terminator ends one, nothing else does, and no character is cut; most of these tokenizers give bytes for
    them.
    """
    text = SCRIPTS[script] * 2
    found = [(before.strip(), end) for before, end in ends_of(kind, text)]
    sentences = {before for before, end in found if end == SENTENCE and before != text.strip()}
    expected = {
        text[: match.end()].strip()
        for match in regex.finditer(rf"{TERMINATOR}++[\p{{Pe}}\p{{Pf}}]*+(?=(\s)|.)", text)
        if match[1] or not regex.search(r"[.!?]\W*$", match[0])
    } - {text.strip()}
    assert sentences == expected and len(expected) > 1
    assert all(text.startswith(before) for before, end in found if end > NOTHING)


@pytest.mark.parametrize(
    ("left", "right", "ends"),
    [
        ("end.", " Next", SENTENCE), ("3.", "14", CHARACTER), ("है।", " वह", SENTENCE), ("है।", "”", CHARACTER),
        ("है।”", "वह", SENTENCE),
        ("。", "」", CHARACTER), ("！", "！", CHARACTER), ("。」", "次", SENTENCE), ("क", "ा", NOTHING), ("न", "्",
            NOTHING),
        ("e", "\u0301", NOTHING), ("👩\u200d", "👧", NOTHING), ("word", " word", WORD), ("ไทย", "ไทย", CHARACTER),
        ("ไทย", "\u200bไทย", WORD),
        ("བོད་", "ཡིག", WORD), ("ቤቱ፡", "አሮጌ", WORD), ("line", "\n\nnext", SENTENCE), ("line", "\nnext", WORD),
        ("؟", " و", SENTENCE), ("a", "", CHARACTER),
    ],
)  # fmt: skip
def test_what_ends_between_two_texts(left: str, right: str, ends: int) -> None:
    assert break_between(left, right) == ends


@pytest.mark.parametrize("kind", KINDS)
def test_random_texts_are_never_cut_within_a_character(kind: str) -> None:
    rng = np.random.default_rng(5)
    signs = list("ab .!?\n।۔။。中ไ👩\u200d👧\u0301का्é\ufffd”")
    for _ in range(20):
        text = "a" + "".join(rng.choice(signs, size=40)) + "a"
        for before, end in ends_of(kind, text):
            assert end == NOTHING or text.startswith(before.removeprefix(" ")), (text, before)


def haystack_of(kind: str, text: str, tmp_path: Path) -> Haystack:
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    return read_haystack(small_tokenizer(kind), tmp_path / "text.txt")


FLAT = "the grass is green and the sky is blue and here we go, there and back again, " * 8
LAYOUTS = {
    "one huge paragraph": FLAT * 25,
    "huge paragraphs": "\n\n".join([FLAT * 12] * 2),
    "tiny paragraphs": "\n\n".join([FLAT[:70]] * 200),
    "mixed": "\n\n".join([FLAT * 8, *[FLAT[:70]] * 40] * 2),
    "no spaces": "wörd" * 1500,
    "Thai": "บ้านหลังนี้เก่า มีคนอยู่ที่นั่น " * 80,
    "Hindi": SCRIPTS["Hindi"] * 40,
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["gpt2", pytest.param("byte", marks=pytest.mark.slow)])
def test_depths_are_even_whatever_the_paragraphs(layout: str, kind: str, tmp_path: Path) -> None:
    source = PromptMaterial(small_tokenizer(kind), RULER, haystack_of(kind, LAYOUTS[layout], tmp_path))
    count = 20
    prompts = list(draw_prompts("niah_single_2", 2048, count, 1_000_000, source))
    found = np.sort([prompt.depths[0] for prompt in prompts])
    assert np.abs(found - (np.arange(count) + 0.5) / count).max() < ASTRAY + 0.01  # and what a word takes
    for prompt in prompts:
        (start, end), decode = prompt.spans[0], source.tokenizer.decode
        assert f": {prompt.answers[0]}." in decode(prompt.ids) and not decode(prompt.ids[:start]).endswith("\ufffd")
        assert not decode(prompt.ids[end:]).startswith("\ufffd")


@pytest.mark.parametrize(
    "text", ["".join(f"word{number} " for number in range(4000)), "".join(f"w{number}" for number in range(4000))]
)
def test_prompts_begin_anywhere_in_a_text_without_sentences(text: str, tmp_path: Path) -> None:
    found, rng = haystack_of("gpt2", text, tmp_path), np.random.default_rng(0)
    assert len({tuple(found.part(500, rng)[0][:9].tolist()) for _ in range(20)}) > 15


def test_the_nearest_place_is_between_sentences_if_one_is_near_enough() -> None:
    ends = np.full(1000, CHARACTER, dtype=np.uint8)
    ends[[0, 480, 900]] = SENTENCE
    ends[::7] = np.maximum(ends[::7], WORD)
    assert nearest(ends, [0.5, 0.456, 0.9, 0.02, 0.7, 1.0]) == [480, 480, 900, 0, 700, 994]
    assert nearest(np.where(ends == SENTENCE, SENTENCE, NOTHING), [0.7]) == [900]  # lines of noise have nothing else


def test_sentences_found_before_are_found_alike(tmp_path: Path) -> None:
    """Needles in English prose stand where the first version of the prompts had them: a sentence was always near
    enough.
    """
    text = "".join(
        f'This is sentence {number} of a book. Is it? "Yes!" (It is.) {"And so on. " * (number % 4)}\n\n'
        for number in range(800)
    )
    found = haystack_of("gpt2", text, tmp_path)
    source = PromptMaterial(small_tokenizer("gpt2"), RULER, found)
    places = "".join(f"{prompt.spans[0][0]}," for prompt in draw_prompts("niah_single_2", 2048, 12, 1_000_000, source))
    assert places == "287,1856,448,1222,922,764,1073,606,135,1549,1708,1396,"
