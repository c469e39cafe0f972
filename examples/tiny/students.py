# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Students of the tiny teacher, made, trained and examined by the project's own commands.

For demo, long_context and kinds. Every step can be given again: what is finished is not made anew.
"""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from threading import Event

from tqdm import tqdm

from hydra_mcore.config import HydraOptions
from hydra_mcore.kinds import DEFAULT_LINEAR
from hydra_mcore.recipe import Recipe
from hydra_mcore.selection.choose import SCORED
from tools.studies.launch import end_of

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RECIPE = HERE / "recipe.yaml"
NEWEST = "latest_checkpointed_iteration.txt"  # Megatron's, with the step of the newest whole checkpoint
# Prompts of other evaluation seeds were looked at while teacher and recipe were made.
EVALUATION_SEED = 2_000_000
# Sequences a step, as the recipe has them.
BATCH = {"align": 8, "distill": 8, "extend": 4}
# Trials at this size learned without the short convolution; it stays the default of the layer.
CONVOLUTIONS = [field.name for field in dataclasses.fields(HydraOptions) if field.name.endswith("_conv_kernel")]
LAYER = [f"--{name.replace('_', '-')}=0" for name in CONVOLUTIONS]
# At 15:1 the senders, which this teacher has in its first layer, would take both places (docs/LOG.md).
SCORED_FOR = ["--roles", "receiver", "--capabilities", "retrieval", "--knock-out", "0"]


@dataclass(frozen=True)
class Student:
    """A student: which heads keep full attention, of which kind the others are, how far it is trained."""

    name: str
    ratio: str
    strategy: str
    stages: tuple[str, ...] = ("align", "distill")
    kind: str = DEFAULT_LINEAR

    @property
    def scored(self) -> bool:
        return self.strategy in SCORED


def run_command(out: Path, log: str, *command: object) -> None:
    """Run one of the project's commands, its output in <out>/logs; a failure shows the end of it and ends the run."""
    path = out / "logs" / f"{log}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    words = [str(word) for word in command]
    with path.open("a") as sink:
        sink.write(f"$ {' '.join(words)}\n")
        sink.flush()
        code = subprocess.run(
            [sys.executable, *words], cwd=ROOT, env=environment(), stdout=sink, stderr=sink, check=False
        ).returncode
    if code:
        fail(path, code)


def environment() -> dict[str, str]:
    """One thread a process: two processes share two cores, and waiting threads would steal from the other."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "WANDB_MODE": "offline"}


def launcher(ranks: int) -> list[object]:
    """What starts a command on several ranks."""
    return ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks] if ranks > 1 else []


def fail(path: Path, code: int) -> None:
    sys.exit(f"a step failed (exit status {code}), its output is in {path}:\n{end_of(path)}")


def side_by_side(jobs: Sequence[Callable[[int], None]], steps: tqdm | None = None) -> None:
    """Two jobs at a time, each given its line on the screen; after one that fails, or a Ctrl-C, no other begins."""
    places: SimpleQueue[int] = SimpleQueue()
    for place in (1, 2):
        places.put(place)
    stop = Event()

    def placed(job: Callable[[int], None]) -> None:
        place = places.get()
        try:
            if not stop.is_set():
                job(place)
        except BaseException:
            stop.set()  # here, as this thread takes the next job at once
            raise
        finally:
            places.put(place)

    with ThreadPoolExecutor(2) as pool:
        try:
            for done in as_completed([pool.submit(placed, job) for job in jobs]):
                done.result()
                if steps is not None:
                    steps.update()
        finally:
            stop.set()


def prepare(out: Path, seed: int, steps: tqdm) -> None:
    """Import the teacher and score its heads, for all students of the run."""
    teacher = ("--hf", HERE / "teacher", "--out", out / "teacher")
    run_command(out, "import", "tools/convert.py", "import", *teacher, "--skip-existing")
    steps.update()
    run_command(out, "scores", *_select(out, seed), "--haystack", out / "train.txt", "--out", out / "scores")
    steps.update()


def _select(out: Path, seed: int) -> tuple[object, ...]:
    return ("tools/select_heads.py", "--teacher", out / "teacher", "--seed", seed, *SCORED_FOR, "--skip-existing")


def make_student(out: Path, student: Student, seed: int, _position: int = 0) -> None:
    """Choose the heads of a student and give it the teacher's weights."""
    place = folder(out, student)
    choice = ("--ratio", student.ratio, "--strategy", student.strategy, "--linear", student.kind)
    known = ("--scores", out / "scores" / "scores.json") if student.scored else ()
    run_command(out, slug(student), *_select(out, seed), *choice, *known, "--out", place / "heads")
    hybridize = ("hybridize", "--teacher", out / "teacher", "--heads", place / "heads" / "head_map.json", *LAYER)
    calibration = ("--calibration-text", out / "train.txt", "--seed", seed)
    to = ("--out", place / "student", "--skip-existing")
    run_command(out, slug(student), "tools/convert.py", *hybridize, *calibration, *to)


