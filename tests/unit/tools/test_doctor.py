# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""tools/doctor.py: every check meets what it looks for, arranged for real where a process may do so."""

from __future__ import annotations

import importlib
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

from tests.support.doctor import apart, distribution, doctor, only, verdicts
from tools.doctor import packages
from tools.doctor.lines import Line, ok
from tools.doctor.wanted import allows

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


# packages


def test_requirements_against_setup_and_constraints(tmp_path: Path, site: Path) -> None:
    setup, constraints = tmp_path / "setup.py", tmp_path / "constraints.txt"
    setup.write_text(
        'setup(install_requires=["PyYAML>=6.0", "tqdm>=4", "numpy>=99", "no-such-package>=1", "megatron-core==0.19.2"])'
    )
    constraints.write_text("pyyaml==6.0.3  # why\ntqdm==4.0.1\n")
    distribution(site, "megatron-core", "0.18.0")
    distribution(site, "PyYAML", "6.0.3")
    lines = list(packages.requirements(setup, constraints))
    expected = {
        "Python": "ok",
        "PyYAML": "ok",
        "tqdm": "warn",
        "numpy": "fail",
        "no-such-package": "fail",
        "megatron-core": "fail",
    }
    assert verdicts(lines) == expected
    assert [line.found for line in lines if "no-such" in line.what] == ["not installed"]
    assert [line.found for line in lines if "megatron" in line.what] == ["0.18.0, needs ==0.19.2"]


def test_the_real_files_are_read() -> None:
    lines = list(packages.requirements())
    assert {"torch", "megatron-core", "wandb"} <= {line.what for line in lines}
    assert "fail" not in verdicts(lines).values()


def test_a_python_without_packages_and_one_with_a_foreign_megatron(tmp_path: Path) -> None:
    bare = doctor("--only", "packages", "GPU", python=(sys.executable, "-S"))
    assert bare.returncode == 1 and "Traceback" not in bare.stdout + bare.stderr
    assert "fail megatron-core            not installed" in bare.stdout and "fail torch " in bare.stdout
    assert "fix first: megatron-core" in bare.stdout.splitlines()[-1]
    (tmp_path / "megatron" / "core").mkdir(parents=True)
    shadowed = doctor("--only", "packages", PYTHONPATH=str(tmp_path))
    assert (
        shadowed.returncode == 1
        and "PYTHONPATH" in shadowed.stdout
        and str(tmp_path / "megatron" / "core") in shadowed.stdout
    )


@pytest.mark.parametrize(
    ("specifier", "inside", "outside"),
    [
        (">=2.9", ["2.9", "2.15.0+cu132", "2.10.0a0+nv25.12"], ["2.8.9", "2", "2.9.0a0+nv25.10"]),
        ("==0.19.2", ["0.19.2", "0.19.2+local"], ["0.19.3", "0.19.2rc1"]),
    ],
)
def test_versions_count_as_pip_counts_them(specifier: str, inside: list[str], outside: list[str]) -> None:
    assert all(allows(specifier, version) for version in inside)
    assert not any(allows(specifier, version) for version in outside)


def test_another_build_is_not_advised_in_nvidias_image(tmp_path: Path, site: Path) -> None:
    setup, constraints = tmp_path / "setup.py", tmp_path / "constraints.txt"
    setup.write_text('setup(install_requires=["torch>=2.9", "numpy>=2.0"])')
    constraints.write_text("torch==2.15.0\n")
    distribution(site, "torch", "2.9.0a0+145a3a7bda.nv25.10")
    _, torch, _ = packages.requirements(setup, constraints)
    assert torch.verdict == "fail" and torch.found.endswith("needs >=2.9; pip would put another build in its place")
    assert "docs/container.md" in torch.fix and "pip install" not in torch.fix
    shutil.rmtree(site / "torch-2.9.0a0+145a3a7bda.nv25.10.dist-info")
    distribution(site, "torch", "2.14.0a0+b2c75dd062.nv26.9.1")
    _, torch, _ = packages.requirements(setup, constraints)
    assert torch.verdict == "warn" and "tested with 2.15.0" in torch.found and "docs/container.md" in torch.fix


def test_dataset_helpers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert verdicts(iter(apart(packages.megatron, 120))) == {"Megatron-Core": "ok", "dataset helpers": "ok"}
    monkeypatch.setitem(sys.modules, "megatron.core.datasets.helpers_cpp", None)
    assert verdicts(iter(apart(packages.megatron, 120))) == {"Megatron-Core": "ok", "dataset helpers": "fail"}


