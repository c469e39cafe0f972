#!/usr/bin/env python3
# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Find out whether a choice matters: make, train and evaluate variants of a recipe alike, and compare their scores."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hydra_mcore.commands import check_inputs, one_line_errors
from hydra_mcore.costs.machine import GPUS  # facts only, so that --help is quick

EXAMPLES = """\
A study is a YAML file. It names recipes, what each variant lays over them, and seeds. docs/studies.md describes it.

run makes what is missing. For each seed it makes the teacher, the scores of its heads and its evaluation. Then it makes
each variant's heads, student, stages and evaluation. After a kill, the same command continues. table prints the results
of what is finished.

examples:
  python tools/study.py run examples/studies/smollm2/selection.yaml --dry-run
  python tools/study.py run examples/studies/qwen3-1.7b/selection.yaml --dry-run --gpus 8
  python tools/study.py run examples/studies/smollm2/selection.yaml --jobs 2
  python tools/study.py run examples/studies/smollm2/selection.yaml --only "random 3:1"
  python tools/study.py table examples/studies/smollm2/selection.yaml --csv study.csv
"""


def parser() -> argparse.ArgumentParser:
    layout = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(prog="study", description=__doc__, epilog=EXAMPLES, formatter_class=layout)
    commands = p.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="make, train and evaluate what is not finished", formatter_class=layout)
    run.add_argument("study", type=Path, metavar="FILE", help="the study's YAML file")
    run.add_argument("--only", nargs="+", default=[], metavar="VARIANT", help="run these variants alone (default: all)")
    run.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="number of variants that run side by side (default 1)"
    )
    run.add_argument("--ranks", type=int, default=1, metavar="N", help="processes of each command (default 1)")
    run.add_argument("--dry-run", action="store_true", help="say what is left to do, and stop")
    planned = "with --dry-run, also say how many hours training takes on N GPUs, by the formulas of tools/plan.py"
    run.add_argument("--gpus", type=int, metavar="N", help=planned)
    kinds = f"kind of GPU: {', '.join(GPUS)} (default h100-80gb)"
    run.add_argument("--gpu", default="h100-80gb", metavar="NAME", help=kinds)
    steps = commands.add_parser("steps", help="print the commands of a job, for slurm/study.sh", formatter_class=layout)
    steps.add_argument("study", type=Path, metavar="FILE", help="the study's YAML file")
    which = '"shared", or the number of a job, from 0 on: each variant with each seed is one'
    steps.add_argument("--job", required=True, metavar="JOB", help=which)
    table = commands.add_parser(
        "table", help="print what is finished as tables, and draw a figure", formatter_class=layout
    )
    table.add_argument("study", type=Path, metavar="FILE", help="the study's YAML file")
    table.add_argument("--csv", type=Path, metavar="FILE", help="write every number to this file")
    table.add_argument(
        "--figure",
        type=Path,
        metavar="FILE",
        help="draw a PNG: curves against length, or differences to the base where there are more than ten rows",
    )
    return p


@one_line_errors("study")
def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    check_inputs(study=args.study)
    from tools.commands.study import run  # takes seconds: not for --help

    run(args)


if __name__ == "__main__":
    main()
