# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The log of a job: less than a screen before the first step, all arguments in a file, and none of what libraries say
to everybody.
"""

import os
import subprocess
import sys
from pathlib import Path

from tests.support.paths import ROOT
from tests.support.stages import FLAGS, make_run

SCREEN = 40


def test_less_than_a_screen_before_the_first_step(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    command = [sys.executable, "-m", "hydra_mcore.train", "--stage", "align", "--run-dir", str(folder / "run"), *FLAGS]
    command += ["--teacher", str(folder / "teacher"), "--start-from", str(folder / "student"), "--train-iters", "3"]
    command += ["--data-path", str(folder / "data"), "--data-cache-path", str(folder / "cache")]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    lines = done.stdout.splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith(" [") and " iteration " in line)
    assert first <= SCREEN and max(map(len, lines)) < 500, done.stdout
    assert not [line for line in lines if "WARNING" in line or "Warning" in line or "Theoretical" in line], done.stdout
    arguments = folder / "run" / "align" / "arguments.txt"
    assert f"all arguments {arguments}" in done.stdout
    table = [line.replace(".", "").split() for line in arguments.read_text().splitlines()]
    assert ["world_size", "1"] in table and ["train_iters", "3"] in table
