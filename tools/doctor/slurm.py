# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""SLURM: is it there, does it answer, and what would it do to a job that is preempted or requeued?"""

import os
import re
import shutil
from collections.abc import Iterator

from tools.doctor.lines import Line, answer_of, fail, last_line, ok, warn

COMMANDS = ("sbatch", "srun", "scontrol")
MIN_REQUEUES = 5


def slurm() -> Iterator[Line]:
    """The commands, the controller, and how jobs end there."""
    in_job = "SLURM_JOB_ID" in os.environ
    missing = [name for name in COMMANDS if shutil.which(name) is None]
    if len(missing) == len(COMMANDS) and not in_job:
        yield ok("SLURM", "not installed; one machine does not need it, several can use torchrun")
        return
    if missing:
        why = " (a job's container often lacks them; the scripts run outside of it)" if in_job else ""
        fix = "slurm/*.sh need them on all nodes: PATH, or module load"
        yield warn("SLURM", f"not on PATH: {', '.join(missing)}{why}", fix)
        if "scontrol" in missing:
            return
    try:
        config = configuration(answer_of("scontrol", "show", "config"))
    except OSError as error:
        reason = re.sub(r"^\w+: (fatal|error): ", "", last_line(str(error)))
        fix = "ask where slurm.conf is (SLURM_CONF), or whether slurmctld runs: scontrol ping"
        yield (fail if in_job else warn)("SLURM", f"installed, but no cluster answers ({reason})", fix)
        return
    yield ok("SLURM", f"{config.get('SLURM_VERSION')}, cluster {config.get('ClusterName')} answers")
    yield from at_the_end(config)


def configuration(text: str) -> dict[str, str]:
    """The ``Name = value`` lines of ``scontrol show config``."""
    pairs = (line.partition("=") for line in text.splitlines() if "=" in line)
    return {name.strip(): value.strip() for name, _, value in pairs}


def at_the_end(config: dict[str, str]) -> Iterator[Line]:
    """How often jobs come back there, and what preemption does to them."""
    most = config.get("MaxBatchRequeue", "")
    if most.isdigit() and int(most) < MIN_REQUEUES:
        fix = "then a job is held: scontrol release JOB, or have it raised"
        yield warn("MaxBatchRequeue", f"{most} requeues at most", fix)
    mode = config.get("PreemptMode", "OFF").upper()
    if "CANCEL" in mode:
        fix = "run slurm/pipeline.sh again: it goes on from the checkpoint"
        yield warn("PreemptMode", f"{mode}: a preempted job is cancelled", fix)
    elif "SUSPEND" in mode:
        found = f"{mode}: a preempted job is stopped in memory, its collectives time out"
        yield warn("PreemptMode", found, "a partition or QOS with REQUEUE")
    else:
        yield ok("PreemptMode", mode)