def test_apex_is_nvidias_or_not(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "apex")  # conftest.py hid it
    monkeypatch.delitem(sys.modules, "amp_C")

    def said(has_gpu: bool = True) -> Line:
        return only(iter(apart(lambda: packages.apex(has_gpu))))

    assert said().found == "not installed; not needed"
    distribution(site, "apex", "0.9.10.dev0", modules={"apex/__init__.py": "", "apex/models.py": ""})
    assert said().verdict == "warn" and "is not NVIDIA's Apex" in said().found and "pip uninstall apex" in said().fix
    assert said(has_gpu=False) == ok("Apex", "hidden: it needs a GPU")
    modules = {f"apex/{name}.py": "" for name in ("optimizers/__init__", "optimizers/fused_adam", "multi_tensor_apply")}
    distribution(site, "apex", "0.1", modules=modules)
    assert said().verdict == "warn" and "No module named 'amp_C'" in said().found and "build it" in said().fix
    (site / "amp_C.py").write_text("")
    importlib.invalidate_caches()
    assert said() == ok("Apex", "NVIDIA's")


def test_transformer_engine(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "transformer_engine")

    def said(has_gpu: bool = True) -> Line:
        return only(iter(apart(lambda: packages.transformer_engine(has_gpu))))

    assert said(has_gpu=False) == ok("Transformer Engine", "not installed; it needs a GPU")
    assert said().verdict == "warn" and "FP8" in said().found and said().fix.endswith("[te]")
    modules = {"transformer_engine/__init__.py": "", "transformer_engine/pytorch.py": "raise OSError('no libcurand')"}
    distribution(site, "transformer-engine", "2.20.2", modules=modules)
    assert said(has_gpu=False) == ok("Transformer Engine", "2.20.2, hidden: it needs a GPU")
    assert said().verdict == "fail" and "no libcurand" in said().found and "--force-reinstall" in said().fix
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    megatron = only(iter(apart(packages.megatron)))
    assert (
        megatron.verdict == "fail" and "Transformer Engine" in megatron.found and "Transformer Engine" in megatron.fix
    )
    (site / "transformer_engine" / "pytorch.py").write_text("")
    assert said() == ok("Transformer Engine", "2.20.2")


def test_flash_linear_attention(site: Path) -> None:
    def said(has_gpu: bool = True) -> Line:
        return only(iter(apart(lambda: packages.flash_linear_attention(has_gpu))))

    assert [said(has_gpu).verdict for has_gpu in (False, True)] == ["ok", "warn"] and "[kernels]" in said().fix
    modules = {"fla/__init__.py": "", "fla/ops/gated_delta_rule.py": "raise ImportError('undefined symbol: _ZN3')"}
    distribution(site, "flash-linear-attention", "0.6.1", modules=modules)
    assert said().verdict == "fail" and "undefined symbol" in said().found and "reinstall" in said().fix
    (site / "fla" / "ops" / "gated_delta_rule.py").write_text("")
    assert said() == ok("flash-linear-attention", "0.6.1")
    shutil.rmtree(site / "flash_linear_attention-0.6.1.dist-info")
    distribution(site, "flash-linear-attention", "0.1")
    assert "needs >=" in said(has_gpu=False).found


@pytest.mark.parametrize(
    ("version", "capability", "tilelang", "verdict"),
    [
        ("3.9.0", "9.0", False, "ok"),
        ("3.5.0", "9.0", False, "fail"),
        ("3.5.0", "9.0", True, "ok"),
        ("3.5.0", "8.0", False, "ok"),
        ("3.7.0", "9.0", False, "fail"),
        ("3.7.1", "9.0", False, "ok"),
    ],
)
def test_a_triton_with_wrong_gradients(site: Path, version: str, capability: str, tilelang: bool, verdict: str) -> None:
    distribution(site, "triton", version)
    if tilelang:
        distribution(site, "tilelang", "0.1.9")
    assert only(packages.triton(capability)).verdict == verdict


def test_nvidias_triton_is_seen_by_its_other_name(site: Path) -> None:
    distribution(site, "pytorch-triton", "3.6.0+nvinternal")
    assert only(packages.triton("9.0")).verdict == "fail"


# The command


@pytest.mark.skipif(shutil.which("python3.11") is None, reason="needs a Python that is too old")
def test_an_old_python_is_told_so() -> None:
    done = doctor(python=("python3.11",))
    assert done.returncode == 1 and done.stderr.startswith("doctor: this Python is too old") and not done.stdout


def test_help_needs_nothing() -> None:
    done = doctor("--help", python=(sys.executable, "-S", "-I"))
    assert done.returncode == 0 and "examples:" in done.stdout


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
    assert broken.returncode == 1 and broken.stdout.splitlines()[-1].startswith("fix first: run folder")
