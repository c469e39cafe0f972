# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Run the demo's steps, from the flags of ``examples/tiny/demo.py``."""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import sys
import time
from functools import partial
from pathlib import Path
from threading import Event

from examples.tiny.data_run import write_data
from examples.tiny.demo_report import write_report
from examples.tiny.students import (
    Student,
    evaluate,
    folder,
    make_student,
    prepare,
    run_command,
    train_all,
)
from hydra_mcore.progress import Progress
from tools.studies.launch import side_by_side

STUDENTS = (
    Student("selected 3:1", "3:1", "global_c", ("align", "distill", "extend")),
    Student("random 3:1", "3:1", "global_random"),
)


def run(args: argparse.Namespace) -> None:
    if args.out.exists():
        if not (args.out / "report.md").exists() and not (args.out / "teacher").exists():
            sys.exit(f"demo: {args.out} is not empty and no demo of ours; choose another --out")
        shutil.rmtree(args.out)
    begin = time.monotonic()
    with Progress(total=6 + len(STUDENTS), desc="demo", unit="step", position=0) as steps:
        write_data(args.out, args.seed, steps)
        prepare(args.out, args.seed, steps)
        train_students(args, steps)
        examine(args, steps)
        hf_dir = export(args.out, steps)
    write_report(args.out, STUDENTS, time.monotonic() - begin)
    print((args.out / "report.md").read_text().split("\n## ")[0])
    print(f"report: {args.out / 'report.md'}")
    print(f"model for transformers: {hf_dir}")


def train_students(args: argparse.Namespace, steps: Progress) -> None:
    """Align and distill side by side, a core each; then the first goes on to longer sequences, on two ranks."""
    short = [dataclasses.replace(student, stages=("align", "distill")) for student in STUDENTS]
    side_by_side([partial(make_and_train, args, student, place) for place, student in enumerate(short, 1)], 2)
    steps.update(len(short))
    train_all(args.out, STUDENTS[0], ranks=2, position=1)
    steps.update()


def make_and_train(args: argparse.Namespace, student: Student, position: int, stop: Event) -> None:
    make_student(args.out, student, args.seed)
    if not stop.is_set():
        train_all(args.out, student, 1, position)


def examine(args: argparse.Namespace, steps: Progress) -> None:
    """Teacher and students answer the same prompts, at the native length and at twice that."""
    models = [f"teacher={args.out / 'teacher'}"]
    models += [
        f"{student.name}, {student.stages[-1]}={folder(args.out, student) / student.stages[-1]}" for student in STUDENTS
    ]
    steps.set_postfix_str("evaluating")
    asked = ("--lengths", 512, 1024, "--prompts", args.prompts)
    evaluate(args.out, models, args.seed, *asked, ranks=2)
    steps.update()


def export(out: Path, steps: Progress) -> Path:
    """The student that went through all stages as a Hugging Face directory, with the evaluation in its model card."""
    student = folder(out, STUDENTS[0])
    report = ("--evaluation", str(out / "evaluation" / "report.md"))
    checkpoint = ("--checkpoint", str(student / STUDENTS[0].stages[-1]))
    run_command(out, "export", "tools/convert.py", "export", *checkpoint, *report, "--out", str(student / "hf"))
    steps.update()
    return student / "hf"
