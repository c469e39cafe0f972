# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Training, selection, evaluation and decoding on a GPU that is not there: devices, host reads, no patch for CPUs.

Forward passes alone; flash-linear-attention's kernels are stand-ins of the right shapes
(``tests/support/fake_gpu.py``).
"""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys

import pytest

from tests.support.paths import ROOT
from tools.benchmarks.kernels import BESIDE

# Where the host waits for the GPU, and must: a loss that is not finite stops the run, results go to the host.
FINITE = "hydra_mcore/train/step.py: if not bool(torch.isfinite(losses.loss.detach())):"
TOGETHER = "hydra_mcore/train/anomalies.py: if not flag:"
RESULT = "hydra_mcore/evaluation/parallel.py: return x_bp.cpu()"
CHANGED = (
    "hydra_mcore/selection/senders.py: self.changed = int((batch.clean_bs != batch.corrupt_bs).any(0).nonzero()[0])"
)
READS = {
    "align": ["hydra_mcore/train/step.py: if not bool(finite.all()):", TOGETHER],
    "distill": [FINITE, TOGETHER],
    "extend": [FINITE, TOGETHER],
    "accuracy": [RESULT],
    "loss": [RESULT] * 2,
    "decoding": ["hydra_mcore/evaluation/generation.py: yield token_b.cpu(), logits_bw"] * 4,  # one a token
    "receivers": [],
    "senders": [CHANGED] * 2,  # once a batch: a size, and its value
    "attribution": [],
    "observed scores": [],
    "knock-out": [],
    "calibration": [],
    "exported model": [],
}
SIGNATURES = """
import inspect, json
from hydra_mcore.ops.fla_kernels import kernels
print(json.dumps({name: list(inspect.signature(kernel).parameters) for name, kernel in kernels()._asdict().items()}))
"""


def reads_of(tp_size: int, only: str) -> dict[str, list[str] | str]:
    command = [sys.executable, "-W", "ignore", "-m", "tests.support.fake_gpu_run", str(tp_size), only]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert all(isinstance(places, list) for places in found.values()), f"{found}\n{done.stderr[-4000:]}"
    return found


def check(found: dict[str, list[str]]) -> None:
    assert found == {name: READS[name.split(",")[0]] for name in found}


def test_the_main_paths() -> None:
    found = reads_of(1, "rows, default|decoding, default|receivers")
    check(found)
    assert len(found) == 5


@pytest.mark.slow
@pytest.mark.parametrize("tp_size", [1, 2])
def test_all_paths(tp_size: int) -> None:
    """Every option, packed documents, without kernels. Of two ranks the second: sequence parallelism, FA heads shared
    by queries, uneven heads.
    """
    found = reads_of(tp_size, "")
    check(found)
    assert tp_size > 1 or {name.split(",")[0] for name in found} == READS.keys()


@pytest.mark.skipif(not BESIDE.is_dir(), reason="needs flash-linear-attention (make env puts it into .venv/kernels)")
def test_stand_ins_take_what_the_kernels_take() -> None:
    from tests.support.fake_gpu import KERNELS

    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{BESIDE}"}
    command = [sys.executable, "-W", "ignore", "-c", SIGNATURES]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    real = json.loads(done.stdout.splitlines()[-1])
    for name, stand_in in KERNELS._asdict().items():
        assert set(inspect.signature(stand_in).parameters) <= set(real[name]), name
