# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Run a command in this process, as a user sees it end."""

import contextlib
import io
from collections.abc import Callable, Sequence
from typing import Any


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
