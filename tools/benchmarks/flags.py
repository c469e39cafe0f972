# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Define the flags that several sections of ``tools/benchmark.py`` share."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any

from tools.benchmarks.shapes import DEVICE_DTYPES


def positive(text: str) -> int:
    """A flag's value that counts something."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not above 0")
    return value


def layers_x_heads(text: str) -> tuple[int, int]:
    layers, heads = map(positive, text.split("x"))
    if layers == 1:
        raise argparse.ArgumentTypeError("heads of a single layer have no heads to act through")
    return layers, heads


def number(p: argparse._ActionsContainer, flag: str, help: str, default: int | None = None, **kinds: Any) -> None:
    """Add a flag that counts something; ``nargs="+"`` makes it several."""
    p.add_argument(flag, type=positive, metavar="N", help=help, default=default, **kinds)


def several(p: argparse.ArgumentParser, flag: str, choices: Iterable[str], help: str) -> None:
    """Add a flag that takes some of the choices, all unless given."""
    p.add_argument(flag, nargs="+", choices=list(choices), default=list(choices), help=f"{help} (default: all)")


def add_heads(p: argparse.ArgumentParser) -> None:
    """The heads that a section times by themselves, and how often."""
    number(p, "--heads", "number of heads (default 4)", 4)
    number(p, "--head-dim", "channels of queries, keys and values (default 128)", 128)
    number(p, "--batch", "rows of a batch (default 1)", 1)
    add_repeats(p, 5)


def add_repeats(p: argparse.ArgumentParser, default: int) -> None:
    number(p, "--repeats", f"measurements, of which the median counts (default {default})", default)


def add_machine(p: argparse.ArgumentParser) -> None:
    """``--device`` and ``--dtype``, for ``measure.chosen_machine``."""
    p.add_argument(
        "--device", choices=tuple(DEVICE_DTYPES), help="where to measure (default: cuda if torch sees a GPU)"
    )
    p.add_argument("--dtype", choices=("float32", "bf16"), help="precision (default: float32 on a CPU, bf16 on a GPU)")


def add_profile(p: argparse.ArgumentParser) -> None:
    parts = "also print a table of the parts of everything that is timed, at the last length"
    p.add_argument("--profile", action="store_true", help=parts)
