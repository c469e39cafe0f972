# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""tools/doctor.py: every check meets what it looks for, arranged for real where a process may do so."""

from __future__ import annotations

import ast
import fcntl
import http.server
import importlib.machinery
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tools import doctor_files, doctor_machine, doctor_network, doctor_packages, doctor_slurm
from tools.doctor_lines import Check, Line, allows, examine, fail, ok
from tools.doctor_machine import Gpu

ROOT = Path(__file__).parents[2]
DOCTOR = ROOT / "tools" / "doctor.py"
H200 = Gpu("NVIDIA H200", "9.0", "580.65", 143771, 0, True, "Enabled", 0)

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # other tests' threads hold no lock of ours


def verdicts(lines: Iterator[Line]) -> dict[str, str]:
    return {line.what: line.verdict for line in lines}


def only(lines: Iterator[Line]) -> Line:
    (line,) = lines
    assert bool(line.mend) == (line.verdict != "ok")
    return line


def apart(run: Callable[[], Iterator[Line]], limit_s: float = 20.0) -> list[Line]:
    """The lines of a check in a process of its own, as the doctor runs it."""
    return list(examine(Check("topic", "check", run), limit_s))


def doctor(*flags: str, python: tuple[str, ...] = (sys.executable,), **env: str) -> subprocess.CompletedProcess[str]:
    command = [*python, str(DOCTOR), *flags]
    return subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, timeout=100)


def program(folder: Path, name: str, text: str) -> None:
    """An executable on a private path."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)


def distribution(site: Path, name: str, version: str, *requires: str, modules: dict[str, str] | None = None) -> None:
    """A package as pip would install it: metadata, and modules by their path."""
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    lines = [f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {requirement}" for requirement in requires)]
    (info / "METADATA").write_text("Metadata-Version: 2.1\n" + "\n".join(lines) + "\n")
    for path, text in (modules or {}).items():
        (site / path).parent.mkdir(parents=True, exist_ok=True)
        (site / path).write_text(text)
    importlib.invalidate_caches()  # Python tells a changed folder by its time, which is coarse


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that Python looks into before its own packages."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    return folder


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of 1 MiB and 20 inodes."""
    if os.geteuid() or shutil.which("mount") is None:
        pytest.skip("needs root, to mount a small tmpfs")
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m,nr_inodes=20", "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


# What runs the checks


def test_a_check_that_hangs_is_ended_with_what_it_started(tmp_path: Path) -> None:
    def hangs() -> Iterator[Line]:
        yield ok("before", "this")
        sleeper = subprocess.Popen(["sleep", "60"])
        (tmp_path / "pid").write_text(str(sleeper.pid))
        sleeper.wait()

    start = time.monotonic()
    before, late = apart(hangs, 1.0)
    assert time.monotonic() - start < 5
    assert (before.verdict, late.verdict) == ("ok", "fail") and "1 s" in late.found
    sleeper = Path("/proc") / (tmp_path / "pid").read_text() / "stat"
    deadline = time.monotonic() + 5  # until init has collected it
    while sleeper.exists() and sleeper.read_text().split()[2] != "Z" and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not sleeper.exists() or sleeper.read_text().split()[2] == "Z"


def test_a_check_that_crashes_or_raises_is_a_line() -> None:
    def crashes() -> Iterator[Line]:
        os.write(2, b"Illegal instruction\n")
        os.kill(os.getpid(), signal.SIGKILL)
        yield ok("never", "")

    def raises() -> Iterator[Line]:
        yield ok("before", "this")
        raise ValueError("first\nsecond")

    died = only(iter(apart(crashes)))
    assert died.verdict == "fail" and died.found == "its process died (Illegal instruction)"
    before, raised = apart(raises)
    assert (before.verdict, raised.verdict, raised.found) == ("ok", "fail", "ValueError: first")


