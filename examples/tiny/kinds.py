# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Kinds of linear heads beside full attention, 512 to 4K tokens: the same choices of heads with each kind.

For every kind five students of the tiny teacher: one head in four kept (3:1) by causal score, at random or as a whole
layer, one in eight (7:1) by causal score or at random. All are trained alike and answer the same prompts. Runs the
project's own commands, two students at a time on one core each; --dry-run says how long that takes. A run that was
stopped goes on when the same command is given again: finished students stay, a stage that was cut short begins anew.

examples:
  python -m examples.tiny.kinds --dry-run
  python -m examples.tiny.kinds --out runs/kinds1 --seed 1
  one kind of heads alone; the others can follow into the same folder
      python -m examples.tiny.kinds --kinds gdn
  several seeds as tables and one figure
      python -m examples.tiny.kinds --summary runs/kinds runs/kinds1 runs/kinds2
  a trial with less training, given by keys such as "align: {train-iters: 50}"
      python -m examples.tiny.kinds --out runs/trial --recipe shorter.yaml --prompts 4
"""

from __future__ import annotations

import argparse
from pathlib import Path

from hydra_mcore.commands import one_line_errors
from hydra_mcore.selection.choose import linear_kinds

ROOT = Path(__file__).resolve().parents[2]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="kinds", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "runs" / "kinds",
        metavar="DIR",
        help="folder of the run (default runs/kinds)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of data, head selection, random maps and prompts (default 0)"
    )
    linear = linear_kinds()
    parser.add_argument(
        "--kinds", nargs="+", choices=linear, default=linear, help=f"linear heads (default {' '.join(linear)})"
    )
    over = "YAML laid over examples/tiny/recipe.yaml, for all students alike (default examples/tiny/kinds.yaml)"
    parser.add_argument(
        "--recipe", type=Path, default=ROOT / "examples" / "tiny" / "kinds.yaml", metavar="FILE", help=over
    )
    parser.add_argument(
        "--prompts", type=int, default=20, metavar="N", help="evaluation prompts for each task and length (default 20)"
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would be run and how long it takes, and stop")
    summary = "print the tables of finished runs and write DIR/kinds.png of the first, instead of a run"
    parser.add_argument("--summary", nargs="+", type=Path, metavar="DIR", help=summary)
    return parser.parse_args(argv)


@one_line_errors("kinds")
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    from examples.tiny.kinds_run import run  # takes seconds: not for --help

    run(args)


if __name__ == "__main__":
    main()
