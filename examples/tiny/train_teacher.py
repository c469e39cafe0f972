# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Train the tiny teacher: a Qwen3 model of about one million parameters that finds needles.

Run it from the repository's root. It takes about an hour on one core:

    python -m examples.tiny.train_teacher --output examples/tiny/teacher

curriculum.py plans it, and docs/LOG.md tells why. Values that the sequence has shown before are supervised in full.
Text has a smaller weight.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from examples.tiny.curriculum import EVALUATION_SEED, STEPS
from hydra_mcore.commands import one_line_errors


@one_line_errors("train_teacher")
def main() -> None:
    """Parse the command line, train, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        epilog="example: python -m examples.tiny.train_teacher --output runs/teacher --state runs/teacher.state",
    )
    parser.add_argument("--output", type=Path, default=Path("examples/tiny/teacher"), help="Hugging Face folder")
    parser.add_argument(
        "--state",
        type=Path,
        default=Path("work/tiny_teacher.pt"),
        help="training state: a run goes on from it if it exists",
    )
    parser.add_argument("--steps", type=int, default=STEPS, help="stop after so many steps")
    parser.add_argument("--seed", type=int, default=0, help="0 to 999999")
    parser.add_argument("--text-tokens", type=int, default=2_000_000, help="tokens of real text to train on")
    parser.add_argument("--report", type=int, default=100, help="steps between reports and saves")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--prompts", type=int, default=200, help="prompts a task in the table")
    args = parser.parse_args()
    if not 0 <= args.seed < EVALUATION_SEED:
        parser.error(f"--seed must be 0 to {EVALUATION_SEED - 1}: evaluation has the rest")
    from examples.tiny.teacher_training import run  # takes seconds: not for --help

    run(args)


if __name__ == "__main__":
    main()
