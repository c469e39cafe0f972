# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The whole pipeline on the tiny teacher: import, select, hybridize, align, distill, extend, evaluate, export, report.

Runs the project's own commands, one after the other, and writes <out>/report.md. About a quarter of an hour on two
cores.

examples:
  python -m examples.tiny.demo
  python -m examples.tiny.demo --out runs/seed1 --seed 1 --prompts 200
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from hydra_mcore.commands import one_line_errors, sole_writer

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
# Prompts of other evaluation seeds were looked at while teacher and recipe were made.
EVALUATION_SEED = 2_000_000
# Tokens of a sequence, and sequences a step, as the recipe has them.
ALIGN_TOKENS, EXTEND_TOKENS = 256, 1024
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


STUDENTS = (
    Student("selected 3:1", "3:1", "global_c", ("align", "distill", "extend")),
    Student("random 3:1", "3:1", "global_random"),
    Student("selected 15:1", "15:1", "global"),
    Student("random 15:1", "15:1", "global_random"),
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "runs" / "demo", metavar="DIR", help="folder of the run (default runs/demo)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of data, head selection and random maps (default 0)")
    parser.add_argument(
        "--prompts", type=int, default=30, metavar="N", help="evaluation prompts for each task and length (default 30)"
    )
    return parser.parse_args(argv)


@one_line_errors("demo")
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with sole_writer(args.out):
        run(args)


def run(args: argparse.Namespace) -> None:
    if args.out.exists():
        if not (args.out / "report.md").exists() and not (args.out / "teacher").exists():
            sys.exit(f"demo: {args.out} is not empty and no demo of ours; choose another --out")
        shutil.rmtree(args.out)
    args.out.mkdir(parents=True)
    begin = time.monotonic()
    with tqdm(total=6 + len(STUDENTS), desc="demo", unit="step", position=0) as steps:
        write_data(args.out, args.seed, steps)
        make_students(args.out, STUDENTS, args.seed, steps)
        train_students(args.out, steps)
        evaluate(args, steps)
        hf_dir = export(args.out, steps)
    from examples.tiny.report import write_report

    write_report(args.out, STUDENTS, time.monotonic() - begin)
    print((args.out / "report.md").read_text().split("\n## ")[0])
    print(f"report: {args.out / 'report.md'}")
    print(f"model for transformers: {hf_dir}")


def door(out: Path, log: str, *command: str) -> None:
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


def write_data(out: Path, seed: int, steps: tqdm) -> None:
    """Real text with needles as IndexedDatasets, and plain text for selection and evaluation."""
    from hydra_mcore.compat import install

    install()
    import numpy as np
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    from examples.tiny.corpus import documents, load_text
    from hydra_mcore.ruler.needle_format import NeedleFormat
    from hydra_mcore.tokenizer import open_tokenizer

    tokenizer = open_tokenizer(HERE / "teacher")
    fmt = NeedleFormat.load(HERE / "teacher" / "needles.json")
    text_ids = load_text(tokenizer, "train", 300_000)
    for name, length, count in (("align", ALIGN_TOKENS, 2400), ("extend", EXTEND_TOKENS, 80)):
        builder = IndexedDatasetBuilder(str(out / f"{name}.bin"), dtype=np.uint16)
        for ids in tqdm(
            documents(tokenizer, fmt, text_ids, length, count, seed),
            desc=f"data: {name}",
            total=count,
            position=1,
            leave=False,
        ):
            builder.add_document(torch.tensor(ids), [len(ids)])
        builder.finalize(str(out / f"{name}.idx"))
    (out / "train.txt").write_text(tokenizer.decode(text_ids[:60_000]))
    (out / "held_out.txt").write_text(tokenizer.decode(load_text(tokenizer, "held_out", 60_000)))
    steps.update()


def make_students(out: Path, students: Sequence[Student], seed: int, steps: tqdm) -> None:
    """Import the teacher, score its heads once, for the first student, and make a student for each choice of heads."""
    door(out, "import", "tools/convert.py", "import", "--hf", str(HERE / "teacher"), "--out", str(out / "teacher"))
    steps.update()
    select = ("tools/select_heads.py", "--teacher", str(out / "teacher"), "--seed", str(seed), *SCORED_FOR)
    scores = str(folder(out, students[0]) / "heads" / "scores.json")

    def make(student: Student) -> None:
        heads = folder(out, student) / "heads"
        choice = ("--ratio", student.ratio, "--strategy", student.strategy, "--out", str(heads))
        first = ("--haystack", str(out / "train.txt")) if student is students[0] else ("--scores", scores)
        known = first if student.scored else ()
        door(out, slug(student), *select, *choice, *known)
        hybridize = (
            "tools/convert.py",
            "hybridize",
            "--teacher",
            str(out / "teacher"),
            "--heads",
            str(heads / "head_map.json"),
        )
        calibration = ("--calibration-text", str(out / "train.txt"), "--seed", str(seed))
        door(out, slug(student), *hybridize, *calibration, *LAYER, "--out", str(folder(out, student) / "student"))

    make(students[0])  # its scores serve the others
    steps.update()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(make, students[1:]))
    steps.update()


def folder(out: Path, student: Student) -> Path:
    return out / slug(student)


def slug(student: Student) -> str:
    return student.name.replace(" ", "-").replace(":", "to")


def train_students(out: Path, steps: tqdm) -> None:
    """Two students on two ranks each, the first through all stages; the others on one rank, side by side."""
    first, *pair, last = STUDENTS
    for student in (first, last):
        train_all(out, student, ranks=2, position=1)
        steps.update()
    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(train_all, out, student, 1, position) for position, student in enumerate(pair, 1)]:
            done.result()
            steps.update()


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


def evaluate(args: argparse.Namespace, steps: tqdm) -> None:
    """Teacher and students answer the same prompts, at the native length and at twice that."""
    models = [f"teacher={args.out / 'teacher'}"]
    models += [
        f"{student.name}, {student.stages[-1]}={folder(args.out, student) / student.stages[-1]}" for student in STUDENTS
    ]
    lengths = ("--lengths", "512", "1024", "--prompts", str(args.prompts), "--seed", str(EVALUATION_SEED + args.seed))
    steps.set_postfix_str("evaluating")
    text = ("--haystack", str(args.out / "held_out.txt"))
    door(
        args.out,
        "evaluate",
        "tools/evaluate.py",
        "--models",
        *models,
        *lengths,
        *text,
        "--out",
        str(args.out / "evaluation"),
    )
    steps.update()


def export(out: Path, steps: tqdm) -> Path:
    """The student that went through all stages as a Hugging Face directory, with the evaluation in its model card."""
    student = folder(out, STUDENTS[0])
    report = ("--evaluation", str(out / "evaluation" / "report.md"))
    checkpoint = ("--checkpoint", str(student / STUDENTS[0].stages[-1]))
    door(out, "export", "tools/convert.py", "export", *checkpoint, *report, "--out", str(student / "hf"))
    steps.update()
    return student / "hf"


if __name__ == "__main__":
    main()
