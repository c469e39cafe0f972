# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The needles of one model family: the file ``needles.json`` beside its tokenizer."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from hydra_mcore.files import from_fields, read_json, write_json

MOST_PIECES = 1000  # of a value, so that no format asks for prompts without end


@dataclass(frozen=True)
class NeedleFormat:
    """How needles, queries and values are worded for one model family.

    Raises:
        ValueError: A template lacks a placeholder, or the keys or pieces are unusable.
    """

    needle: str  # holds {key}, then {value} once
    query: str  # holds {key}; the answer follows at once
    keys: tuple[str, ...]  # words for {key}, all different
    value_pieces: tuple[str, ...]  # values are joined from these, drawn with replacement
    short_pieces: int  # pieces in a value
    long_pieces: int  # pieces where RULER has a uuid
    noise: str  # repeated where a task's filler is noise
    intro: str = ""  # stands before the haystack

    def __post_init__(self) -> None:
        before, *after = self.needle.split("{value}")
        if len(after) != 1 or "{key}" not in before or "{key}" not in self.query:
            raise ValueError("needle must hold {key}, then {value}, and query {key}")
        if not self.keys or len(set(self.keys)) != len(self.keys):
            raise ValueError("needle keys must be different from each other, and at least one")
        if any("{value}" in key for key in self.keys):
            raise ValueError("needle keys must not hold {value}")
        if not self.noise.strip():
            raise ValueError("needle format has no noise text")
        if len(set(self.value_pieces)) < 2 or not all(
            1 <= pieces <= MOST_PIECES for pieces in (self.short_pieces, self.long_pieces)
        ):
            raise ValueError(f"values need at least two different pieces, and 1 to {MOST_PIECES} pieces a value")

    def save(self, path: str | Path) -> None:
        """Write the format as JSON."""
        write_json(path, dataclasses.asdict(self))

    @classmethod
    def load(cls, path: str | Path) -> NeedleFormat:
        """Read a format that ``save`` wrote; InputError if the file is no such thing."""
        return from_fields(cls, read_json(path, what="needle format"), f"needle format {path}")
