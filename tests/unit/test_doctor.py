# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""tools/doctor.py: every check meets what it looks for, arranged for real where a process may do so."""

from __future__ import annotations

import ast
import importlib.machinery
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.doctor import ROOT, apart, distribution, doctor, only, verdicts
from tools import doctor_packages
from tools.doctor_lines import Line, allows, ok

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # other tests' threads hold no lock of ours


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that Python looks into before its own packages."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    return folder


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
    setup.write_text(
        'setup(install_requires=["PyYAML>=6.0", "tqdm>=4", "numpy>=99", "no-such-package>=1", "megatron-core==0.19.2"])'
    )
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
    assert (
        shadowed.returncode == 1
        and "PYTHONPATH" in shadowed.stdout
        and str(tmp_path / "megatron" / "core") in shadowed.stdout
    )


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
    distribution(
        site,
        "apex",
        "0.9.10.dev0",
        "pyramid (>1.1.2)",
        "velruse",
        modules={"apex/__init__.py": "", "apex/models.py": ""},
    )
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
    distribution(
        site, "torch", "2.15.0", 'triton~=3.9.0; platform_system == "Linux"', 'opt-einsum>=3.3; extra == "opt-einsum"'
    )
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
    "flags",
    [
        ("--only", "nonsense"),
        ("--limit", "0"),
        ("--json", "/no/such/folder/report.json"),
        ("--json", "/"),
        ("--colour",),
    ],
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
    assert report["summary"] == lines[-1] and report["counts"]["ok"] == sum(
        line["verdict"] == "ok" for line in report["lines"]
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json"]
    broken = doctor("--only", "files", "--run-dir", str(tmp_path / "missing"))
    assert broken.returncode == 1 and broken.stdout.splitlines()[-1].startswith("mend first: run folder")
