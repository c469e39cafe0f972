# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Installations of Transformer Engine and Apex that lack something, made as an installer would leave them, and what
hydra_mcore says to them.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from hydra_mcore.compat import accelerators
from tests.support.doctor import distribution
from tests.support.launch import run_ranks
from tests.support.paths import ROOT

TE_PYTHON = (
    ROOT / ".venv" / "te"
)  # Transformer Engine's own Python without its compiled parts; `make env` puts it there
TE_VERSION = "2.20.2"
ASKED = (*accelerators.TE, "transformer_engine.pytorch", *accelerators.APEX, "apex.optimizers")
needs_te = pytest.mark.skipif(not TE_PYTHON.exists(), reason="make env installs Transformer Engine's Python")
needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="libraries are compiled")


def te_python(site: Path) -> Path:
    """Transformer Engine's own Python in a folder of one's own, for compiled parts to be put beside it."""
    package = site / "transformer_engine"
    package.mkdir(parents=True)
    for path in (TE_PYTHON / "transformer_engine").iterdir():
        (package / path.name).symlink_to(path)
    info = f"transformer_engine-{TE_VERSION}.dist-info"
    (site / info).symlink_to(TE_PYTHON / info)
    return site


def te_core(site: Path, source: str = "", *flags: str, version: str = TE_VERSION) -> None:
    """The package of Transformer Engine's core library, which finds a CUDA runtime 13."""
    distribution(site, "transformer-engine-cu13", version)
    runtime = "int cudaRuntimeGetVersion(int *version) { *version = 13000; return 0; }"
    library(site / "transformer_engine" / "wheel_lib" / "libtransformer_engine.so", source + runtime, *flags)


def library(path: Path, source: str, *flags: str) -> None:
    """A shared library, compiled."""
    path.parent.mkdir(parents=True, exist_ok=True)
    command = ["cc", "-shared", "-fPIC", "-x", "c", "-", "-x", "none", "-o", str(path), *flags]
    subprocess.run(command, input=source, text=True, check=True)


def cuda(folder: Path) -> dict[str, str]:
    """A CUDA toolkit with the libraries that Transformer Engine opens by itself; returns the variable that names it."""
    for name in ("cudnn", "nvrtc", "curand"):
        library(folder / "lib" / f"lib{name}.so", "")
    return {"CUDA_HOME": str(folder)}


def decision(site: Path, on_cpu: bool = False, environment: Mapping[str, str] = {}) -> tuple[str, set[str]]:
    """What a process says that finds the packages of ``site``, with a GPU or without, and which of ``ASKED`` its
    Megatron-Core can then import.
    """
    (answer,) = run_ranks(_decided, 1, site, on_cpu, environment)
    return answer


def _decided(_rank: int, site: Path, on_cpu: bool, environment: Mapping[str, str]) -> tuple[str, set[str]]:
    for name in (*accelerators.TE, *accelerators.APEX):
        sys.modules.pop(name, None)  # conftest.py hid them
    os.environ.update(environment)
    sys.path.insert(0, str(site))
    importlib.invalidate_caches()
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            accelerators.choose(on_cpu)
        except accelerators.Unusable as unusable:
            return f"{unusable}\n", set()
    return said.getvalue(), set(filter(_is_there, ASKED))


def _is_there(module: str) -> bool:
    try:
        importlib.import_module(module)
    except ImportError:
        return False
    return True
