# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Tokens a second and memory of tools/prepare_data.py, beside the tokenizers library alone: the command itself, on real
text.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from tools.benchmarks.options import positive
from tools.benchmarks.report import Report

HELP = "tokens/s and memory of prepare_data, beside the tokenizers library alone"
EXAMPLES = """\
  tokens/s and memory of prepare_data beside the tokenizers library alone (minutes)
      python tools/benchmark.py data --tokenizers examples/tiny/teacher
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    whose = "folders with a tokenizer.json (default: one of 32768 words, trained on the text)"
    parser.add_argument("--tokenizers", nargs="+", type=Path, default=[], metavar="DIR", help=whose)
    size = "of text (Python's library) in the smaller corpus (default 8)"
    parser.add_argument("--megabytes", type=positive, default=8, metavar="N", help=size)
    parser.add_argument("--repeats", type=positive, default=3, metavar="N", help="the median counts (default 3)")
    parser.add_argument("--workers", type=positive, default=2, metavar="N", help="processes that tokenize (default 2)")


def run(args: argparse.Namespace) -> Report:
    from tools.benchmarks.prepared_data import COLUMNS, TIMES, rows

    notes = (
        f"Python's library as JSON Lines, {args.megabytes} MB and {TIMES}x as much; {args.workers} workers; speeds are"
        " tokens for each second of a core, those of reader and writer counted, without the start. Peak: resident"
        f" memory of the largest process. Median of {args.repeats}."
    )
    with tempfile.TemporaryDirectory() as folder:
        found = list(rows(args.tokenizers, args.megabytes, args.repeats, args.workers, Path(folder)))
    return Report("Preparing data", notes, COLUMNS, found)
