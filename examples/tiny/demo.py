# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Run the whole pipeline on the tiny teacher.

Its steps are import, select, hybridize, align, distill, extend, evaluate, export and report. The project's own
commands run one after the other. <out>/report.md tells what they found. This takes about five minutes on two cores.

examples:
  python -m examples.tiny.demo
  python -m examples.tiny.demo --out runs/seed1 --seed 1 --prompts 200
"""

from __future__ import annotations

import argparse
from pathlib import Path

from hydra_mcore.commands import one_line_errors, sole_writer

ROOT = Path(__file__).resolve().parents[2]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "runs" / "demo", metavar="DIR", help="folder of the run (default runs/demo)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of data, head selection and random maps (default 0)")
    parser.add_argument(
        "--prompts", type=int, default=20, metavar="N", help="evaluation prompts for each task and length (default 20)"
    )
    return parser.parse_args(argv)


@one_line_errors("demo")
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    from examples.tiny.demo_run import run  # takes seconds: not for --help

    with sole_writer(args.out):
        run(args)


if __name__ == "__main__":
    main()
