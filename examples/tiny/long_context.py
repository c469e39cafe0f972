# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Far beyond the native length, 512 to 32K tokens: the tiny teacher, the teacher with YaRN, and three kinds of students.

All students keep 8 of 32 heads and go through all three stages; what differs is which heads: those with the highest causal
scores, random ones, or all heads of one layer, as layer-wise hybrids have it. Runs the project's own commands; about half an
hour on two cores, and an evaluation that was stopped goes on where it was.

examples:
  python -m examples.tiny.long_context
  python -m examples.tiny.long_context --out runs/long1 --seed 1
"""

from __future__ import annotations

import argparse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from examples.tiny.demo import ROOT, Student, folder, make_students, train_all, write_data

STAGES = ("align", "distill", "extend")
STUDENTS = (
    Student("selected 3:1", "3:1", "global_c", STAGES),
    Student("random 3:1", "3:1", "global_random", STAGES),
    Student("layer-wise 3:1", "3:1", "hybrid", STAGES),
)
# Prompts a task: fewer where one takes seconds.
LENGTHS = {40: (512, 1024, 2048, 4096), 12: (8192, 16384), 6: (32768,)}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="long_context", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "long", metavar="DIR", help="folder of the run (default runs/long)")
    parser.add_argument("--seed", type=int, default=0, help="of data, head selection, random map and prompts (default 0)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    trained = [folder(args.out, student) / student.stages[-1] for student in STUDENTS]
    with tqdm(total=4 + len(STUDENTS) + len(LENGTHS), desc="long context", unit="step", position=0) as steps:
        if not all((path / "latest_checkpointed_iteration.txt").exists() for path in trained):
            args.out.mkdir(parents=True)
            write_data(args.out, args.seed, steps)
            make_students(args.out, STUDENTS, args.seed, steps)
            with ThreadPoolExecutor(2) as pool:
                for done in [pool.submit(train_all, args.out, student, 1, place) for place, student in enumerate(STUDENTS, 1)]:
                    done.result()
                    steps.update()


if __name__ == "__main__":
    main()
