# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Make text and training sequences of the tiny example.

The real text is the source code and documentation of Python's own standard library: it is on every machine that can
run this project. A hash of a file's name decides whether it is in `train` or in `held_out`. Training sequences are that
text (or noise) with needles strewn in. Keys recur, because only a repeat of a key can be predicted. With many repeats a
sequence, the retrieval circuit forms within minutes.
"""

from __future__ import annotations

import functools
import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hydra_mcore.ruler.needle_format import NeedleFormat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

END_OF_DOCUMENT = "<|endoftext|>"
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}

KEYS = tuple(
    (
        "acorn alder amber anchor anvil apple apron arrow aspen badge bagel banjo barley barn "
        "basil basin basket beacon beaver berry birch biscuit bison blanket blossom bonnet "
        "boulder bracelet branch bread breeze brick bridge bronze broom bucket buffalo butter "
        "button cabbage cabin cactus camel candle canoe canyon caravan carpet carrot castle "
        "cedar cello chalk cherry chestnut chimney cider cinnamon clarinet cliff clover coconut "
        "comet copper coral cotton cradle crane crayon cricket crow crystal daisy dolphin "
        "donkey dragon drum duckling eagle ember emerald falcon feather fern ferry fiddle finch "
        "flamingo flute forest fountain fox galaxy garden garlic gazelle geyser ginger giraffe "
        "glacier goat goblet goose grape gravel guitar hammer hamster harbor harp harvest hawk "
        "hazel hedgehog heron hickory honey horizon horse iceberg igloo indigo island ivory "
        "jacket jaguar jasmine jewel jungle juniper kangaroo kayak kettle kitten koala ladder "
        "lagoon lantern lavender lemon leopard lighthouse lilac lily lizard lobster lotus "
        "magnet magnolia mango maple marble meadow melon meteor mitten monkey moose mosaic "
        "mountain mushroom mustard needle nettle nutmeg oak oasis oatmeal ocean olive onion "
        "orchard orchid ostrich otter owl oyster paddle panda panther parrot peach peacock "
        "peanut pebble pelican penguin pepper piano pigeon pillow pine pirate planet plum pony "
        "poplar poppy prairie puffin pumpkin puppy quail quilt rabbit raccoon radish raven "
        "ribbon river robin rocket rooster ruby saddle saffron salmon sandal sapphire scarf "
        "seagull shovel silver sparrow spider spruce squirrel stallion statue sunset swan "
        "teapot thistle thunder tiger tomato trumpet tulip tunnel turnip turtle umbrella valley "
        "vanilla velvet violet violin volcano walnut walrus waterfall whale whistle willow wolf "
        "zebra"
    ).split()
)

# "# key 12 34;" : the value follows its key at once, the easiest thing a small model can retrieve.
TINY_FORMAT = NeedleFormat(
    needle=" # {key}{value};",
    query=" # {key}",
    keys=KEYS,
    value_pieces=tuple(f" {number:02d}" for number in range(100)),
    short_pieces=2,
    long_pieces=4,
    noise=" The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.",
)

# Mean filler tokens between needles: from needles only to a few needles in a long text.
GAPS = (0, 0, 2, 4, 8, 16, 32, 64, 128)
# Different value pieces in a sequence.
POOLS = (None, None, 3, 6, 12, 25)


def source_files(split: str) -> list[Path]:
    """List the standard library's source files of one split, in a fixed, well mixed order.

    Args:
        split: `train` (nine files of ten) or `held_out`.

    Raises:
        ValueError: Another split, or no sources in this Python.
    """
    if split not in ("train", "held_out"):
        raise ValueError(f"split must be train or held_out, not {split!r}")
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for path in root.rglob("*.py"):
        name = path.relative_to(root)
        if _SKIPPED_FOLDERS.isdisjoint(name.parts) and not name.parts[0].startswith("config-"):
            digest = hashlib.sha256(name.as_posix().encode()).hexdigest()
            if (int(digest[:8], 16) % 10 == 0) == (split == "held_out"):
                files.append((digest, path))
    if not files:
        raise ValueError(f"no Python sources under {root}")
    return [path for _, path in sorted(files)]


def read_texts(split: str) -> Iterator[str]:
    """Yield the text of each source file; bytes that are not UTF-8 are replaced."""
    for path in source_files(split):
        yield path.read_text(encoding="utf-8", errors="replace")


def load_text(tokenizer: PreTrainedTokenizerBase, split: str = "train", max_tokens: int = 1_000_000) -> np.ndarray:
    """Return up to `max_tokens` token ids `[n]` of real text, files ended by end-of-document.

    Raises:
        ValueError: As `source_files`.
    """
    end = tokenizer.convert_tokens_to_ids(END_OF_DOCUMENT)
    ids: list[int] = []
    for text in read_texts(split):
        ids += tokenizer.encode(text, add_special_tokens=False)
        ids.append(end)
        if len(ids) >= max_tokens:
            break
    return np.asarray(ids[:max_tokens], dtype=np.int64)


@dataclass(frozen=True)
class _Pieces:
    """A format's tokens, encoded once: sequences are then built without the tokenizer."""

    heads: list[list[int]]
    tail: list[int]
    values: np.ndarray
    noise: np.ndarray
    end: int


