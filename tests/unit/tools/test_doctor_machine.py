# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""tools/doctor.py on the machine, the network, files and SLURM: what is there, arranged badly, is named with its
fix.
"""

from __future__ import annotations

import fcntl
import http.server
import itertools
import os
import resource
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.support.doctor import apart, doctor, only, program, verdicts
from tools.doctor import files, machine, network, slurm
from tools.doctor.lines import Check, Line, examine, fail, ok
from tools.doctor.machine import Gpu

H200 = Gpu("NVIDIA H200", "9.0", "580.65", 143771, 0, 0)

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # other tests' threads hold no lock of ours


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of 1 MiB and 20 inodes."""
    if os.geteuid() or shutil.which("mount") is None:
        pytest.skip("needs root, to mount a small tmpfs")
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m,nr_inodes=20", "tmpfs", folder], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


# GPUs and the machine


def test_nvidia_smi_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    rows = "NVIDIA H200, 9.0, 580.65, 143771, 4, 0\nNVIDIA H200, 9.0, 580.65, 143771, 9000, 3"
    program(tmp_path / "bin", "nvidia-smi", f"cat <<'E'\n{rows}\nE")
    found = machine.gpus()
    assert found[0] == Gpu("NVIDIA H200", "9.0", "580.65", 143771, 4, 0)
    lines = list(machine.driver(found, ""))
    assert lines[0] == ok("GPUs", "2 x NVIDIA H200, 140 GiB, compute capability 9.0, driver 580.65")
    assert [(line.what, line.verdict) for line in lines[1:]] == [("GPU memory", "warn"), ("GPU memory", "fail")]
    assert all("GPU 1" in line.found for line in lines[1:])
    program(tmp_path / "bin", "nvidia-smi", "echo; echo GB10, 12.1, 580.65, [N/A], [N/A], [N/A]")
    assert machine.gpus() == [Gpu("GB10", "12.1", "580.65", 0, 0, 0)]
    program(
        tmp_path / "bin", "nvidia-smi", "echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18"
    )
    with pytest.raises(OSError, match="version mismatch"):
        machine.gpus()


def test_gpus_that_are_missing_or_not_seen_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [line.found for line in machine.driver([], "")] == ["none"]
    assert only(machine.driver([], "broken")).verdict == "fail"
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    promised = only(machine.driver([H200], ""))
    assert promised.verdict == "fail" and "SLURM gave 8" in promised.found
    assert only(machine.torch_on([])).verdict == "ok"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    hidden = only(machine.torch_on([H200]))
    assert hidden.verdict == "fail" and "CUDA_VISIBLE_DEVICES is empty" in hidden.found


def test_a_torch_that_does_not_load(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise OSError('libcudart.so.13: cannot open shared object file')")
    done = doctor("--only", "GPU", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1 and "fail torch" in done.stdout and "libcudart" in done.stdout


@pytest.mark.parametrize(("threads", "verdict"), [(None, "ok"), ("1", "ok"), ("100000", "warn"), ("4,2", "ok")])
def test_cpus(monkeypatch: pytest.MonkeyPatch, threads: str | None, verdict: str) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    if threads:
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
    assert only(machine.cpus()).verdict == verdict


def test_memory(tmp_path: Path) -> None:
    assert only(machine.memory()).what == "memory"
    (tmp_path / "meminfo").write_text("MemTotal: 16000000 kB\nMemAvailable: 900000 kB\n")
    assert only(machine.memory(str(tmp_path / "meminfo"))).verdict == "warn"


def test_limits() -> None:
    def limited(infiniband: bool) -> Iterator[Line]:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, 65536))
        yield from machine.limits(infiniband)

    assert verdicts(iter(apart(lambda: limited(True)))) == {"open files": "warn", "locked memory": "fail"}
    assert verdicts(iter(apart(lambda: limited(False)))) == {"open files": "warn", "locked memory": "ok"}


# Network and services


