# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""How fast evaluation makes prompts, and how fast models read them.

Sets are made as evaluation makes them, without a cache; random models of the tiny teacher's shape run as evaluation
runs them.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

from tools.benchmarks.options import positive
from tools.benchmarks.report import Report

HELP = "prompts/s of the generators by task, time a token of models, by length"
EXAMPLES = """\
  how fast evaluation makes prompts, and how fast models read them (minutes)
      python tools/benchmark.py evaluation --lengths 4096 131072 1048576 --read 4096 65536
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    whose = "folder with a tokenizer (default: one of 32768 words, trained on the text)"
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help=whose)
    lengths = [4096, 32_768, 131_072]
    parser.add_argument(
        "--lengths", nargs="+", type=positive, default=lengths, metavar="N", help="tokens (default 4096 32768 131072)"
    )
    parser.add_argument(
        "--prompts", type=positive, default=10, metavar="N", help="of each task and length (default 10)"
    )
    read = [2**power for power in range(12, 17)]
    parser.add_argument(
        "--read",
        nargs="+",
        type=positive,
        default=read,
        metavar="N",
        help="tokens that models read (default 4096 ... 65536)",
    )


def run(args: argparse.Namespace) -> Report:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from tools.benchmarks.prompts import prompt_rows, reading_rows

    with tempfile.TemporaryDirectory() as folder:
        speeds = list(prompt_rows(args.tokenizer, args.lengths, args.prompts, Path(folder)))
    notes = "4 layers x 8 heads of 16 channels: flat where time is linear in length."
    columns = ("model", *map(str, args.read), "last / first")
    reading = Report("Microseconds a token of one prompt", notes, columns, list(reading_rows(args.read)))
    notes = f"{args.prompts} of each task and length."
    return Report("Prompts a second of one core", notes, ("task", *map(str, args.lengths)), speeds, more=(reading,))
