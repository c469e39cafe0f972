# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""What a scoring run has finished, kept line by line, so that a killed run goes on where it stopped.

A folder holds one ``*.jsonl`` file for each writer. Its first line says what the run is, every other line is one finished
piece, its name and its value. A last line that was cut off is no piece.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TextIO

from hydra_mcore.errors import InputError

Pieces = dict[str, Any]


def read_journal(folder: Path, run: dict[str, Any]) -> Pieces:
    """The finished pieces of a run, by name; none where the folder is missing.

    Args:
        run: JSON facts that must be equal for pieces to belong together.

    Raises:
        InputError: the folder holds pieces of another run; the first fact that differs is named.
    """
    pieces: Pieces = {}
    for path in sorted(folder.glob("*.jsonl")):
        head, *lines = path.read_text().split("\n")
        if not lines:  # killed before the first line was whole
            continue
        found, wanted = json.loads(head), json.loads(json.dumps(run))
        for name in {**found, **wanted}:
            if found.get(name) != wanted.get(name):
                raise InputError(
                    f"{folder}: holds an unfinished scoring whose {name} is {found.get(name)!r}, not {wanted.get(name)!r};"
                    " go on as it was begun, choose another --out, or remove the folder"
                )
        pieces |= dict(json.loads(line) for line in lines[:-1])  # after the last newline: nothing, or a line that was cut off
    return pieces


class JournalWriter:
    """Appends pieces to a writer's own file, each flushed at once."""

    def __init__(self, folder: Path, run: dict[str, Any], writer: str) -> None:
        self.path, self.run = folder / f"{writer}.jsonl", run
        self.file: TextIO | None = None  # opened with the first piece: a run that has none to add leaves no trace

    def add(self, name: str, value: Any) -> None:
        self.file = self.file or self._open()
        self.file.write(json.dumps([name, value]) + "\n")
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
