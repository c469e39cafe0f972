# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The pipeline's dry run says the ranks of each job, and what sbatch takes from the environment."""

import re

import pytest

from tests.slurm.test_scripts import bash

RECIPE = "examples/qwen3-1.7b/recipe.yaml"


@pytest.mark.parametrize(("site", "per_node"), [({}, 4), ({"HYDRA_RANKS_PER_NODE": "2"}, 2)])
def test_the_ranks_of_each_job(site: dict[str, str], per_node: int) -> None:
    done = bash("slurm/pipeline.sh", "--dry-run", RECIPE, HYDRA_NODES="3", HYDRA_GPUS_PER_NODE="4", **site)
    assert done.returncode == 0 and not done.stderr
    found = re.findall(r"^    nodes: (\d), ranks on each: (\d), ranks: (\d+)$", done.stdout, re.MULTILINE)
    assert [tuple(map(int, row)) for row in found] == [
        (nodes, per_node, nodes * per_node) for nodes in (1, 3, 3, 3, 1)
    ]  # select, three stages, evaluate
    assert re.findall(r" --nnodes=(\S+) ", done.stdout) == ["1", "3", "3", "3", "1"]
    assert f" --dry-run --world-size {3 * per_node}\n" in done.stdout


def test_what_sbatch_takes_from_the_environment() -> None:
    done = bash("slurm/pipeline.sh", "--dry-run", RECIPE, SBATCH_PARTITION="fast", SBATCH_TIMELIMIT="1:00:00")
    line = next(line for line in done.stdout.splitlines() if line.startswith("environment for sbatch: "))
    assert {"SBATCH_PARTITION=fast", "SBATCH_TIMELIMIT=1:00:00"} <= set(line.split())
