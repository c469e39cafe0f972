# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Progress of long work: a bar on a terminal, a line a minute in the log of a job."""

from __future__ import annotations

import sys
import threading
from typing import Any

from tqdm import tqdm

LINE_S = 60.0  # between two lines of a log
CURSOR_UP = "\x1b[A"


class Progress(tqdm):
    """tqdm's bar. Where stderr is no terminal it is a line at the beginning, every ``LINE_S`` seconds, and at the end.

    A thread writes the lines, so that they come while one step takes long, too.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        self._closed = threading.Event()
        self._in_log = self._began = False
        if not sys.stderr.isatty():
            self._in_log = True
            options |= {"file": _Lines(), "miniters": 1}
        super().__init__(*args, **options)
        self._began = True
        if self._in_log and not self.disable:
            threading.Thread(target=self._write_lines, daemon=True).start()

    def refresh(self, *args: Any, **options: Any) -> Any:
        """Show the state now; in a log only the first call does, and the thread."""
        if not (self._in_log and self._began):
            return super().refresh(*args, **options)
        return None

    def close(self) -> None:
        self._closed.set()
        super().close()

    def _write_lines(self) -> None:
        while not self._closed.wait(LINE_S):
            super().refresh()


class _Lines:
    """stderr, where each state of a bar is a line of its own, and what moves a cursor is left out."""

    def write(self, text: str) -> None:
        if state := text.replace(CURSOR_UP, "").strip():
            sys.stderr.write(f"{state}\n")

    def flush(self) -> None:
        sys.stderr.flush()
