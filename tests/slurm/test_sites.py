# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Jobs on a real SLURM whose nodes have GPUs, as it believes: what they ask for, what they get, where they write."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.cluster import GPUS, Cluster, wait_for
from tests.support.paths import ROOT

OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")


@pytest.fixture
def site(cluster: Cluster, tmp_path: Path) -> dict[str, str]:
    """What env.sh reads; the Python of the jobs is a script that shows how many ranks it was to start."""
    (tmp_path / "recipe.yaml").write_text("prepare: {a: 1}\n")
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\n[ $2 != hydra_mcore.recipe ] || exec {sys.executable} "$@"\n'
        'echo "ranks: ${PET_NPROC_PER_NODE:-none}"\n'
    )
    python.chmod(0o755)
    hydra = {"HYDRA_LOGS": tmp_path / "logs", "HYDRA_PYTHON": python, "HYDRA_RECIPE": tmp_path / "recipe.yaml"}
    own = {"HYDRA_GPUS_PER_NODE": "2", "SBATCH_PARTITION": "gpu", "SBATCH_TIMELIMIT": "5"}
    return cluster.environment | own | {name: str(value) for name, value in hydra.items()}


def job(cluster: Cluster, site: dict[str, str], command: str) -> tuple[dict[str, str], str]:
    """What SLURM says of a job that is over, and the job's output; a Bash line that ends with the job's id makes it."""
    done = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, env=site, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    number = re.findall(r"(\d+)\s*$", done.stdout)[0]
    wait_for(lambda: cluster.job(number)["JobState"] in OVER, 120, f"job {number} ends")
    facts = cluster.job(number)
    return facts, Path(facts["StdOut"]).read_text()


def test_a_single_job_gets_what_env_sh_says(cluster: Cluster, site: dict[str, str]) -> None:
    facts, output = job(cluster, site, "source slurm/env.sh; sbatch slurm/stage3.sh")
    assert facts["JobState"] == "COMPLETED" and facts["TresPerNode"] == "gres:gpu:2"
    assert facts["StdOut"] == f"{site['HYDRA_LOGS']}/extend-{facts['JobId']}.out"
    assert f"ranks: {GPUS}\n" in output and f": {GPUS} (GPUs: {GPUS} by SLURM_GPUS_ON_NODE)" in output


@pytest.mark.parametrize(
    ("command", "asked"),
    [
        ("HYDRA_GRES=gpu:h100 HYDRA_GPUS_PER_NODE=1; source slurm/env.sh; sbatch", "gres:gpu:h100:1"),
        ("source slurm/env.sh; SBATCH_GRES=none SBATCH_GPUS_PER_NODE=1 sbatch", "gres:gpu:1"),
    ],
)
def test_gpus_are_asked_for_as_the_site_wants(cluster: Cluster, site: dict[str, str], command: str, asked: str) -> None:
    facts, output = job(cluster, site, f"{command} slurm/align.sh")
    assert facts["TresPerNode"] == asked and "ranks: 1\n" in output


def test_a_job_that_asks_for_no_gpu_says_so(cluster: Cluster, site: dict[str, str]) -> None:
    """A whole node without a word of GPUs: SLURM tells the job of them, and not its steps."""
    facts, output = job(cluster, site, "source slurm/env.sh; sbatch --gres=none slurm/align.sh")
    assert facts["JobState"] == "FAILED" and "ranks: " not in output
    (line,) = (line for line in output.splitlines() if line.startswith("node.sh: "))
    assert "0 ranks for " in line and "sbatch --gres=gpu:8" in line


def test_a_job_that_serves_has_a_copy_on_each_gpu(cluster: Cluster, site: dict[str, str]) -> None:
    """As many as the node gives the job, whatever was set for others."""
    site |= {"HYDRA_SERVING_PYTHON": "echo", "HYDRA_GPUS_PER_NODE": "8"}
    facts, output = job(cluster, site, f"source slurm/env.sh; sbatch --gres=gpu:{GPUS} slurm/serve.sh -- --model x")
    assert facts["JobState"] == "COMPLETED" and f"copies on {facts['BatchHost']}: {GPUS} (GPUs: {GPUS} by " in output
    assert f"api_server --data-parallel-size {GPUS} --host 0.0.0.0 " in output


def test_a_site_that_shares_nodes(cluster: Cluster, site: dict[str, str]) -> None:
    shared = "export SBATCH_EXCLUSIVE=oversubscribe SBATCH_CPUS_PER_GPU=3; source slurm/env.sh; "
    facts, output = job(cluster, site, shared + "sbatch slurm/align.sh")
    assert facts["NumCPUs"] == "6" and f"ranks: {GPUS}\n" in output


@pytest.mark.parametrize("own", [{}, {"SBATCH_CPUS_PER_GPU": "3", "SBATCH_EXCLUSIVE": "oversubscribe"}], ids=str)
def test_a_pipeline_prepares_on_cpus(cluster: Cluster, site: dict[str, str], own: dict[str, str]) -> None:
    site |= {"HYDRA_PREPARE_OPTIONS": "--partition=short --cpus-per-task=4"} | own
    command = "bash slurm/pipeline.sh | sed -n 's/^prepare: job \\([0-9]*\\),.*/\\1/p'"
    facts, output = job(cluster, site, command)
    assert facts["JobState"] == "COMPLETED" and facts["Partition"] == "short" and "TresPerNode" not in facts
    assert facts["NumCPUs"] == ("4" if own else "8") and "tools/prepare_data.py" in output


def test_doctor_looks_at_every_node_of_a_job(cluster: Cluster, site: dict[str, str], tmp_path: Path) -> None:
    site["HYDRA_PYTHON"] = sys.executable
    flags = f"--only SLURM nodes --run-dir {tmp_path} --json {tmp_path}/doctor.json --limit 60"
    facts, output = job(cluster, site, f"source slurm/env.sh; sbatch --nodes=2 slurm/doctor.sh -- {flags}")
    assert facts["NumNodes"] == "2", output
    report = json.loads((tmp_path / "doctor.json").read_text())
    assert report["nodes"] == 2 and report["counts"]["ok"] > 0, output