@pytest.mark.parametrize(
    ("specifier", "inside", "outside"),
    [
        (">=2.9", ["2.9", "2.15.0+cu132", "2.9.0a0+nv25.10", "3"], ["2.8.9", "2"]),
        ("==0.19.2", ["0.19.2", "0.19.2+local"], ["0.19.3", "0.19.2rc1"]),
        ("~=3.9.0", ["3.9.0", "3.9.5"], ["3.10.0", "3.8.9"]),
        ("~=3.9", ["3.9", "3.10"], ["4.0", "3.8"]),
        (">=3.4, <3.7.1", ["3.4.0", "3.7.0"], ["3.7.1", "3.3.1", "3.10"]),
        ("!=1.5", ["1.5.1"], ["1.5.0"]),
        ("", ["0", "anything"], []),
    ],
)
def test_version_ranges(specifier: str, inside: list[str], outside: list[str]) -> None:
    assert all(allows(specifier, version) for version in inside)
    assert not any(allows(specifier, version) for version in outside)


# packages


def test_python_version() -> None:
    versions = {(3, 11, 9): "fail", (3, 12, 1): "ok", (3, 13, 0): "ok", (3, 14, 2): "warn"}
    assert {version: only(doctor_packages.python_version(version)).verdict for version in versions} == versions


def test_requirements_against_setup_and_constraints(tmp_path: Path, site: Path) -> None:
    setup, constraints = tmp_path / "setup.py", tmp_path / "constraints.txt"
    setup.write_text('setup(install_requires=["PyYAML>=6.0", "tqdm>=4", "numpy>=99", "no-such-package>=1", "megatron-core==0.19.2"])')
    constraints.write_text("pyyaml==6.0.3  # why\ntqdm==4.0.1\n")
    distribution(site, "megatron-core", "0.18.0")
    distribution(site, "PyYAML", "6.0.3")
    lines = list(doctor_packages.requirements(setup, constraints))
    expected = {"PyYAML": "ok", "tqdm": "warn", "numpy": "fail", "no-such-package": "fail", "megatron-core": "fail"}
    assert verdicts(lines) == expected
    assert [line.found for line in lines if "no-such" in line.what] == ["not installed"]
    assert [line.found for line in lines if "megatron" in line.what] == ["0.18.0, needs ==0.19.2"]


def test_the_real_files_are_read() -> None:
    lines = list(doctor_packages.requirements(ROOT / "setup.py", ROOT / "constraints.txt"))
    assert {"torch", "megatron-core", "wandb"} <= {line.what for line in lines}
    assert "fail" not in verdicts(lines).values()


def test_a_python_without_packages_and_one_with_a_foreign_megatron(tmp_path: Path) -> None:
    bare = doctor("--only", "packages", "GPU", python=(sys.executable, "-S"))
    assert bare.returncode == 1 and "Traceback" not in bare.stdout + bare.stderr
    assert "fail megatron-core            not installed" in bare.stdout and "fail torch " in bare.stdout
    assert "mend first: megatron-core" in bare.stdout.splitlines()[-1]
    (tmp_path / "megatron" / "core").mkdir(parents=True)
    shadowed = doctor("--only", "packages", PYTHONPATH=str(tmp_path))
    assert shadowed.returncode == 1 and "PYTHONPATH" in shadowed.stdout and str(tmp_path / "megatron" / "core") in shadowed.stdout


def test_dataset_helpers(site: Path) -> None:
    assert only(doctor_packages.dataset_helpers()).verdict == "ok"
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    broken = site / "megatron" / "core" / "datasets" / f"helpers_cpp{suffix}"
    broken.parent.mkdir(parents=True)
    importlib.invalidate_caches()
    missing = only(doctor_packages.dataset_helpers())
    assert missing.verdict == "fail" and "not compiled" in missing.found
    broken.write_bytes(b"no library")
    unloadable = only(doctor_packages.dataset_helpers())
    assert unloadable.verdict == "fail" and "ImportError" in unloadable.found


def test_apex_is_nvidias_or_not(site: Path) -> None:
    assert only(doctor_packages.apex(False)).verdict == "ok"
    distribution(site, "apex", "0.9.10.dev0", "pyramid (>1.1.2)", "velruse", modules={"apex/__init__.py": "", "apex/models.py": ""})
    other = only(doctor_packages.apex(False))
    assert other.verdict == "fail" and "Pyramid" in other.found
    shutil.rmtree(site / "apex-0.9.10.dev0.dist-info")
    importlib.invalidate_caches()
    unnamed = only(doctor_packages.apex(False))
    assert unnamed.verdict == "fail" and "no apex.optimizers" in unnamed.found
    distribution(site, "apex", "0.1", modules={"apex/optimizers/fused_adam.py": ""})
    slow = only(doctor_packages.apex(True))
    assert slow.verdict == "warn" and "CUDA kernels" in slow.found
    (site / "amp_C.py").write_text("")
    importlib.invalidate_caches()
    assert only(doctor_packages.apex(True)) == ok("Apex", "NVIDIA's, 0.1")


