# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Loss spikes told once and only when they are spikes; data that does not come ends the process."""

import subprocess
import sys
import time

import numpy as np
import pytest

from hydra_mcore.train.anomalies import DataTimeout, LossSpikes
from tests.support.paths import ROOT


def alerts(losses: np.ndarray) -> list[int]:
    spikes = LossSpikes()
    return [step for step, loss in enumerate(losses) if spikes(float(loss)) is not None]


@pytest.fixture
def falling() -> np.ndarray:
    """A loss as training has it: quick at first, then slow, with noise of one percent."""
    steps = np.arange(1000)
    return (2.0 + 6.0 * np.exp(-steps / 60)) * (1 + 0.01 * np.random.default_rng(0).standard_normal(1000))


def test_a_loss_that_falls_makes_no_alert(falling: np.ndarray) -> None:
    assert alerts(falling) == []


@pytest.mark.parametrize("steps", [1, 15])
def test_a_spike_is_told_once(falling: np.ndarray, steps: int) -> None:
    falling[400 : 400 + steps] *= 1.5
    falling[700] *= 3
    assert alerts(falling) == [400, 700]


def test_a_loss_that_stays_high_becomes_the_new_normal(falling: np.ndarray) -> None:
    falling[400:] += 2.0
    falling[800] *= 1.5
    assert alerts(falling) == [400, 800]


def test_ripples_of_a_loss_that_hardly_moves_are_none() -> None:
    losses = 1.0 + 1e-6 * np.random.default_rng(0).standard_normal(300)
    losses[100] = 1.01
    assert alerts(losses) == []


def test_data_that_comes_is_timed_and_leaves_no_alarm() -> None:
    said: list[str] = []
    watch = DataTimeout(0.2, lambda: "rank 0 reads x", said.append)
    for _ in range(3):
        with watch():
            time.sleep(0.02)
    time.sleep(0.3)
    assert said == [] and 0.06 <= watch.waited < 0.2


STALLED = """
import time
from hydra_mcore.train.anomalies import DataTimeout
watch = DataTimeout(1.0, lambda: "rank 3 reads /data/x", lambda line: print("alert:", line, flush=True))
with watch():
    {wait}
print("went on")
"""


def stalled(wait: str, grace: float = 30.0) -> subprocess.CompletedProcess:
    code = STALLED.format(wait=wait).replace("watch =", f"DataTimeout.GRACE_S = {grace}; watch =", 1)
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_data_that_does_not_come_is_told_then_ends_the_process() -> None:
    done = stalled("time.sleep(30)")
    assert done.returncode == 2
    first, second, last = (line for line in done.stderr.splitlines() if line.startswith("train:"))
    assert first.startswith("train: no data for 0.5 seconds: rank 3 reads /data/x on ")
    assert second.startswith("train: no data for 1 seconds") and "data-timeout is 1 seconds" in last
    assert done.stdout.count("alert:") == 3 and "went on" not in done.stdout


def test_a_wait_that_holds_pythons_lock_ends_too() -> None:
    done = stalled("import ctypes; ctypes.PyDLL(None).sleep(30)", grace=0.5)
    assert done.returncode == 1 and "Timeout" in done.stderr and "went on" not in done.stdout
