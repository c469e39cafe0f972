# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Far beyond the native length, 512 to 32K tokens: the tiny teacher, the teacher with YaRN, and three students.

All students keep 8 of 32 heads and go through all three stages. They differ in which heads: those with the highest
causal scores, random ones, or all heads of one layer, as layer-wise hybrids have it. Runs the project's own commands,
in half an hour to an hour on two cores. A run that was stopped goes on when the same command is given again.

examples:
  python -m examples.tiny.long_context
  python -m examples.tiny.long_context --out runs/long1 --seed 1
  several seeds as one table and one figure
      python -m examples.tiny.long_context --summary runs/long runs/long1 runs/long2
"""

from __future__ import annotations

import argparse
from pathlib import Path

from hydra_mcore.commands import one_line_errors

ROOT = Path(__file__).resolve().parents[2]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="long_context", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "runs" / "long", metavar="DIR", help="folder of the run (default runs/long)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of data, head selection, random map and prompts (default 0)"
    )
    summary = "print the table of finished runs and write DIR/long_context.png of the first, instead of a run"
    parser.add_argument("--summary", nargs="+", type=Path, metavar="DIR", help=summary)
    return parser.parse_args(argv)


@one_line_errors("long_context")
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    from examples.tiny.long_context_run import run  # takes seconds: not for --help

    run(args)


if __name__ == "__main__":
    main()