def test_transformer_engine(site: Path) -> None:
    assert [only(doctor_packages.transformer_engine(has_gpu)).verdict for has_gpu in (False, True)] == ["ok", "warn"]
    broken = "raise ImportError('undefined symbol: _ZN3c10')"
    modules = {"transformer_engine/__init__.py": "", "transformer_engine/pytorch.py": broken}
    distribution(site, "transformer-engine", "2.10.0", modules=modules)
    line = only(iter(apart(lambda: doctor_packages.transformer_engine(True))))
    assert line.verdict == "fail" and "undefined symbol" in line.found and "--no-build-isolation" in line.mend
    (site / "transformer_engine" / "pytorch.py").write_text("")
    assert only(iter(apart(lambda: doctor_packages.transformer_engine(True)))).verdict == "ok"
    shutil.rmtree(site / "transformer_engine-2.10.0.dist-info")
    distribution(site, "transformer-engine", "2.9.0")
    assert "needs >=2.10" in only(doctor_packages.transformer_engine(False)).found


@pytest.mark.parametrize(
    ("triton", "capability", "tilelang", "verdict", "says"),
    [
        ("3.9.0", "9.0", False, "ok", "as torch asks"),
        ("3.5.0", "9.0", False, "fail", "Hopper"),
        ("3.5.0", "9.0", True, "warn", "built for"),
        ("3.5.0", "8.0", False, "warn", "built for"),
        ("3.2.0", "8.0", False, "fail", "needs >=3.3"),
    ],
)
def test_triton_pairs(site: Path, triton: str, capability: str, tilelang: bool, verdict: str, says: str) -> None:
    distribution(site, "torch", "2.15.0", 'triton~=3.9.0; platform_system == "Linux"', 'opt-einsum>=3.3; extra == "opt-einsum"')
    distribution(site, "flash-linear-attention", "0.6.0", modules={"fla/ops/gated_delta_rule.py": ""})
    distribution(site, "fla-core", "0.6.0", "einops", 'torch>=2.7.0; extra == "cuda"', 'triton>=3.3; extra == "cuda"')
    distribution(site, "triton", triton)
    if tilelang:
        distribution(site, "tilelang", "0.1.9")
    lines = {line.what: line for line in apart(lambda: doctor_packages.delta_kernels(True, capability))}
    assert lines["flash-linear-attention"] == ok("flash-linear-attention", "0.6.0")
    assert lines["Triton"].verdict == verdict and says in lines["Triton"].found


def test_without_flash_linear_attention() -> None:
    assert set(verdicts(doctor_packages.delta_kernels(False, "")).values()) == {"ok"}
    assert verdicts(doctor_packages.delta_kernels(True, "9.0"))["flash-linear-attention"] == "warn"


@pytest.mark.parametrize(("value", "verdict"), [(None, "ok"), ("false", "ok"), ("2", "warn")])
def test_tokenizers_parallelism(monkeypatch: pytest.MonkeyPatch, value: str | None, verdict: str) -> None:
    monkeypatch.delenv("TOKENIZERS_PARALLELISM")
    if value:
        monkeypatch.setenv("TOKENIZERS_PARALLELISM", value)
    assert only(doctor_packages.tokenizers_parallelism()).verdict == verdict


# GPUs and the machine


