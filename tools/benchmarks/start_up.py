# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Measure how long each command takes to print its --help, and how long training takes to its first step.

The training step is that of the tiny example.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from hydra_mcore.heads import HeadMap
from tools.benchmarks.measure import Point, in_turn
from tools.benchmarks.report import Report

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "examples" / "tiny"
# The first is started by tools/verify.py; flags and help of the second are torch's.
NO_COMMANDS = {"hydra_mcore.evaluation.layout_logits", "hydra_mcore.torchrun"}
# What training prints, and what has been done by then.
MARKS = {"before the start of training step": "ready for the first step", "iteration        1/": "first step done"}
STEP_NOTES = (
    "Stage align by examples/tiny/recipe.yaml on the {device}, threads as they are set. Goal: the first step within"
    " 30 s."
)


def commands() -> list[str]:
    """Every command line of the project, as ``python -m`` takes it."""
    scripts = itertools.chain.from_iterable((ROOT / top).rglob("*.py") for top in ("hydra_mcore", "examples", "tools"))
    mains = (path for path in scripts if '\nif __name__ == "__main__":\n' in path.read_text(encoding="utf-8"))
    return sorted(
        {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__") for path in mains}
        - NO_COMMANDS
    )


def run(args: argparse.Namespace) -> Report:
    """Two tables: the first training step, and --help."""
    seconds = in_turn({command: partial(_start, command, "--help") for command in commands()}, args.repeats, "cpu")
    points = [Point(command, 0, times) for command, times in seconds.items()]
    helps = Report("--help", "Goal: 1.5 s.", ("python -m", "seconds"), [[point.name, point.spread] for point in points])
    with tempfile.TemporaryDirectory() as parent:
        _prepare(Path(parent))
        runs = [dict(_first_step(Path(parent))) for _ in range(args.repeats)]
    rows = [[name, Point(name, 0, tuple(each[name] for each in runs)).spread] for name in MARKS.values()]
    notes = STEP_NOTES.format(device="GPU" if torch.cuda.is_available() else "CPU")
    return Report("From the command to the first training step", notes, ("until", "seconds"), rows, more=(helps,))


def _start(command: str, *flags: str) -> None:
    """Run a command to its end; what it says appears only if it fails."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", command, *flags], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{command} ended with exit status {done.returncode}:\n{done.stderr[-2000:]}")


def _prepare(folder: Path) -> None:
    """Teacher, student and data of a run of the tiny example."""
    HeadMap.from_fa([(layer_idx, 0) for layer_idx in range(4)], 4, 8, 4).save(folder / "map.json")
    (folder / "text.txt").write_text(
        (ROOT / "hydra_mcore" / "heads.py").read_text(encoding="utf-8") * 8, encoding="utf-8"
    )
    _start("tools.convert", "import", "--hf", str(TINY / "teacher"), "--out", str(folder / "teacher"))
    source = (
        "--teacher",
        str(folder / "teacher"),
        "--heads",
        str(folder / "map.json"),
        "--text",
        str(folder / "text.txt"),
    )
    _start("tools.convert", "hybridize", *source, "--out", str(folder / "student"))
    text = ("--input", str(folder / "text.txt"), "--tokenizer", str(TINY / "teacher"))
    _start("tools.prepare_data", *text, "--out", str(folder / "data"), "--workers", "1")


def _first_step(folder: Path) -> Iterator[tuple[str, float]]:
    """Each mark, and the seconds from the command until training prints it."""
    for made in ("align", "cache"):
        shutil.rmtree(folder / made, ignore_errors=True)
    command = [sys.executable, "-m", "hydra_mcore.train", "--stage", "align", "--config", str(TINY / "recipe.yaml")]
    command += ["--run-dir", str(folder), "--teacher", str(folder / "teacher"), "--data-path", str(folder / "data")]
    command += [
        "--data-cache-path",
        str(folder / "cache"),
        "--micro-batch-size",
        "8",
        "--log-interval",
        "1",
        "--exit-interval",
        "1",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    waited, start = dict(MARKS), time.perf_counter()
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        lines = []
        for line in process.stdout:
            lines.append(line)
            for mark in [mark for mark in waited if mark in line]:
                yield waited.pop(mark), time.perf_counter() - start
    if process.returncode or waited:
        raise RuntimeError(f"training ended with exit status {process.returncode}:\n{''.join(lines[-15:])}")
