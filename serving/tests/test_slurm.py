# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""slurm/serve.sh as a job of a real SLURM: the server answers, and ends with the job."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_server import REPOSITORY, TINY, complete, free_port, healthy

sys.path.append(str(REPOSITORY))
from tests.slurm.cluster import Cluster, wait_for, why_not

SITE = {
    **{"HYDRA_PYTHON": str(REPOSITORY / ".venv" / "bin" / "python"), "HYDRA_SERVING_PYTHON": sys.executable},
    **{"HYDRA_GPUS_PER_NODE": "0", "SBATCH_TIMELIMIT": "15"},
    **{"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"},
}


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    if reason := why_not():
        pytest.skip(reason)
    cluster = Cluster(tmp_path / "slurm")
    cluster.root.mkdir(exist_ok=True)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def test_a_job_serves_an_export(cluster: Cluster, tmp_path: Path) -> None:
    port, log = free_port(), tmp_path / "serve.out"
    job = subprocess.run(
        [
            *("sbatch", "--parsable", "--gres=gpu:0", f"--output={log}", "slurm/serve.sh"),
            *("--", "--model", str(TINY / "export"), "--dtype", "float32", "--enforce-eager"),
        ],
        cwd=REPOSITORY,
        env=os.environ | cluster.environment | SITE | {"HYDRA_SERVING_PORT": str(port)},
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()

    def ready() -> bool:
        assert cluster.job(job)["JobState"] in ("PENDING", "CONFIGURING", "RUNNING"), log.read_text()[-3000:]
        time.sleep(0.5)
        return healthy(f"http://127.0.0.1:{port}")

    wait_for(ready, 240, "the server")
    assert f":{port}/v1" in log.read_text()  # the address, for whoever reads the job's output
    answer = complete(f"http://127.0.0.1:{port}/v1", prompt=[1, 2, 3], max_tokens=4)
    assert answer["finish_reason"] == "length"
    cluster("scancel", job)
    wait_for(lambda: not healthy(f"http://127.0.0.1:{port}"), 60, "the server's end")
