#!/usr/bin/env python3
# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Choose the base of a checkpoint's log-position scale by its loss on long held-out text."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hydra_mcore.commands import check_inputs, one_line_errors
from tools.layout_flags import add_dtype_flag, add_layout_flags  # light, so that --help is quick

EXAMPLES = """\
How it works: FA heads multiply the query of token t by ln(t + a) / ln(a). The weights do not depend on a. So the same
windows of text are run with several bases a and without the scale, and the least loss wins. The candidates are tried
first, and more of them while the best is at their end. Golden sections between the neighbours of the best one follow.
Windows should be longer than the sequences of training, and come from long documents. In a row of short documents, late
tokens gain nothing from a long context.

Written to --out: log_scale.md, log_scale.png, log_scale.json. Without --write the checkpoint stays as it is.

examples:
  which a suits the student at 64K tokens?
      python tools/tune_log_scale.py --checkpoint runs/a/extend --text books.txt --length 65536 --out runs/a/log_scale
  the same on eight GPUs, and put it into the checkpoint's model.json
      torchrun --nproc-per-node 8 tools/tune_log_scale.py --checkpoint runs/a/extend --text books.txt \\
          --length 65536 --dtype bf16 --context-parallel-size 8 --out runs/a/log_scale --write
"""


def parser() -> argparse.ArgumentParser:
    layout = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(prog="tune_log_scale", description=__doc__, epilog=EXAMPLES, formatter_class=layout)
    p.add_argument("--checkpoint", type=Path, required=True, metavar="DIR", help="a student's checkpoint")
    p.add_argument(
        "--text", type=Path, required=True, metavar="FILE", help="UTF-8 text that the model was not trained on"
    )
    p.add_argument("--length", type=int, required=True, metavar="N", help="tokens of a window, more than in training")
    p.add_argument(
        "--windows",
        type=int,
        default=16,
        metavar="K",
        help="number of windows, from the beginning of the text (default 16)",
    )
    grid = "bases to begin with, in tokens. The checkpoint's own is tried too (default: 50 to 5000 in seven steps)"
    p.add_argument("--candidates", type=float, nargs="+", metavar="A", help=grid)
    p.add_argument("--out", type=Path, metavar="DIR", help="folder for table, figure and JSON")
    p.add_argument("--write", action="store_true", help="put the choice into the checkpoint's model.json")
    machine = p.add_argument_group("machine")
    add_dtype_flag(machine, "float32")
    add_layout_flags(machine, "the windows", "a window")
    return p


@one_line_errors("tune_log_scale")
def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    check_inputs(checkpoint=args.checkpoint, text=args.text)
    from tools.commands.tune_log_scale import run  # takes seconds: not for --help

    run(args)


if __name__ == "__main__":
    main()
