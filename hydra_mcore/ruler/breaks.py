# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""What ends with each token of a text: a sentence, a word, a character, or nothing; in any script, for any
tokenizer.
"""

from __future__ import annotations

import numpy as np
import regex

from hydra_mcore.ruler.pieces import Pieces

NOTHING, CHARACTER, WORD, SENTENCE = range(4)
_SPACED_END = regex.compile(r"""[.!?]["')\]\u2019\u201d]*$""")  # ends a sentence where white space follows
_CLOSING = r"""["'\p{Pe}\p{Pf}]"""
# These end one wherever they stand: Unicode's Sentence_Terminal, which lacks Tibetan and Thai signs.
_END = regex.compile(rf"[\p{{STerm}}\u0e5a\u0e5b\u0f0d-\u0f12--[.!?]]{_CLOSING}*\s*$", regex.V1)
_CLOSED_LATER = regex.compile(rf"{_CLOSING}|[\p{{STerm}}\u0e5a\u0e5b\u0f0d-\u0f12--[.!?]]", regex.V1)
_ONLY_CLOSING = regex.compile(
    r"[\p{Pe}\p{Pf}--[)\]}]]+\s*$", regex.V1
)  # a token that ends what the one before it ended, if that did
_EMPTY_LINE = regex.compile(r"\s*?\n\s*?\n")
_WORD_END = regex.compile(r"[\u0f0b\u0f0c\u1361\u200b]$")  # Tibetan, Ethiopic, and the mark of a break that is not seen
_GOES_ON = regex.compile(r"[\p{M}\u200c\u200d]")  # belongs to the character before
_HALF = "\ufffd"
_BEFORE, _BEHIND = 6, 4  # tokens: a character has at most four bytes, and some signs may close a sentence


def what_ends(pieces: Pieces, ids: np.ndarray) -> np.ndarray:
    """uint8 [n]: what ends with each of the tokens ``ids`` [n], so that a needle with a space before it fits in behind
    it.

    The last one ends a sentence.
    """
    known, which = np.unique(ids, return_inverse=True)
    texts = pieces.decode(known[:, None].tolist())
    halves = np.asarray([not text or _HALF in text for text in texts])[which]
    closing = np.asarray([bool(_ONLY_CLOSING.match(text)) for text in texts])[which]
    pairs, where = np.unique(np.stack([which[:-1], which[1:]]), axis=1, return_inverse=True)
    ends = np.asarray([break_between(texts[left], texts[right]) for left, right in pairs.T.tolist()], dtype=np.uint8)
    ends = np.append(ends[where.reshape(-1)], np.uint8(SENTENCE))
    unclear = np.flatnonzero(halves[:-1] | halves[1:] | closing[:-1])  # where two tokens alone do not tell
    ends[unclear] = _between_characters(pieces, ids, unclear)
    return ends


def break_between(left: str, right: str) -> int:
    """What ends between two texts that are whole characters: NOTHING, CHARACTER, WORD or SENTENCE."""
    spaced = right[:1].isspace()
    if (
        (spaced and _SPACED_END.search(left))
        or (_END.search(left) and not _CLOSED_LATER.match(right))
        or _EMPTY_LINE.match(right)
    ):
        return SENTENCE
    if spaced or right.startswith("\u200b") or _WORD_END.search(left):
        return WORD
    return NOTHING if _GOES_ON.match(right) or left.endswith("\u200d") else CHARACTER


def _between_characters(pieces: Pieces, ids: np.ndarray, places: np.ndarray) -> list[int]:
    """What ends with the tokens at the places, read with their neighbours: some may be parts of characters."""
    left = _whole(
        pieces, {int(at): [ids[max(0, at + 1 - size) : at + 1] for size in range(_BEFORE, 0, -1)] for at in places}
    )
    right = _whole(pieces, {int(at): [ids[at + 1 : at + 1 + size] for size in range(1, _BEHIND + 1)] for at in left})
    both = {at: (*left[at], *right[at]) for at in right}
    joined = pieces.decode([[*before, *behind] for before, _, behind, _ in both.values()]) if both else []
    found = {
        at: break_between(before, behind)
        for (at, (_, before, _, behind)), text in zip(both.items(), joined, strict=True)
        if text == before + behind  # else a decoder has left the halves of a character out
    }
    return [found.get(int(at), NOTHING) for at in places]


def _whole(pieces: Pieces, candidates: dict[int, list[np.ndarray]]) -> dict[int, tuple[list[int], str]]:
    """For each place, the first candidate that decodes to whole characters, and its text. Places without one are left
    out.
    """
    found: dict[int, tuple[list[int], str]] = {}
    for turn in range(max(_BEFORE, _BEHIND)):
        asked = {at: some[turn].tolist() for at, some in candidates.items() if at not in found and turn < len(some)}
        texts = pieces.decode(list(asked.values())) if asked else []
        found |= {
            at: (each, text)
            for (at, each), text in zip(asked.items(), texts, strict=True)
            if text and _HALF not in text
        }
    return found
