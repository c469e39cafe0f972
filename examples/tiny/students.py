# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Students of the tiny teacher, made and trained by the project's own commands (for demo and long_context)."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
# Prompts of other evaluation seeds were looked at while teacher and recipe were made.
EVALUATION_SEED = 2_000_000
# Sequences a step, as the recipe has them.
BATCH = {"align": 8, "distill": 8, "extend": 4}
# Trials at this size learned without the short convolution; it stays the default of the layer.
LAYER = ["--gdn-conv-kernel", "0"]
# At 15:1 the senders, which this teacher has in its first layer, would take both places (docs/LOG.md).
SCORED_FOR = ["--roles", "receiver", "--capabilities", "retrieval", "--knock-out", "0"]


@dataclass(frozen=True)
class Student:
    """A student of the demo: how its heads are chosen and how far it is trained."""

    name: str
    ratio: str
    strategy: str
    stages: tuple[str, ...] = ("align", "distill")

    @property
    def scored(self) -> bool:
        return self.strategy in ("global", "global_c")


def run_command(out: Path, log: str, *command: str) -> None:
    """Run one of the project's commands, its output in <out>/logs; a failure shows the end of it and stops the demo."""
    path = out / "logs" / f"{log}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as sink:
        sink.write(f"$ {' '.join(command)}\n")
        sink.flush()
        code = subprocess.run(
            [sys.executable, *command], cwd=ROOT, env=environment(), stdout=sink, stderr=sink, check=False
        ).returncode
    if code:
        fail(path, code)


def environment() -> dict[str, str]:
    """One thread a process: two processes share two cores, and waiting threads would steal from the other."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "WANDB_MODE": "offline"}


def fail(path: Path, code: int) -> None:
    tail = "\n".join(path.read_text(errors="replace").splitlines()[-15:])
    sys.exit(f"demo: a step failed (exit status {code}), its output is in {path}:\n{tail}")


def make_students(out: Path, students: Sequence[Student], seed: int, steps: tqdm) -> None:
    """Import the teacher, score its heads once, for the first student, and make a student for each choice of heads."""
    run_command(
        out, "import", "tools/convert.py", "import", "--hf", str(HERE / "teacher"), "--out", str(out / "teacher")
    )
    steps.update()
    select = ("tools/select_heads.py", "--teacher", str(out / "teacher"), "--seed", str(seed), *SCORED_FOR)
    scores = str(folder(out, students[0]) / "heads" / "scores.json")

    def make(student: Student) -> None:
        heads = folder(out, student) / "heads"
        choice = ("--ratio", student.ratio, "--strategy", student.strategy, "--out", str(heads))
        first = ("--haystack", str(out / "train.txt")) if student is students[0] else ("--scores", scores)
        known = first if student.scored else ()
        run_command(out, slug(student), *select, *choice, *known)
        hybridize = (
            "tools/convert.py",
            "hybridize",
            "--teacher",
            str(out / "teacher"),
            "--heads",
            str(heads / "head_map.json"),
        )
        calibration = ("--calibration-text", str(out / "train.txt"), "--seed", str(seed))
        run_command(
            out, slug(student), *hybridize, *calibration, *LAYER, "--out", str(folder(out, student) / "student")
        )

    make(students[0])  # its scores serve the others
    steps.update()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(make, students[1:]))
    steps.update()


def folder(out: Path, student: Student) -> Path:
    return out / slug(student)


def slug(student: Student) -> str:
    return student.name.replace(" ", "-").replace(":", "to")


def train_all(out: Path, student: Student, ranks: int, position: int) -> None:
    for stage in student.stages:
        train(out, student, stage, ranks, position)


def train(out: Path, student: Student, stage: str, ranks: int, position: int) -> None:
    """One stage of one student, its steps shown as they are logged."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    data = out / ("extend" if stage == "extend" else "align")
    command = [
        sys.executable,
        *launcher,
        "-m",
        "hydra_mcore.train",
        "--stage",
        stage,
        "--config",
        str(HERE / "recipe.yaml"),
    ]
    command += ["--run-dir", str(folder(out, student)), "--teacher", str(out / "teacher"), "--data-path", str(data)]
    command += [
        "--data-cache-path",
        str(folder(out, student) / "cache"),
        "--micro-batch-size",
        str(BATCH[stage] // ranks),
    ]
    path = out / "logs" / f"{slug(student)}-{stage}.log"
    with (
        path.open("w") as sink,
        tqdm(desc=f"{student.name} {stage}", unit="step", position=position, leave=False) as bar,
    ):
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for line in process.stdout:
            sink.write(line)
            if found := re.search(r"iteration\s+(\d+)/\s*(\d+).*?loss: ([\d.E+-]+)", line):
                bar.total, bar.n = int(found[2]), int(found[1])
                bar.set_postfix_str(f"loss {float(found[3]):.3f}")
        code = process.wait()
        if code or bar.n < (
            bar.total or 0
        ):  # a stage that a Ctrl-C has stopped ends well, but the next one is not to follow
            fail(path, code)
