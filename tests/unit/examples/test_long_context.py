# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The tiny example's summary of several runs, some of which ended early."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples.tiny.long_context import main
from tests.support.answers import answered


def finished(folder: Path, accuracies: dict[str, dict[int, float]]) -> Path:
    answered(folder / "evaluation", accuracies)
    return folder


def test_summary_is_the_mean_of_the_runs_that_went_so_far(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = finished(tmp_path / "a", {"teacher": {512: 1.0, 32768: 0.0}, "teacher + YaRN x64": {512: 0.9, 32768: 0.5}})
    short = finished(tmp_path / "b", {"teacher": {512: 0.5}, "teacher + YaRN x64": {512: 0.7}})
    main(["--summary", str(whole), str(short)])
    assert capsys.readouterr().out == (
        "| single-key | 512 | 32K |\n| :-- | --: | --: |\n"
        "| teacher | 75 (100, 50) | 0 (0) |\n| teacher + YaRN x64 | 80 (90, 70) | 50 (50) |\n"
    )
    assert (whole / "long_context.png").read_bytes().startswith(b"\x89PNG") and not list(tmp_path.rglob("*.partial"))
