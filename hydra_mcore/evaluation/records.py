# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""What evaluated models were asked and how they did: a small file for each finished piece, so that none is done twice.

A folder ``records`` holds one folder for each model and dtype, found by the model's fingerprint; in it ``model.json``
and a file for each piece, found by the digest of what was asked. Every file is written beside and renamed, so that a
killed evaluation leaves whole pieces only, and jobs that write into one folder do not disturb each other. A damaged
file is named and
left out: its piece is run again when it is asked for.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import os
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from tokenize import TokenError
from typing import Any, Literal

import numpy as np

from hydra_mcore.errors import InputError, first_line
from hydra_mcore.evaluation.models import ModelFacts
from hydra_mcore.evaluation.perplexity import TextLoss
from hydra_mcore.evaluation.scoring import Score
from hydra_mcore.files import from_fields, is_name, read_json, replacing, write_text
from hydra_mcore.ruler.prompts import TASKS

DAY_NAME = "today"  # file with the day that chat templates took for today, in whose prompts it stands
TEXT = "text"  # the "task" of predicting held-out text


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What models of one tokenizer are asked in one go: prompts of a task and length, or windows of text."""

    task: str
    """Of ``TASKS``, or ``TEXT``."""
    length: int
    """Tokens of a prompt, its answer included, or of a window."""
    count: int
    """Prompts or windows."""
    scoring: Literal["teacher-forced", "generation", "loss"]
    tokenizer: str
    """Fingerprint of the tokenizer."""
    wording: str
    """Name and digest of the prompts' wording; empty for text."""
    seed: int
    """Of the prompts; 0 for text."""
    digest: str
    """sha256 of what is asked: equal digests, equal questions."""
    max_id: int
    """The largest token id, which a model's vocabulary must hold."""

    def __post_init__(self) -> None:
        if self.task not in (*TASKS, TEXT) or (self.scoring == "loss") != (self.task == TEXT):
            raise InputError(f"task {self.task!r}, scored by {self.scoring}, is none of this version")
        if min(self.length, self.count) < 1 or min(self.seed, self.max_id) < 0:
            raise InputError("length and count start from 1, seed and max_id from 0")
        if not all(map(is_name, (self.tokenizer, self.wording, self.digest))):
            raise InputError("tokenizer, wording and digest are one short line each")

    @property
    def file_name(self) -> str:
        return f"{self.task}-{self.length}-{self.scoring}-{self.digest[:16]}.json"


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """A row of the report: a model, its name, and how it was run."""

    name: str
    facts: ModelFacts
    dtype: str
    tokenizer: str
    """Fingerprint of its tokenizer."""

    @property
    def key(self) -> str:
        return f"{self.facts.fingerprint[:16]}-{self.dtype}"


@dataclass(frozen=True)
class Row:
    """A contestant and all that it was asked so far."""

    contestant: Contestant
    scores: dict[Piece, Score]
    text: dict[Piece, TextLoss]
    likeliest: dict[Piece, Path]
    """Files of the likeliest tokens, int32 [windows, length - 1]; of windows up to the native length only."""


@dataclass(frozen=True, kw_only=True)
class _ModelFile:
    """``model.json`` of a record."""

    name: str
    asked: Any
    """When the model was first asked: nanoseconds since 1970, place among those asked at once."""
    dtype: str
    tokenizer: str
    facts: ModelFacts

    def __post_init__(self) -> None:
        if not all(map(is_name, (self.name, self.dtype, self.tokenizer))):
            raise ValueError("name, dtype and tokenizer are one short line each")
        if not isinstance(self.asked, list) or [type(part) for part in self.asked] != [int, int]:
            raise ValueError("asked is not a time and a place")

    @property
    def contestant(self) -> Contestant:
        return Contestant(name=self.name, facts=self.facts, dtype=self.dtype, tokenizer=self.tokenizer)


@dataclass(frozen=True)
class _PieceFile:
    """A finished piece: each prompt's score, or the loss on text."""

    piece: Piece
    found: tuple[float, ...] | TextLoss

    def __post_init__(self) -> None:
        piece, found = self.piece, self.found
        if isinstance(found, TextLoss):
            fits = piece.task == TEXT and (found.length, len(found.by_window)) == (piece.length, piece.count)
        else:
            fits = piece.task != TEXT and len(found) == piece.count and all(0 <= score <= 1 for score in found)
        if not fits:
            raise ValueError("the answers are not those to the piece's questions")


