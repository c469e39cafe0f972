# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""hydra_mcore/torchrun.py: what a rank says is what one reads, and how it ended is the exit status."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.paths import ROOT

RANK = """
import os, signal, sys, time
how, rank = sys.argv[1], os.environ["RANK"]
if how == "refuse":
    if rank == "0":
        print("rank: bad input", file=sys.stderr)
    sys.exit(2)
if how == "die" and rank == "1":
    os.kill(os.getpid(), signal.SIGKILL)
if how in ("die", "wait"):
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
    print("ready", flush=True)
    time.sleep(60)
"""


def start(folder: Path, how: str) -> subprocess.Popen:
    (folder / "rank.py").write_text(RANK)
    words = ("-m", "hydra_mcore.torchrun", "--standalone", "--nproc-per-node", "2", str(folder / "rank.py"), how)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    return subprocess.Popen([sys.executable, *words], cwd=ROOT, env=env, **pipes)


@pytest.mark.parametrize(("how", "status"), [("end", 0), ("refuse", 2), ("die", 128 + signal.SIGKILL)])
def test_the_status_is_that_of_the_rank_that_failed_first(tmp_path: Path, how: str, status: int) -> None:
    process = start(tmp_path, how)
    _, said = process.communicate(timeout=120)
    assert process.returncode == status and "Traceback" not in said
    assert said.count("failed (exitcode: ") == bool(status)
    assert said.count("rank: bad input\n") == (how == "refuse")
    assert how == "die" or said.count("\n") == 2 * (how == "refuse")  # the line that says why, and which rank it was


def test_a_signal_ends_it_without_a_traceback(tmp_path: Path) -> None:
    process = start(tmp_path, "wait")
    assert [process.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGINT and "Traceback" not in said