@functools.lru_cache(maxsize=4)
def _pieces(tokenizer: PreTrainedTokenizerBase, fmt: NeedleFormat) -> _Pieces:
    encode = functools.partial(tokenizer.encode, add_special_tokens=False)
    before, after = fmt.needle.split("{value}")
    values = [encode(piece) for piece in fmt.value_pieces]
    if any(len(ids) != 1 for ids in values):
        raise ValueError("training sequences need values whose every piece is one token")
    return _Pieces(
        heads=[encode(before.replace("{key}", key)) for key in fmt.keys],
        tail=encode(after),
        values=np.asarray(values, dtype=np.int64)[:, 0],
        noise=np.asarray(encode(fmt.noise), dtype=np.int64),
        end=int(tokenizer.convert_tokens_to_ids(END_OF_DOCUMENT)),
    )


# What a training token is: the loss weighs each kind by itself.
TEXT, NEEDLE, FIRST_VALUE, REPEATED_VALUE = range(4)


class _Sequence:
    """A training sequence under construction."""

    def __init__(self, pieces: _Pieces, text_ids: np.ndarray, noise: bool, rng: np.random.Generator) -> None:
        self.pieces, self.rng, self.noise = pieces, rng, noise
        self.source = pieces.noise if noise else text_ids
        self.at = int(rng.integers(len(self.source)))
        self.ids: list[int] = []
        self.kinds: list[int] = []

    def fill(self, count: int) -> None:
        """Append the source's next `count` tokens."""
        part = self.source.take(range(self.at, self.at + count), mode="wrap").tolist()
        self.at += count
        self.ids += part
        self.kinds += [NEEDLE if self.noise else TEXT] * count

    def needle(self, key: int, value: np.ndarray, repeat: bool) -> None:
        """Append a needle."""
        head, tail = self.pieces.heads[key], self.pieces.tail
        self.ids += head + value.tolist() + tail
        kind = REPEATED_VALUE if repeat else FIRST_VALUE
        self.kinds += [NEEDLE] * len(head) + [kind] * len(value) + [NEEDLE] * len(tail)


def recurring_sequence(
    tokenizer: PreTrainedTokenizerBase,
    fmt: NeedleFormat,
    text_ids: np.ndarray,
    length: int,
    gap: float,
    rng: np.random.Generator,
    pool: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Build one sequence in which keys recur.

    Args:
        tokenizer: The tokenizer of `text_ids`.
        fmt: Needle format whose value pieces are single tokens.
        text_ids: `[n]` real text.
        length: Tokens in the sequence.
        gap: Mean number of filler tokens between needles; 0 for needles only.
        rng: Source of all random choices.
        pool: How many different value pieces the sequence uses; all of them if None. With few,
            values share pieces, and only the key tells what follows a piece.

    Returns:
        int64 `[s]` token ids and `[s]` kinds (`TEXT`, `NEEDLE`, `FIRST_VALUE`, `REPEATED_VALUE`).
    """
    pieces = _pieces(tokenizer, fmt)
    sequence = _Sequence(pieces, text_ids, noise=bool(rng.random() < 0.15), rng=rng)
    # Long values only among few keys, as in the task that uses them.
    long_value = bool(rng.random() < 0.2)
    size = fmt.long_pieces if long_value else fmt.short_pieces
    cost = len(pieces.heads[0]) + size + len(pieces.tail) + gap
    slots = max(2, int(length / cost))
    most = max(1, min(8 if long_value else len(fmt.keys), int(slots * 0.6)))
    keys = rng.permutation(len(fmt.keys))[: int(rng.integers(1, most + 1))]
    known = pieces.values if pool is None else rng.permutation(pieces.values)[:pool]
    values = known[rng.integers(len(known), size=(len(keys), size))]
    # All keys first and questions last in a third of the sequences, as evaluation has it.
    ordered = bool(rng.random() < 0.35)
    seen: set[int] = set()
    while len(sequence.ids) < length:
        sequence.fill(int(rng.exponential(gap)) if gap else 0)
        fresh = ordered and len(seen) < len(keys)
        pick = len(seen) if fresh else int(rng.integers(len(keys)))
        sequence.needle(int(keys[pick]), values[pick], repeat=pick in seen)
        seen.add(pick)
    ids = np.asarray(sequence.ids[:length], dtype=np.int64)
    return ids, np.asarray(sequence.kinds[:length], dtype=np.int64)


def documents(
    tokenizer: PreTrainedTokenizerBase,
    fmt: NeedleFormat,
    text_ids: np.ndarray,
    length: int,
    count: int,
    seed: int,
) -> Iterator[list[int]]:
    """Yield training documents for the student's stages.

    Real text (sometimes noise) with needles whose keys recur, at many densities, and documents of
    needles only.

    Args:
        tokenizer: The tokenizer of `text_ids`.
        fmt: Needle format whose value pieces are single tokens.
        text_ids: `[n]` real text, from `load_text`.
        length: Tokens in a document, the end-of-document token included.
        count: Documents.
        seed: Below 1,000,000; evaluation prompts are drawn from seeds above.

    Raises:
        ValueError: A seed that belongs to evaluation, or a length below 2.
    """
    if not 0 <= seed < 1_000_000:
        raise ValueError(f"training seeds are 0 to 999,999 (evaluation has the rest), not {seed}")
    if length < 2:
        raise ValueError(f"a document needs at least 2 tokens, not {length}")
    rng = np.random.default_rng(seed)
    end = _pieces(tokenizer, fmt).end
    for _ in range(count):
        gap = float(rng.choice(GAPS))
        pool = POOLS[int(rng.integers(len(POOLS)))]
        ids, _ = recurring_sequence(tokenizer, fmt, text_ids, length - 1, gap, rng, pool)
        yield [*ids.tolist(), end]
