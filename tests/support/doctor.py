# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""What tests of tools/doctor.py share: running checks, and programs and packages that are not what they seem."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.support.paths import ROOT
from tools.doctor.lines import Check, Line, examine

DOCTOR = ROOT / "tools" / "doctor.py"


def verdicts(lines: Iterator[Line]) -> dict[str, str]:
    return {line.what: line.verdict for line in lines}


def only(lines: Iterator[Line]) -> Line:
    (line,) = lines
    assert bool(line.fix) == (line.verdict != "ok")
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