def test_nvidia_smi_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    rows = "NVIDIA H200, 9.0, 580.65, 143771, 4, Enabled, Enabled, 0\nNVIDIA H200, 9.0, 580.65, 143771, 9000, Disabled, Disabled, 3"
    program(tmp_path / "bin", "nvidia-smi", f"cat <<'E'\n{rows}\nE")
    found = doctor_machine.gpus()
    assert found[0] == Gpu("NVIDIA H200", "9.0", "580.65", 143771, 4, True, "Enabled", 0)
    lines = list(doctor_machine.driver(found, ""))
    assert lines[0] == ok("GPUs", "2 x NVIDIA H200, 140 GiB, compute capability 9.0, driver 580.65")
    assert [(line.what, line.verdict) for line in lines[1:]] == [
        ("GPU memory", "warn"),
        ("GPU memory", "fail"),
        ("GPU ECC", "warn"),
        ("GPU persistence", "warn"),
    ]
    assert all("GPU 1" in line.found for line in lines[1:3])
    program(tmp_path / "bin", "nvidia-smi", "echo; echo GB10, 12.1, 580.65, [N/A], [N/A], Enabled, [N/A], [N/A]")
    assert doctor_machine.gpus() == [Gpu("GB10", "12.1", "580.65", 0, 0, True, "[N/A]", 0)]
    program(tmp_path / "bin", "nvidia-smi", "echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18")
    with pytest.raises(OSError, match="version mismatch"):
        doctor_machine.gpus()


def test_gpus_that_are_missing_or_not_seen_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [line.found for line in doctor_machine.driver([], "")] == ["none"]
    assert only(doctor_machine.driver([], "broken")).verdict == "fail"
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    promised = only(doctor_machine.driver([H200], ""))
    assert promised.verdict == "fail" and "SLURM gave 8" in promised.found
    assert only(doctor_machine.torch_on([])).verdict == "ok"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    hidden = only(doctor_machine.torch_on([H200]))
    assert hidden.verdict == "fail" and "CUDA_VISIBLE_DEVICES is empty" in hidden.found


def test_a_torch_that_does_not_load(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise OSError('libcudart.so.13: cannot open shared object file')")
    done = doctor("--only", "GPU", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1 and "fail torch" in done.stdout and "libcudart" in done.stdout


@pytest.mark.parametrize(("threads", "verdict"), [(None, "ok"), ("1", "ok"), ("100000", "warn"), ("all", "warn")])
def test_cpus(monkeypatch: pytest.MonkeyPatch, threads: str | None, verdict: str) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    if threads:
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
    assert only(doctor_machine.cpus()).verdict == verdict


def test_memory(tmp_path: Path) -> None:
    assert only(doctor_machine.memory()).what == "memory"
    (tmp_path / "meminfo").write_text("MemTotal: 16000000 kB\nMemAvailable: 900000 kB\n")
    assert only(doctor_machine.memory(str(tmp_path / "meminfo"))).verdict == "warn"


def test_limits() -> None:
    def limited(infiniband: bool) -> Iterator[Line]:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, 65536))
        yield from doctor_machine.limits(infiniband)

    assert verdicts(iter(apart(lambda: limited(True)))) == {"open files": "warn", "locked memory": "fail"}
    assert verdicts(iter(apart(lambda: limited(False)))) == {"open files": "warn", "locked memory": "ok"}


# Network and services


def test_host_names() -> None:
    found = {
        (name, far): only(doctor_network.host_name(name, far)).verdict
        for name in ("localhost", "no-such-host.invalid", "192.0.2.1")
        for far in (False, True)
    }
    assert list(found.values()) == ["ok", "fail", "warn", "fail", "fail", "fail"]


def test_ports(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        assert verdicts(doctor_network.ports(launched=False)) == {"ports": "ok", "MASTER_PORT": "fail"}
        assert verdicts(doctor_network.ports(launched=True)) == {"ports": "ok"}
    assert verdicts(doctor_network.ports(launched=False)) == {"ports": "ok"}


@pytest.mark.parametrize(("value", "found"), [("lo", "ok"), ("l", "ok"), ("=l", "fail"), ("nope0", "fail"), ("^lo", None)])
def test_interfaces(monkeypatch: pytest.MonkeyPatch, value: str, found: str | None) -> None:
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", value)
    assert verdicts(doctor_network.interfaces()).get("NCCL_SOCKET_IFNAME") == found


def test_all_reduce_alone_and_with_a_peer_that_does_not_come() -> None:
    assert only(iter(apart(lambda: doctor_network.all_reduce("sum", "gloo", 0, 1, "", 0, 10)))).verdict == "ok"
    start = time.monotonic()
    lonely = only(iter(apart(lambda: doctor_network.all_reduce("sum", "gloo", 0, 2, "127.0.0.1", 0, 1))))
    assert lonely.verdict == "fail" and time.monotonic() - start < 15


def test_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(variable, raising=False)
    keys = tmp_path / "netrc"
    assert only(doctor_network.wandb(keys)).verdict == "warn"
    keys.write_text("machine api.wandb.ai login user password secret\n")
    line = only(doctor_network.wandb(keys))
    assert line.verdict == "ok" and "secret" not in line.found
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert only(doctor_network.wandb(keys)).verdict == "warn"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert "wandb sync" in only(doctor_network.wandb(keys)).found


def test_services_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "not" / "yet"))
    assert only(doctor_network.hugging_face()).verdict == "ok"
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for variable in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # nobody listens
        up, down = (f"http://127.0.0.1:{port}" for port in (server.server_port, closed.getsockname()[1]))
        monkeypatch.setenv("HF_ENDPOINT", up)
        monkeypatch.setenv("WANDB_BASE_URL", down)
        assert verdicts(doctor_network.reachable()) == {up: "ok", down: "warn"}
    server.shutdown()
    server.server_close()


