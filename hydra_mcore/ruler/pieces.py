# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Token ids of pieces of text that are joined to one prompt, whatever the tokenizer does at the start of a text."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase as Tokenizer

from hydra_mcore.errors import InputError

# What a piece is encoded behind, the first that works. Nothing is right for byte-level tokenizers; those that put a
# space before every text need something there, and it must be nothing that a token spans together with the piece's
# first letters.
ANCHORS = ("", "\n", "a", ".")


class Pieces:
    """Encodes pieces so that, behind other text, they decode to what was meant, with no space put in front.

    Attributes:
        start: ids that the tokenizer puts before every text by itself (a BOS), or none.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        plain, whole = tokenizer.encode("a", add_special_tokens=False), tokenizer.encode("a")
        self.start: list[int] = next(
            (whole[:at] for at in range(len(whole)) if whole[at : at + len(plain)] == plain), []
        )
        self._before = plain
        self._special = [token for token in tokenizer.all_special_tokens if token]

    def first(self, text: str) -> list[int]:
        """Ids of the text that a prompt begins with, a BOS included where the tokenizer adds one and the text
        has none.
        """
        ids = self._tokenizer.encode(text, add_special_tokens=False, verbose=False)
        return ids if ids[: len(self.start)] == self.start else self.start + ids

    def ids(self, text: str) -> list[int]:
        """Ids of one piece; see ``batch``."""
        return self.batch([text])[0]

    def batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each piece as it reads behind other text.

        Raises:
            InputError: the tokenizer cannot give a piece back as it is.
        """
        found: dict[str, list[int]] = {}
        missing = list(dict.fromkeys(texts))
        for anchor in ANCHORS:
            found |= self._behind(anchor, missing)
            missing = [text for text in missing if text not in found]
            if not missing:
                return [found[text] for text in texts]
        raise InputError(
            f"the tokenizer does not keep the text {missing[0][:60]!r}; word it otherwise (--template), or use another"
            " tokenizer"
        )

    def continuation(self, text: str, more: str) -> list[int]:
        """Ids with which the tokenizer itself continues a piece of text.

        Raises:
            InputError: it writes the two with a token across their border, so a model would not answer in these tokens.
        """
        ids, both = self.batch([text, text + more])
        if both[: len(ids)] != ids or len(both) == len(ids):
            raise InputError(
                f"the tokenizer splits the answer {more!r} unexpectedly behind {text[-30:]!r}; word the question"
                " otherwise"
            )
        return both[len(ids) :]

    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """Texts of many sequences of ids, as they read behind other text."""
        start = len(self._tokenizer.decode(self._before, clean_up_tokenization_spaces=False))
        joined = [[*self._before, *each] for each in ids]
        return [text[start:] for text in self._tokenizer.batch_decode(joined, clean_up_tokenization_spaces=False)]

    def _behind(self, anchor: str, texts: list[str]) -> dict[str, list[int]]:
        """The ids of each text that keeps its own tokens when it follows the anchor; other texts are left out."""
        size = len(before := self._tokenizer.encode(anchor, add_special_tokens=False) if anchor else [])
        encoded = self._tokenizer([anchor + text for text in texts], add_special_tokens=False, verbose=False)[
            "input_ids"
        ]
        pieces = {text: ids[size:] for text, ids in zip(texts, encoded, strict=True) if ids[:size] == before}
        decoded = self.decode(list(pieces.values()))
        return {text: ids for (text, ids), back in zip(pieces.items(), decoded, strict=True) if self._same(text, back)}

    def _same(self, text: str, back: str) -> bool:
        if any(
            token in text for token in self._special
        ):  # some of them swallow the white space beside them, as they should
            return "".join(text.split()) == "".join(back.split())
        return text == back
