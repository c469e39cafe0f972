# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Run a command as a user sees it end: in this process, or in one of its own."""

import contextlib
import io
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

from tests.support.paths import ROOT


def ended(main: Callable[[list[str]], Any], argv: Sequence[str]) -> tuple[Any, str]:
    """Exit status and stderr of a command's ``main``."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            main(list(argv))
        except SystemExit as stop:
            return stop.code or 0, said.getvalue()
    return 0, said.getvalue()


def training_ended(_rank: int, argv: Sequence[str]) -> tuple[Any, str]:
    """The same of training; a worker for ``run_ranks``."""
    from hydra_mcore.train.__main__ import main

    return ended(main, argv)


def printed(*command: object, path: str = str(ROOT), timeout: float = 280, **environment: str) -> str:
    """What a command prints, run by Python in a process of its own; it must succeed.

    Args:
        path: its PYTHONPATH.
    """
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout
