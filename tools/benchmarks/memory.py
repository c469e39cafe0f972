# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Peak memory a token of align and distill, beside end-to-end backpropagation of the same model."""

from __future__ import annotations

import argparse

from tools.benchmarks.options import positive
from tools.benchmarks.report import Report

HELP = "peak memory a token of align and distill, beside end-to-end backpropagation"
EXAMPLES = """\
  peak memory of align and distill beside end-to-end backpropagation (a minute, a small model)
      python tools/benchmark.py memory
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--lengths", nargs=2, type=positive, default=[1024, 2048], metavar="N", help="tokens (default 1024 2048)"
    )


def run(args: argparse.Namespace) -> Report:
    from tools.benchmarks.training_memory import ROWS, bytes_per_token

    found = bytes_per_token(tuple(args.lengths))
    whole = found["end to end"]
    rows = [[title, f"{found[name] / 1024:.1f}", f"{found[name] / whole:.2f}"] for name, title in ROWS.items()]
    notes = f"Growth from {args.lengths[0]} to {args.lengths[1]} tokens, float32; what the weights take cancels."
    return Report("Peak memory of one micro-batch", notes, ("one micro-batch", "KiB a token", "of end to end"), rows)