def test_host_names() -> None:
    found = {
        (name, far): only(network.host_name(name, far)).verdict
        for name in ("localhost", "no-such-host.invalid", "192.0.2.1")
        for far in (False, True)
    }
    assert list(found.values()) == ["ok", "fail", "warn", "fail", "fail", "fail"]


@pytest.mark.parametrize(
    ("value", "found"), [("lo", "ok"), ("l", "ok"), ("=l", "fail"), ("nope0", "fail"), ("^lo", None)]
)
def test_interfaces(monkeypatch: pytest.MonkeyPatch, value: str, found: str | None) -> None:
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", value)
    assert verdicts(network.interfaces()).get("NCCL_SOCKET_IFNAME") == found


def test_all_reduce_alone_and_with_a_peer_that_does_not_come() -> None:
    assert only(iter(apart(lambda: network.all_reduce("gloo", 0, 1, "", 0, 10)))).verdict == "ok"
    start = time.monotonic()
    lonely = only(iter(apart(lambda: network.all_reduce("gloo", 0, 2, "127.0.0.1", 0, 1))))
    assert lonely.verdict == "fail" and time.monotonic() - start < 15


def test_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(variable, raising=False)
    keys = tmp_path / "netrc"
    monkeypatch.setenv("NETRC", str(keys))
    assert only(network.wandb()).verdict == "warn"
    keys.write_text("machine api.wandb.ai login user password secret\n")
    line = only(network.wandb())
    assert line.verdict == "ok" and "secret" not in line.found
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert only(network.wandb()).verdict == "warn"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert "wandb sync" in only(network.wandb()).found


def test_services_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "not" / "yet"))
    assert only(network.hugging_face()).verdict == "ok"
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for variable in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # nobody listens
        up, down = (f"http://127.0.0.1:{port}" for port in (server.server_port, closed.getsockname()[1]))
        monkeypatch.setenv("HF_ENDPOINT", up)
        monkeypatch.setenv("WANDB_BASE_URL", down)
        assert verdicts(network.reachable()) == {up: "ok", down: "warn"}
    server.shutdown()
    server.server_close()


# Files


def every_line(folder: Path) -> dict[str, str]:
    steps = (files.run_folder, *(files.STEPS if files.usable(folder) else ()))
    lines = [examine(Check("files", step.__name__, partial(step, folder)), 20) for step in steps]
    return verdicts(itertools.chain.from_iterable(lines))


def test_a_good_run_folder_is_left_as_it_was(tmp_path: Path) -> None:
    found = every_line(tmp_path)
    assert list(found) == ["run folder", "rename", "write and fsync", "mmap", "flock", "fcntl lock", "space"]
    assert found.pop("space") in ("ok", "warn") and set(found.values()) == {"ok"}  # the disk may be small just now
    assert list(tmp_path.iterdir()) == []


def test_run_folders_that_cannot_be_used(tmp_path: Path) -> None:
    assert every_line(tmp_path / "none") == {"run folder": "fail"}
    (tmp_path / "file").touch()
    assert every_line(tmp_path / "file") == {"run folder": "fail"}
    closed = Path(tempfile.mkdtemp(prefix="doctor_", dir="/tmp"))
    closed.chmod(0o555)

    def as_nobody() -> Iterator[Line]:
        if not os.geteuid():
            os.setuid(65534)  # root may write anywhere
        yield from files.run_folder(closed)

    line = only(iter(apart(as_nobody)))
    closed.rmdir()
    assert line.verdict == "fail" and "not writable" in line.found


def test_a_full_disk(full_disk: Path) -> None:
    found = every_line(full_disk)
    assert found["run folder"] == "warn"  # a tmpfs
    assert [found[what] for what in ("write and fsync", "space")] == ["fail", "warn"]
    shared = only(machine.shared_memory(str(full_disk)))
    assert shared.verdict == "warn" and "0.00 GiB" in shared.found


