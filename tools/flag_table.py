#!/usr/bin/env python3
# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Write docs/flags.md, which says what each of Megatron's flags does in the stages."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hydra_mcore.commands import one_line_errors

EXAMPLES = """\
The page comes from two tables. hydra_mcore/train/flags.py holds the flags that training refuses.
tools/commands/flag_table.py lists those that were judged to work. A flag in neither table is an error. Read in Megatron
what it does, then put it into one of them.

examples:
  after a table was changed
      python tools/flag_table.py --out docs/flags.md
  is the page up to date?
      python tools/flag_table.py | diff - docs/flags.md
"""


def parser() -> argparse.ArgumentParser:
    layout = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(prog="flag_table", description=__doc__, epilog=EXAMPLES, formatter_class=layout)
    p.add_argument("--out", type=Path, metavar="FILE", help="file that gets the page (default: print it)")
    return p


@one_line_errors("flag_table")
def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    from tools.commands.flag_table import run  # takes seconds: not for --help

    run(args)


if __name__ == "__main__":
    main()
