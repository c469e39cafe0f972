# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Progress in a log is lines, a minute apart; on a terminal it is a bar."""

import os
import pty
import subprocess
import sys
import termios

from tests.support.paths import ROOT

SCRIPT = """
import time
from hydra_mcore import progress
progress.LINE_S = 0.2
with progress.Progress(total=50, desc="work", unit="step") as bar:
    for _ in range(50):
        time.sleep(0.02)
        bar.update()
with progress.Progress(total=2, desc="gone", leave=False) as bar:
    bar.update(2)
"""


LONG_STEP = """
import time
from hydra_mcore import progress
progress.LINE_S = 0.2
with progress.Progress(total=2, desc="work") as bar:
    time.sleep(1.1)
"""


def test_a_log_gets_its_lines_within_one_long_step() -> None:
    done = subprocess.run([sys.executable, "-c", LONG_STEP], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and 4 <= done.stderr.count("work:   0%|") <= 7, done.stderr


def test_a_log_gets_a_line_now_and_then() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True, timeout=60)
    lines = done.stderr.splitlines()
    assert done.returncode == 0 and "\r" not in done.stderr
    work = [line for line in lines if line.startswith("work: ")]
    assert 4 <= len(work) <= 8 and work[0].startswith("work:   0%|") and " 50/50 " in work[-1]
    assert all(line.startswith(("work: ", "gone: ")) for line in lines)


def test_a_terminal_gets_a_bar() -> None:
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    process = subprocess.Popen([sys.executable, "-c", SCRIPT], cwd=ROOT, stderr=theirs)
    os.close(theirs)
    said = b""
    try:
        while part := os.read(ours, 4096):
            said += part
    except OSError:  # the other end is closed
        pass
    assert process.wait(60) == 0 and said.count(b"\rwork: ") > 4