def test_shared_memory_is_missing(tmp_path: Path) -> None:
    assert only(machine.shared_memory(str(tmp_path / "shm"))).verdict == "fail"


def test_a_limit_on_the_size_of_files(tmp_path: Path) -> None:
    def limited() -> Iterator[Line]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        yield from files.writes(tmp_path)

    line = only(iter(apart(limited)))
    assert line.verdict == "fail" and line.fix == "ulimit -f unlimited"


@pytest.mark.parametrize(("share", "verdict"), [(0.01, "ok"), (0.7, "warn"), (1.1, "fail")])
def test_space_for_the_next_checkpoint(tmp_path: Path, share: float, verdict: str) -> None:
    saved = tmp_path / "align" / "iter_0000005" / "shard"
    saved.parent.mkdir(parents=True)
    with open(saved, "wb") as file:
        file.truncate(int(share * shutil.disk_usage(tmp_path).free))  # a hole: takes no space
    assert verdicts(files.space(tmp_path))["space"] == verdict


@pytest.mark.parametrize("lock", [fcntl.flock, fcntl.lockf])
def test_locks_are_tried_from_another_process(tmp_path: Path, lock: Callable[..., None]) -> None:
    def tries() -> Iterator[Line]:
        yield fail("try", str(files.try_lock(tmp_path / "lock", lock)), "")

    with open(tmp_path / "lock", "w") as file:
        lock(file, fcntl.LOCK_EX)
        held = only_found(tries)
        lock(file, fcntl.LOCK_UN)
        assert (held, only_found(tries)) == ("0", "1")


def only_found(run: Callable[[], Iterator[Line]]) -> str:
    (line,) = apart(run)
    return line.found


# SLURM

CONFIG = """\
Configuration data as of 2026-11-21T17:00:00
ClusterName             = tiny
PreemptMode             = {preempt}
SLURM_VERSION           = 23.11.4
{more}
"""


@pytest.fixture
def slurm_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder on PATH, for stand-ins of SLURM's programs; no SLURM variables."""
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("cat", "sh", "sleep"):
        (folder / name).symlink_to(str(shutil.which(name)))
    monkeypatch.setenv("PATH", str(folder))
    return folder


def install_slurm(folder: Path, **config: str) -> None:
    text = CONFIG.format(**{"preempt": "OFF", "more": "", **config})
    program(folder, "scontrol", f"cat <<'E'\n{text}E")
    for name in ("srun", "sbatch"):
        program(folder, name, "")


def test_no_slurm(slurm_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert only(slurm.slurm()).verdict == "ok"
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert "container" in only(slurm.slurm()).found


def test_slurm_without_a_cluster(slurm_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_slurm(slurm_path)
    program(slurm_path, "scontrol", "echo 'scontrol: fatal: Could not establish a configuration source' >&2; exit 1")
    line = only(slurm.slurm())
    assert (
        line.verdict == "warn"
        and line.found == "installed, but no cluster answers (Could not establish a configuration source)"
    )
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert only(slurm.slurm()).verdict == "fail"


def test_a_slurm_that_suits_us(slurm_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_slurm(slurm_path, more="MaxBatchRequeue         = 5", preempt="REQUEUE")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    lines = {line.what: line for line in slurm.slurm()}
    assert {line.verdict for line in lines.values()} == {"ok"}
    assert lines["SLURM"].found == "23.11.4, cluster tiny answers"


@pytest.mark.parametrize(
    ("config", "what", "verdict"),
    [
        ({"preempt": "CANCEL"}, "PreemptMode", "warn"),
        ({"preempt": "GANG,SUSPEND"}, "PreemptMode", "warn"),
        ({"more": "MaxBatchRequeue = 1"}, "MaxBatchRequeue", "warn"),
    ],
)
def test_a_slurm_that_does_not(slurm_path: Path, config: dict[str, str], what: str, verdict: str) -> None:
    install_slurm(slurm_path, **config)
    assert verdicts(slurm.slurm())[what] == verdict
