# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""What a scoring run has finished, kept line by line, so that a killed run goes on where it stopped.

A folder holds one ``*.jsonl`` file for each writer. Its first line says what the run is, every other line is one
finished
piece: its name, its value and a checksum of both. A last line that was cut off is no piece, and neither is a damaged
    one.
"""

from __future__ import annotations

import json
import sys
import zlib
from pathlib import Path
from typing import Any, TextIO

from hydra_mcore.errors import InputError
from hydra_mcore.files import named, parse_json, shown

Pieces = dict[str, Any]


def read_journal(folder: Path, run: dict[str, Any]) -> Pieces:
    """The finished pieces of a run, by name; none where the folder is missing.

    Args:
        run: JSON facts that must be equal for pieces to belong together.

    Raises:
        InputError: the folder holds pieces of another run; the first fact that differs is named. Or what a file says of
            its run cannot be read.
    """
    pieces: Pieces = {}
    for path in sorted(folder.glob("*.jsonl")):
        head, *lines = path.read_bytes().split(b"\n")
        if not lines:  # killed before the first line was whole
            continue
        found, wanted = parse_json(head, f"{path}, line 1"), json.loads(json.dumps(run))
        if not isinstance(found, dict):
            raise InputError(f"{path}, line 1: does not say which scoring this is; remove the file to score anew")
        for name in {**wanted, **found}:
            if found.get(name) != wanted.get(name):
                raise InputError(
                    f"{folder}: holds an unfinished scoring whose {shown(name)[1:-1]} is {shown(found.get(name))},"
                    f" not {shown(wanted.get(name))};"
                    " go on as it was begun, choose another --out, or remove the folder"
                )
        whole = [_piece(line) for line in lines[:-1]]  # after the last newline: nothing, or a line that was cut off
        pieces |= dict(piece for piece in whole if piece)
        if damaged := whole.count(None):
            print(f"{path}: {damaged} of {len(whole)} pieces are damaged and made again", file=sys.stderr)
    return pieces


def _piece(line: bytes) -> tuple[str, Any] | None:
    """A line's name and value; None where its checksum is not theirs."""
    try:
        name, value, checksum = parse_json(line, "piece")
        return (name, value) if checksum == _checksum(name, value) and isinstance(name, str) else None
    except (TypeError, ValueError):  # no JSON, or not three values
        return None


def _checksum(name: str, value: Any) -> int:
    return zlib.crc32(json.dumps([name, value]).encode())


class JournalWriter:
    """Appends pieces to a writer's own file, each flushed at once."""

    def __init__(self, folder: Path, run: dict[str, Any], writer: str) -> None:
        self.path, self.run = folder / f"{writer}.jsonl", run
        self.file: TextIO | None = None  # opened with the first piece: a run that has none to add leaves no trace

    def add(self, name: str, value: Any) -> None:
        with named(self.path):
            self.file = self.file or self._open()
            self.file.write(json.dumps([name, value, _checksum(name, value)]) + "\n")
            self.file.flush()

    def _open(self) -> TextIO:
        """Ready to append after the last whole line."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        whole = self.path.read_bytes().rfind(b"\n") + 1 if self.path.exists() else 0
        file = self.path.open("a")
        file.truncate(whole)
        if not whole:
            file.write(json.dumps(self.run) + "\n")
        return file