class Records:
    """The finished pieces below an output folder."""

    def __init__(self, out: Path) -> None:
        self.root = out / "records"
        self._said: set[Path] = set()

    def check_names(self, contestants: Sequence[Contestant]) -> None:
        """Raise InputError where a name is that of another model which has answered here."""
        here = {contestant.key for contestant in contestants}
        for row in self.rows():
            for contestant in contestants:
                if row.contestant.name == contestant.name and row.contestant.key not in here:
                    fix = "name this one apart with NAME=DIR, or choose another --out"
                    raise InputError(
                        f"{self.root.parent}: {contestant.name!r} is another model there (weights or dtype differ);"
                        f" {fix}"
                    )

    def register(self, contestants: Sequence[Contestant]) -> None:
        """Note the models by their names; those that are known keep their places in the order."""
        for place, contestant in enumerate(contestants):
            path, facts = self.root / contestant.key / "model.json", dataclasses.asdict(contestant.facts)
            asked = known.asked if (known := self._model(path)) else [time.time_ns(), place]
            raw = {
                "name": contestant.name,
                "asked": asked,
                "dtype": contestant.dtype,
                "tokenizer": contestant.tokenizer,
            }
            _write(
                path,
                raw
                | {"facts": {name: str(value) if isinstance(value, Path) else value for name, value in facts.items()}},
            )

    @property
    def day(self) -> date | None:
        """The day that is noted; raises InputError for a file that holds none."""
        path = self.root / DAY_NAME
        try:
            return date.fromisoformat(path.read_text(encoding="utf-8").strip())
        except FileNotFoundError:
            return None
        except ValueError:
            raise InputError(
                f"{path}: holds no day; write the day of the prompts as YYYY-MM-DD, or remove the file"
            ) from None

    def today(self, wanted: date | None) -> date:
        """The day that this folder's prompts take for today, whatever the calendar says: noted by who asks first.

        Args:
            wanted: the day asked for; None is the one noted, else the calendar's.

        Raises:
            InputError: another day is noted, or no day.
        """
        if self.day is None:
            path = self.root / DAY_NAME
            path.parent.mkdir(parents=True, exist_ok=True)
            beside = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.partial")
            beside.write_text(f"{wanted or date.today()}\n")
            try:
                os.link(beside, path)  # unlike a rename, it gives way to the job that was quicker
            except FileExistsError:
                pass
            except OSError:  # a file system without hard links
                beside.replace(path)
            finally:
                beside.unlink(missing_ok=True)
        day = self.day
        if wanted not in (None, day):
            raise InputError(
                f"--date {wanted}: prompts in {self.root.parent} are of {day}; leave --date out, or choose another"
                " --out"
            )
        return day

    def check_wording(self, asked: Sequence[Piece]) -> None:
        """Raise InputError where prompts of a tokenizer are there in another wording: a report must not mix them."""
        answered = itertools.chain.from_iterable(row.scores for row in self.rows())
        known = {piece.tokenizer: piece.wording for piece in answered}
        for piece in asked:
            if piece.task != TEXT and (there := known.get(piece.tokenizer, piece.wording)) != piece.wording:
                raise InputError(
                    f"{self.root.parent}: holds prompts worded as {there}, not as {piece.wording}; choose another --out"
                )

    def holds(self, contestant: Contestant, piece: Piece) -> bool:
        return self._piece(self.root / contestant.key / piece.file_name) is not None

    def keep(
        self, contestant: Contestant, piece: Piece, found: Sequence[float] | TextLoss, likeliest_bs: np.ndarray | None
    ) -> None:
        """Keep a finished piece: each prompt's score, or the loss and, as int [windows, length - 1], the likeliest
        tokens.
        """
        path = self.root / contestant.key / piece.file_name
        if likeliest_bs is not None:
            np.save(
                array := io.BytesIO(), likeliest_bs.astype(np.int32)
            )  # a full disk would be an error without a number
            with replacing(path.with_suffix(".npy")) as beside:
                beside.write_bytes(array.getvalue())
        _write(
            path,
            {
                "piece": dataclasses.asdict(piece),
                "found": found.to_dict() if isinstance(found, TextLoss) else list(found),
            },
        )

    def rows(self) -> list[Row]:
        """Every model that has finished a piece, with all its pieces, in the order in which the models were first
        asked.
        """
        models = {path.parent: model for path in self.root.glob("*/model.json") if (model := self._model(path))}
        rows = [self._row(folder, models[folder]) for folder in sorted(models, key=lambda folder: models[folder].asked)]
        return [row for row in rows if row.scores or row.text]

    def _row(self, folder: Path, model: _ModelFile) -> Row:
        row = Row(model.contestant, {}, {}, {})
        for path in sorted(folder.glob("*-*.json")):
            if (record := self._piece(path)) is None:
                continue
            if not isinstance(record.found, TextLoss):
                row.scores[record.piece] = Score.of(record.found)
                continue
            row.text[record.piece] = record.found
            if path.with_suffix(".npy").exists():
                row.likeliest[record.piece] = path.with_suffix(".npy")
        return row

    def _model(self, path: Path) -> _ModelFile | None:
        """A model that was asked; None where its file is missing or damaged."""
        return self._read(path, _ModelFile, lambda model: model.contestant.key == path.parent.name)

    def _piece(self, path: Path) -> _PieceFile | None:
        """A finished piece, its likeliest tokens included where they were kept; None where one is missing or
        damaged.
        """
        return self._read(
            path, _PieceFile, lambda record: record.piece.file_name == path.name and _whole(path, record.piece)
        )

    def _read[T](self, path: Path, kind: type[T], fits: Callable[[T], bool]) -> T | None:
        if not path.exists():
            return None
        try:
            found = from_fields(kind, read_json(path), str(path))
            if fits(found):
                return found
            problem = f"{path}: holds something else than its name says"
        except InputError as error:
            problem = str(error)
        if path not in self._said:
            self._said.add(path)
            print(f"a damaged record is left out, and made again where it is asked for: {problem}", file=sys.stderr)
        return None


def _whole(path: Path, piece: Piece) -> bool:
    """Whether a piece's likeliest tokens, if they were kept, are as many as there should be; raises InputError for no
    such file.
    """
    tokens = path.with_suffix(".npy")
    if not tokens.exists():
        return True
    try:
        found = np.lib.format.open_memmap(tokens, mode="r")  # which never unpickles and allocates nothing
    except (OSError, ValueError, OverflowError, SyntaxError, TokenError) as error:
        raise InputError(f"{tokens}: no array of token ids ({first_line(error)})") from None
    return found.dtype == np.int32 and found.shape == (piece.count, piece.length - 1)


def check_folder(out: Path) -> None:
    """Raise InputError for an output folder that cannot be written."""
    above = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise InputError(f"{out}: cannot be written, {above} is not a writable folder")


def _write(path: Path, raw: dict[str, Any]) -> None:
    write_text(path, json.dumps(raw) + "\n")
