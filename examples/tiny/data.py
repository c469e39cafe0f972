# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Write the data of the tiny teacher's students: Python's own sources with needles strewn in, and text without needles.

The files are align.bin and extend.bin with their .idx, train.txt to score heads and calibrate on, and held_out.txt to
evaluate on. A folder that has them stays as it is.

examples:
  python -m examples.tiny.data --out runs/studies/tiny/data0 --seed 0
"""

from __future__ import annotations

import argparse
from pathlib import Path

from hydra_mcore.commands import one_line_errors


@one_line_errors("data")
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the files")
    parser.add_argument("--seed", type=int, default=0, help="of the needles and their places (default 0)")
    args = parser.parse_args(argv)
    from examples.tiny.data_run import write_data  # takes seconds: not for --help
    from hydra_mcore.progress import Progress

    with Progress(total=1, desc="data", unit="step", position=0) as steps:
        write_data(args.out, args.seed, steps)


if __name__ == "__main__":
    main()
