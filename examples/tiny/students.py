# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Make, train and evaluate the demo's students with the project's own commands."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra_mcore.commands import end_with_parent, python_command
from hydra_mcore.progress import Progress
from hydra_mcore.selection.choose import SCORED
from tools.studies.launch import end_of, environment, run_logged, trained

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RECIPE = HERE / "recipe.yaml"
# Prompts of other evaluation seeds were looked at while teacher and recipe were made.
EVALUATION_SEED = 2_000_000
# Sequences a step, as the recipe has them.
BATCH = {"align": 8, "distill": 8, "extend": 4}
# As the studies' frame (examples/studies/tiny/base.yaml); the layer's default is a convolution of 4.
LAYER = ("--gdn-conv-kernel", "0")
# At 15:1 the senders, which this teacher has in its first layer, would take both places (docs/LOG.md).
SCORED_FOR = ["--roles", "receiver", "--capabilities", "retrieval", "--knock-out", "0"]


@dataclass(frozen=True)
class Student:
    """A student: which heads keep full attention, and how far it is trained."""

    name: str
    ratio: str
    strategy: str
    stages: tuple[str, ...] = ("align", "distill")

    @property
    def scored(self) -> bool:
        return self.strategy in SCORED


def run_command(out: Path, log: str, *words: object, ranks: int = 1) -> None:
    """Run one of the project's commands, its output in <out>/logs; a failure shows the end of it and ends the run."""
    path = out / "logs" / f"{log}.log"
    if code := run_logged(python_command(words, ranks), environment(2), path):
        fail(path, code)


def fail(path: Path, code: int) -> None:
    sys.exit(f"a step failed (exit status {code}), its output is in {path}:\n{end_of(path)}")


def prepare(out: Path, seed: int, steps: Progress) -> None:
    """Import the teacher and score its heads, for all students of the run."""
    teacher = ("--hf", HERE / "teacher", "--out", out / "teacher")
    run_command(out, "import", "tools/convert.py", "import", *teacher, "--skip-existing")
    steps.update()
    run_command(out, "scores", *_select(out, seed), "--text", out / "train.txt", "--out", out / "scores")
    steps.update()


def _select(out: Path, seed: int) -> tuple[object, ...]:
    return ("tools/select_heads.py", "--teacher", out / "teacher", "--seed", seed, *SCORED_FOR, "--skip-existing")


def make_student(out: Path, student: Student, seed: int) -> None:
    """Choose the heads of a student and give it the teacher's weights."""
    place = folder(out, student)
    choice = ("--ratio", student.ratio, "--strategy", student.strategy)
    known = ("--scores", out / "scores" / "scores.json") if student.scored else ()
    run_command(out, slug(student), *_select(out, seed), *choice, *known, "--out", place / "heads")
    hybridize = ("hybridize", "--teacher", out / "teacher", "--head-map", place / "heads" / "head_map.json", *LAYER)
    calibration = ("--text", out / "train.txt", "--seed", seed)
    to = ("--out", place / "student", "--skip-existing")
    run_command(out, slug(student), "tools/convert.py", *hybridize, *calibration, *to)


def folder(out: Path, student: Student) -> Path:
    return out / slug(student)


def slug(student: Student) -> str:
    return student.name.replace(" ", "-").replace(":", "to")


def train_all(out: Path, student: Student, ranks: int, position: int) -> None:
    """All stages of a student."""
    for stage in student.stages:
        train(out, student, stage, ranks, position)


def train(out: Path, student: Student, stage: str, ranks: int, position: int) -> None:
    """One stage of one student, its steps shown as they are logged, in a line of their own."""
    place, data = folder(out, student), out / ("extend" if stage == "extend" else "align")
    if trained(place / stage, [RECIPE]):
        return
    words = ["-m", "hydra_mcore.train", "--stage", stage, "--config", RECIPE]
    words += ["--run-dir", place, "--teacher", out / "teacher", "--data-path", data]
    words += ["--data-cache-path", place / "cache", "--micro-batch-size", BATCH[stage] // ranks]
    path = out / "logs" / f"{slug(student)}-{stage}.log"
    with (
        path.open("w") as sink,
        Progress(desc=f"{student.name} {stage}", unit="step", position=position, leave=False) as bar,
    ):
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        own = {"cwd": ROOT, "env": environment(2), "preexec_fn": end_with_parent}
        process = subprocess.Popen(python_command(words, ranks), **own, **pipes)
        for line in process.stdout:
            sink.write(line)
            if found := re.search(r"iteration\s+(\d+)/\s*(\d+).*?loss: ([\d.E+-]+)", line):
                bar.total, bar.n = int(found[2]), int(found[1])
                bar.set_postfix_str(f"loss {float(found[3]):.3f}")
        code = process.wait()
    # a stage that a Ctrl-C has stopped ends well, but the next one is not to follow
    if code or not trained(place / stage, [RECIPE]):
        fail(path, code)


def evaluate(out: Path, models: Sequence[str], seed: int, *asked: object, ranks: int = 1) -> None:
    """Let models (NAME=DIR) answer prompts in held-out text."""
    prompts = ("--text", out / "held_out.txt", "--seed", EVALUATION_SEED + seed, "--cache", out / "prompts")
    words = ("tools/evaluate.py", "--models", *models, *prompts, *asked, "--out", out / "evaluation")
    run_command(out, "evaluate", *words, ranks=ranks)
