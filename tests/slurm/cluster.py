# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""A real SLURM on this machine: its own munged, slurmctld and slurmd, on private ports and in a private folder.

Two nodes are for jobs that train. Two more have GPUs, as SLURM believes, for jobs that show what they are given.
"""

import contextlib
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd")
NODES = ("n1", "n2")
GPU_NODES = ("g1", "g2")
GPUS = 2  # of each of these
CPUS = 8  # of a node, as SLURM believes
CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket,cred_expire=5
CryptoType=crypto/munge
SlurmUser=root
SlurmctldPidFile={root}/slurmctld.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdPidFile={root}/%n.pid
SlurmdLogFile={root}/%n.log
SlurmdSpoolDir={root}/%n
StateSaveLocation={root}/state
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
GresTypes=gpu
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=1,sched_interval=2
SchedulerType=sched/builtin
ReturnToService=2
KillWait=15
SlurmdTimeout=20
MinJobAge=3600
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs={cpus} State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs={cpus} State=UNKNOWN
NodeName=g1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[3]} CPUs={cpus} Gres=gpu:h100:{gpus} State=UNKNOWN
NodeName=g2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[4]} CPUs={cpus} Gres=gpu:h100:{gpus} State=UNKNOWN
PartitionName=gpu Nodes=g1,g2 MaxTime=INFINITE State=UP
PartitionName=short Nodes=n1,n2 Default=YES OverSubscribe=FORCE:4 MaxTime=INFINITE State=UP
"""


def why_not() -> str | None:
    """What keeps a SLURM from starting here, or None."""
    missing = [name for name in DAEMONS if shutil.which(name, path=_path()) is None]
    if missing:
        return f"no {', '.join(missing)} on this machine (tools/install_slurm.sh installs Debian's)"
    return "slurmd runs jobs as root only" if os.geteuid() else None


def _path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


class Cluster:
    """The running cluster; ``environment`` is what its commands need."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.environment = {**os.environ, "PATH": _path(), "SLURM_CONF": str(root / "slurm.conf")}
        self._daemons: dict[str, subprocess.Popen] = {}

    def start(self) -> None:
        """Start all daemons and wait until all nodes take jobs."""
        (self.root / "state").mkdir()
        (self.root / "munge.key").write_bytes(secrets.token_bytes(128))
        (self.root / "munge.key").chmod(0o600)
        nodes = NODES + GPU_NODES
        ports = _free_ports(1 + len(nodes))
        config = CONFIG.format(root=self.root, host=socket.gethostname(), ports=ports, cpus=CPUS, gpus=GPUS)
        (self.root / "slurm.conf").write_text(config)
        devices = [self.root / f"gpu{n}" for n in range(GPUS)]  # SLURM wants to see them
        gres = (f"NodeName={','.join(GPU_NODES)} Name=gpu Type=h100 File={device}\n" for device in devices)
        (self.root / "gres.conf").write_text("".join(gres))
        for device in devices:
            device.touch()
        files = [f"--{name}-file={self.root}/munge.{name}" for name in ("key", "pid", "log", "seed")]
        self._run("munged", "munged", "--foreground", "--force", f"--socket={self.root}/munge.socket", *files)
        wait_for(lambda: (self.root / "munge.socket").exists(), 10, "munged opens its socket")
        self._run("slurmctld", "slurmctld", "-D")
        for node in nodes:
            self.start_node(node)
        wait_for(
            lambda: self("sinfo", "-h", "-N", "-o", "%T", check=False).split() == ["idle"] * len(nodes),
            30,
            "all nodes are idle",
        )

    def last_errors(self) -> str:
        """The last error of each daemon."""
        logs = [
            log.read_text(errors="replace").splitlines()
            for log in sorted(self.root.glob("*.log")) + sorted(self.root.glob("*.out"))
        ]
        errors = [[line for line in lines if re.search("error|fatal", line, re.IGNORECASE)] for lines in logs]
        return "; ".join(lines[-1] for lines in errors if lines)

    def start_node(self, node: str) -> None:
        self._run(node, "slurmd", "-D", "-N", node)

    def kill_node(self, node: str) -> None:
        """Kill a node's slurmd and all that runs there at once, as a loss of power would."""
        slurmd = self._daemons.pop(node)
        tasks = processes(f"SLURMD_NODENAME={node}")
        keepers = {parent for pid in tasks if (parent := parent_of(pid)) not in tasks}  # slurmstepd, which would report
        for pid in (slurmd.pid, *keepers, *tasks):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        slurmd.wait()

    def stop(self) -> None:
        """End everything that the cluster started."""
        if "slurmctld" in self._daemons:
            with contextlib.suppress(subprocess.TimeoutExpired, AssertionError):
                self("scancel", f"--user={os.environ.get('USER', 'root')}", check=False)
                wait_for(lambda: not self("squeue", "-h", check=False), 15, "jobs end")
        for pid in processes(f"SLURM_CONF={self.root}/slurm.conf"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for daemon in self._daemons.values():
            daemon.wait()

    def __call__(self, *command: str, check: bool = True) -> str:
        """Run one of SLURM's commands; returns its output."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60)
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def job(self, job_id: str) -> dict[str, str]:
        """What scontrol says of a job, by name."""
        words = self("scontrol", "show", "job", job_id, "-o").split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def _run(self, name: str, *command: str) -> None:
        log = (self.root / f"{name}.out").open("a")
        program = shutil.which(command[0], path=_path())
        self._daemons[name] = subprocess.Popen([program, *command[1:]], env=self.environment, stdout=log, stderr=log)


def processes(*variables: str) -> list[int]:
    """The processes that have all these in their environment; a name alone stands for any value."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().decode(errors="replace").split("\0")
            names = {word.partition("=")[0] for word in words}
            if all(variable in (words if "=" in variable else names) for variable in variables):
                found.append(int(path.parent.name))
    return found


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def wait_for(true: Callable[[], object], seconds: float, what: str) -> None:
    """Return once ``true()`` is; raises AssertionError when that takes too long."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"waited {seconds} s in vain: {what}"
        time.sleep(0.2)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
