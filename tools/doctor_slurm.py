# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""SLURM: is it there, does it answer, and what would it do to a job that is at its time limit, preempted or on a dead
node?
"""

from __future__ import annotations

import os
import re
import shutil
from typing import TYPE_CHECKING

from tools.doctor_lines import Check, Line, allows, answer_of, fail, last_line, ok, one_line, warn

if TYPE_CHECKING:
    from collections.abc import Iterator

TOPIC = "SLURM"
COMMANDS = ("sbatch", "srun", "scontrol")
MIN_KILL_WAIT_S = 30
MIN_BASH = "4"


def checks() -> list[Check]:
    """The checks of this topic."""
    return [Check(TOPIC, "bash", bash), Check(TOPIC, "SLURM", slurm)]


def bash() -> Iterator[Line]:
    """The shell of slurm/*.sh."""
    try:
        version = re.search(r"version ([\d.]+)", answer_of("bash", "--version")).group(1)
    except (OSError, AttributeError) as error:
        yield fail("bash", one_line(error), f"slurm/*.sh need bash {MIN_BASH} or newer")
        return
    old = not allows(f">={MIN_BASH}", version)
    yield fail("bash", version, f"slurm/*.sh need bash {MIN_BASH} or newer") if old else ok("bash", version)


def slurm() -> Iterator[Line]:
    """Version, controller, configuration and this process's allocation."""
    in_job = "SLURM_JOB_ID" in os.environ
    missing = [name for name in COMMANDS if shutil.which(name) is None]
    if len(missing) == len(COMMANDS) and not in_job:
        yield ok("SLURM", "not installed; one machine does not need it, several can use torchrun")
        return
    if missing:
        why = " (a job's container often lacks them; the scripts run outside of it)" if in_job else ""
        yield warn(
            "SLURM",
            f"not on PATH: {', '.join(missing)}{why}",
            "slurm/*.sh need them on all nodes: PATH, or module load",
        )
        if "scontrol" in missing:
            return
    try:
        config = configuration(answer_of("scontrol", "show", "config"))
    except OSError as error:
        found = f"installed, but no cluster answers ({_reason(error)})"
        yield (fail if in_job else warn)(
            "SLURM", found, "ask where slurm.conf is (SLURM_CONF), or whether slurmctld runs: scontrol ping"
        )
        return
    yield ok(
        "SLURM",
        f"{config.get('SLURM_VERSION', 'unknown version')}, cluster {config.get('ClusterName', 'without a name')}"
        " answers",
    )
    yield from at_the_end(config)
    yield from nodes_up()
    if in_job:
        yield allocation()


def configuration(text: str) -> dict[str, str]:
    """The ``Name = value`` lines of ``scontrol show config``."""
    pairs = (line.partition("=") for line in text.splitlines() if "=" in line)
    return {name.strip(): value.strip() for name, _, value in pairs}


def at_the_end(config: dict[str, str]) -> Iterator[Line]:
    """How jobs end there: the time between SIGTERM and SIGKILL, requeues, preemption."""
    wait = int((re.match(r"\d+", config.get("KillWait", "")) or re.match(r"\d+", "0")).group())
    found = f"{wait} s from SIGTERM to SIGKILL at the time limit or scancel"
    if wait < MIN_KILL_WAIT_S:
        yield warn(
            "KillWait", found, "too short to save after scancel; the time limit is safe: --signal comes minutes before"
        )
    else:
        yield ok("KillWait", f"{found}; --signal comes before it")
    requeue, most = config.get("JobRequeue", "1"), config.get("MaxBatchRequeue")
    yield ok(
        "JobRequeue",
        f"{requeue}: jobs are requeued"
        f" {'if they ask (--requeue, as slurm/*.sh do)' if requeue == '0' else 'by default'}",
    )
    if most is not None:
        enough = most.isdigit() and int(most) >= 5
        mend = "then a job is held: scontrol release JOB, or have it raised"
        yield ok("MaxBatchRequeue", most) if enough else warn("MaxBatchRequeue", f"{most} requeues at most", mend)
    mode = config.get("PreemptMode", "OFF").upper()
    if "CANCEL" in mode:
        yield warn(
            "PreemptMode",
            f"{mode}: a preempted job is cancelled",
            "run slurm/pipeline.sh again: it goes on from the checkpoint",
        )
    elif "SUSPEND" in mode:
        yield warn(
            "PreemptMode",
            f"{mode}: a preempted job is stopped in memory, its collectives time out",
            "a partition or QOS with REQUEUE",
        )
    else:
        user_signal = (
            "; PreemptParameters send the job's own --signal first" if "send_user_signal" in _preemption(config) else ""
        )
        yield ok("PreemptMode", mode + user_signal)


def _preemption(config: dict[str, str]) -> str:
    return config.get("PreemptParameters", "") + config.get("SlurmctldParameters", "")


def nodes_up() -> Iterator[Line]:
    """Nodes by state; one that is down can take no job."""
    try:
        rows = [line.split() for line in answer_of("sinfo", "--noheader", "--Node", "--format=%N %T").splitlines()]
    except OSError as error:
        yield warn("nodes", one_line(error), "sinfo should list them")
        return
    states = dict(row for row in rows if len(row) == 2)
    down = sorted(name for name, state in states.items() if re.match(r"(down|drain|fail|unknown)|.*\*$", state))
    found = f"{len(states) - len(down)} of {len(states)} up"
    if not states or len(down) == len(states):
        yield fail("nodes", found, "sinfo -R says why: tell the administrators")
    elif down:
        yield ok("nodes", f"{found}; not {', '.join(down[:8])}{' ...' if len(down) > 8 else ''}")
    else:
        yield ok("nodes", found)


def allocation() -> Line:
    """What SLURM gave to this job, by its variables."""
    given = {"nodes": "SLURM_JOB_NUM_NODES", "CPUs here": "SLURM_CPUS_ON_NODE", "GPUs here": "SLURM_GPUS_ON_NODE"}
    parts = [f"{os.environ[variable]} {unit}" for unit, variable in given.items() if variable in os.environ]
    restarts = os.environ.get("SLURM_RESTART_COUNT")
    return ok(
        "allocation",
        f"job {os.environ['SLURM_JOB_ID']}: {', '.join(parts)}" + (f", requeued {restarts} times" if restarts else ""),
    )


def _reason(error: OSError) -> str:
    return re.sub(r"^\w+: (fatal|error): ", "", last_line(str(error)))
