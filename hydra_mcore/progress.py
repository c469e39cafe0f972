# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Progress of long work: a bar on a terminal, a line a minute in the log of a job."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

LINE_S = 60.0  # between two lines of a log
CURSOR_UP = "\x1b[A"


class Progress(tqdm):
    """tqdm's bar, written for a log where stderr is no terminal."""

    def __init__(self, *args: Any, **options: Any) -> None:
        if not sys.stderr.isatty():
            options |= {"file": _Lines(), "mininterval": LINE_S, "maxinterval": LINE_S, "miniters": 1}
        super().__init__(*args, **options)


class _Lines:
    """stderr, where each state of a bar is a line of its own, and what moves a cursor is left out."""

    def write(self, text: str) -> None:
        if state := text.replace(CURSOR_UP, "").strip():
            sys.stderr.write(f"{state}\n")

    def flush(self) -> None:
        sys.stderr.flush()