# Files


def every_line(folder: Path) -> dict[str, str]:
    return verdicts(line for check in doctor_files.checks(folder) for line in examine(check, 20))


def test_a_good_run_folder_is_left_as_it_was(tmp_path: Path) -> None:
    found = every_line(tmp_path)
    assert len(found) == 10 and set(found.values()) <= {"ok", "warn"}  # the disk may be small, or slow just now
    assert {found[what] for what in ("rename of files", "rename of folders", "mmap", "exclusive creation", "flock", "fcntl lock")} == {"ok"}
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
        yield from doctor_files.run_folder(closed)

    line = only(iter(apart(as_nobody)))
    closed.rmdir()
    assert line.verdict == "fail" and "not writable" in line.found


def test_a_full_disk(full_disk: Path) -> None:
    found = every_line(full_disk)
    assert found["run folder"] == "warn"  # a tmpfs
    assert [found[what] for what in ("write and fsync", "space", "inodes")] == ["fail", "warn", "warn"]
    shared = only(doctor_machine.shared_memory(str(full_disk)))
    assert shared.verdict == "warn" and "0.00 GiB" in shared.found


def test_shared_memory_is_missing(tmp_path: Path) -> None:
    assert only(doctor_machine.shared_memory(str(tmp_path / "shm"))).verdict == "fail"


def test_a_limit_on_the_size_of_files(tmp_path: Path) -> None:
    def limited() -> Iterator[Line]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        yield from doctor_files.writes(tmp_path)

    line = only(iter(apart(limited)))
    assert line.verdict == "fail" and line.mend == "ulimit -f unlimited"


@pytest.mark.parametrize(("share", "verdict"), [(0.01, "ok"), (0.7, "warn"), (1.1, "fail")])
def test_space_for_the_next_checkpoint(tmp_path: Path, share: float, verdict: str) -> None:
    saved = tmp_path / "align" / "iter_0000005" / "shard"
    saved.parent.mkdir(parents=True)
    with open(saved, "wb") as file:
        file.truncate(int(share * shutil.disk_usage(tmp_path).free))  # a hole: takes no space
    assert verdicts(doctor_files.space(tmp_path))["space"] == verdict


def test_a_reader_notices_a_rename_that_is_not_atomic(tmp_path: Path) -> None:
    target = tmp_path / "target"
    found = []
    for content in (None, b"0" * 100, b"0" * 4095 + b"1", b"end"):
        if content is not None:
            target.write_bytes(content)
        found.append(doctor_files._read_until_end(target))
    assert found == [1, 1, 1, 0]


@pytest.mark.parametrize("lock", [fcntl.flock, fcntl.lockf])
def test_locks_are_tried_from_another_process(tmp_path: Path, lock: Callable[..., None]) -> None:
    def tries() -> Iterator[Line]:
        yield fail("try", str(doctor_files.try_lock(tmp_path / "lock", lock)), "")

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
JobRequeue              = {requeue}
KillWait                = {wait} sec
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