def make_and_train(out: Path, student: Student, seed: int, recipes: Sequence[Path], position: int) -> None:
    """A student from the choice of its heads to the end of its last stage, on one core."""
    make_student(out, student, seed)
    train_all(out, student, 1, position, recipes)


def folder(out: Path, student: Student) -> Path:
    return out / slug(student)


def slug(student: Student) -> str:
    return student.name.replace(" ", "-").replace(":", "to")


def train_all(out: Path, student: Student, ranks: int, position: int, recipes: Sequence[Path] = (RECIPE,)) -> None:
    """All stages of a student, by these recipes laid over each other."""
    for stage in student.stages:
        train(out, student, stage, ranks, position, recipes)


def is_trained(out: Path, student: Student, stage: str, recipes: Sequence[Path]) -> bool:
    """Whether a stage's last checkpoint is there."""
    newest = folder(out, student) / stage / NEWEST
    return newest.exists() and newest.read_text().strip() == str(Recipe.load(recipes, stage).values["train-iters"])


def train(out: Path, student: Student, stage: str, ranks: int, position: int, recipes: Sequence[Path]) -> None:
    """One stage of one student, its steps shown as they are logged."""
    if is_trained(out, student, stage, recipes):
        return
    place, data = folder(out, student), out / ("extend" if stage == "extend" else "align")
    command = [sys.executable, *launcher(ranks), "-m", "hydra_mcore.train", "--stage", stage, "--config", *recipes]
    command += ["--run-dir", place, "--teacher", out / "teacher", "--data-path", data]
    command += ["--data-cache-path", place / "cache", "--micro-batch-size", BATCH[stage] // ranks]
    path = out / "logs" / f"{slug(student)}-{stage}.log"
    with (
        path.open("w") as sink,
        tqdm(desc=f"{student.name} {stage}", unit="step", position=position, leave=False) as bar,
    ):
        process = subprocess.Popen(
            [str(word) for word in command],
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for line in process.stdout:
            sink.write(line)
            if found := re.search(r"iteration\s+(\d+)/\s*(\d+).*?loss: ([\d.E+-]+)", line):
                bar.total, bar.n = int(found[2]), int(found[1])
                bar.set_postfix_str(f"loss {float(found[3]):.3f}")
        code = process.wait()
    # a stage that a Ctrl-C has stopped ends well, but the next one is not to follow
    if code or not is_trained(out, student, stage, recipes):
        fail(path, code)


def evaluate(out: Path, log: str, models: Sequence[str], seed: int, into: Path, *asked: object, ranks: int = 1) -> None:
    """Let models (NAME=DIR) answer prompts in held-out text that the whole run shares; answers in ``into`` stay."""
    shared = ("--haystack", out / "held_out.txt", "--seed", EVALUATION_SEED + seed, "--cache", out / "prompts")
    command = (*launcher(ranks), "tools/evaluate.py", "--models", *models, *shared, *asked, "--out", into)
    run_command(out, log, *command)