def install_slurm(folder: Path, nodes: str = "n1 idle\nn2 mixed", **config: str) -> None:
    text = CONFIG.format(**{"requeue": "1", "wait": "30", "preempt": "OFF", "more": "", **config})
    program(folder, "scontrol", f"cat <<'E'\n{text}E")
    program(folder, "sinfo", f"cat <<'E'\n{nodes}\nE")
    for name in ("srun", "sbatch"):
        program(folder, name, "")


def test_no_slurm(slurm_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert only(doctor_slurm.slurm()).verdict == "ok"
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert "container" in only(doctor_slurm.slurm()).found
    assert only(doctor_slurm.bash()).verdict == "fail"
    program(slurm_path, "bash", "echo 'GNU bash, version 3.2.57(1)-release (arm64)'")
    assert only(doctor_slurm.bash()).found == "3.2.57"
    program(slurm_path, "bash", "echo 'GNU bash, version 5.2.15(1)-release'")
    assert only(doctor_slurm.bash()).verdict == "ok"


def test_slurm_without_a_cluster(slurm_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_slurm(slurm_path)
    program(slurm_path, "scontrol", "echo 'scontrol: fatal: Could not establish a configuration source' >&2; exit 1")
    line = only(doctor_slurm.slurm())
    assert line.verdict == "warn" and line.found == "installed, but no cluster answers (Could not establish a configuration source)"
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert only(doctor_slurm.slurm()).verdict == "fail"


def test_a_slurm_that_suits_us(slurm_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_slurm(slurm_path, more="MaxBatchRequeue         = 5", requeue="0", preempt="REQUEUE")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    lines = {line.what: line for line in doctor_slurm.slurm()}
    assert {line.verdict for line in lines.values()} == {"ok"}
    assert "--requeue" in lines["JobRequeue"].found and lines["nodes"].found == "2 of 2 up"
    assert lines["allocation"].found == "job 7: 2 nodes, requeued 1 times"
    assert lines["SLURM"].found == "23.11.4, cluster tiny answers"


@pytest.mark.parametrize(
    ("config", "what", "verdict"),
    [
        ({"wait": "10"}, "KillWait", "warn"),
        ({"preempt": "CANCEL"}, "PreemptMode", "warn"),
        ({"preempt": "GANG,SUSPEND"}, "PreemptMode", "warn"),
        ({"more": "MaxBatchRequeue = 1"}, "MaxBatchRequeue", "warn"),
        ({"nodes": "n1 down*\nn2 drained"}, "nodes", "fail"),
        ({"nodes": "n1 down*\nn2 idle"}, "nodes", "ok"),
        ({"nodes": ""}, "nodes", "fail"),
    ],
)
def test_a_slurm_that_does_not(slurm_path: Path, config: dict[str, str], what: str, verdict: str) -> None:
    install_slurm(slurm_path, **config)
    assert verdicts(doctor_slurm.slurm())[what] == verdict


# The door


def test_help_needs_nothing() -> None:
    done = doctor("--help", python=(sys.executable, "-S", "-I"))
    assert done.returncode == 0 and "examples:" in done.stdout


def test_old_pythons_can_read_it() -> None:
    files = sorted(ROOT.glob("tools/doctor*.py"))
    assert files
    for path in files:
        ast.parse(path.read_text(), feature_version=(3, 8))


@pytest.mark.parametrize(
    "flags", [("--only", "nonsense"), ("--limit", "0"), ("--json", "/no/such/folder/report.json"), ("--json", "/"), ("--colour",)]
)
def test_bad_arguments(flags: tuple[str, ...]) -> None:
    done = doctor(*flags)
    assert done.returncode == 2 and "Traceback" not in done.stderr and done.stdout == ""


def test_the_report(tmp_path: Path) -> None:
    done = doctor("--only", "files", "machine", "--run-dir", str(tmp_path), "--json", str(tmp_path / "report.json"))
    assert done.returncode == 0, done.stdout
    lines = done.stdout.splitlines()
    assert lines[-1].startswith("CPU only: the tiny example") and "\x1b" not in done.stdout
    assert lines.index("machine") < lines.index("files")
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["summary"] == lines[-1] and report["counts"]["ok"] == sum(line["verdict"] == "ok" for line in report["lines"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json"]
    broken = doctor("--only", "files", "--run-dir", str(tmp_path / "missing"))
    assert broken.returncode == 1 and broken.stdout.splitlines()[-1].startswith("mend first: run folder")
