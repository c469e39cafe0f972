# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The tiny example's study of kinds: what it would do, what it sums up, and that a kill costs no finished student."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from examples.tiny.kinds import main
from examples.tiny.kinds_run import CHOICES, LENGTHS
from hydra_mcore.heads import HeadMap
from hydra_mcore.kinds import KINDS
from hydra_mcore.selection.choose import linear_kinds
from tests.support.answers import answered
from tests.support.commands import ended
from tests.support.paths import ROOT

KIND = linear_kinds()[0]
LABEL = KINDS[KIND].label
SHORT = """
lr-warmup-iters: 1
align: {train-iters: 2}
distill: {train-iters: 2}
extend: {train-iters: 2, lr-warmup-iters: 1}
"""


def test_dry_run_counts_the_students_that_are_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, recipe = tmp_path / "run", tmp_path / "short.yaml"
    recipe.write_text(SHORT)
    asked = ["--out", str(out), "--kinds", KIND, "--prompts", "1", "--recipe", str(recipe), "--dry-run"]
    main(asked)
    first = capsys.readouterr().out.splitlines()
    assert first[0] == f"would make 5 students in {out}; 0 are there already"
    assert first[1] == (
        "tokens of each: align 4,096, distill 4,096, extend 8,192; 46,080 of prompts to answer, 6 tasks at"
        " 512, 1K, 2K, 4K"
    )
    assert re.fullmatch(r"about \d+ minutes on two cores", first[2])
    assert not out.exists()
    answered(out / "evaluation" / f"{LABEL}-random-3to1", {f"{LABEL} random 3:1": {512: 1.0}})
    main(asked)
    assert capsys.readouterr().out.startswith(f"would make 4 students in {out}; 1 are there already\n")


def test_summary_has_every_kind_and_the_mean_of_the_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs, labels = [tmp_path / "a", tmp_path / "b"], [KINDS[kind].label for kind in linear_kinds()]
    for run, share in zip(runs, (0.5, 1.0), strict=True):
        answered(run / "evaluation" / "teacher", {"teacher": {512: share, 4096: 0.0}})
        for label in labels:
            answered(
                run / "evaluation" / f"{label}-random-7to1", {f"{label} random 7:1": {512: 0.1, 4096: share}}, 30.0
            )
    main(["--summary", *map(str, runs)])
    rows = "".join(f"| {label} random 7:1 | 10 (10, 10) | 75 (50, 100) |\n" for label in labels)
    losses = "".join(f"| {label} random 7:1 | 30.0 (30.0, 30.0) | 30.0 (30.0, 30.0) |\n" for label in labels)
    assert capsys.readouterr().out == (
        f"| single-key | 512 | 4K |\n| :-- | --: | --: |\n| teacher | 75 (50, 100) | 0 (0, 0) |\n{rows}\n"
        f"| perplexity | 512 | 4K |\n| :-- | --: | --: |\n| teacher | 20.0 (20.0, 20.0) | 20.0 (20.0, 20.0) |\n{losses}"
    )
    assert (runs[0] / "kinds.png").read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_summed_up_or_gone_on_with_is_one_line(tmp_path: Path) -> None:
    line = f"kinds: {tmp_path}: no model has been evaluated there; run without --summary first\n"
    assert ended(main, ["--summary", str(tmp_path)]) == (2, line)
    (tmp_path / "study.json").write_text(json.dumps({"seed": 0, "prompts": 20}))
    status, said = ended(main, ["--out", str(tmp_path), "--seed", "1"])
    assert status == 2
    assert said.endswith(f"kinds: {tmp_path}: holds students of other seed (0); choose another --out\n")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_run_that_is_killed_goes_on_and_finished_students_stay(tmp_path: Path) -> None:
    out, recipe, left = tmp_path / "run", tmp_path / "short.yaml", f"{LABEL}-selected-7to1"
    recipe.write_text(SHORT)
    for choice in ("teacher", *(f"{LABEL} {name}" for name, *_ in CHOICES)):
        place = choice.replace(" ", "-").replace(":", "to")
        if place != left:  # one student is enough to wait for
            answers = {choice: dict.fromkeys(LENGTHS, 0.5)}
            answered(out / "evaluation" / place, answers, groups=("single-key", "multi-key"))
    command = [sys.executable, "-m", "examples.tiny.kinds", "--kinds", KIND, "--prompts", "1"]
    command += ["--out", str(out), "--recipe", str(recipe)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    first = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
    align = out / left / "align" / "latest_checkpointed_iteration.txt"
    while not align.exists():
        assert first.poll() is None
        time.sleep(0.1)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    kept = (align, out / "align.bin", out / "scores" / "scores.json", *out.glob("evaluation/*/results.json"))
    before = {path: path.stat().st_mtime_ns for path in kept}
    said = subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    assert {path: path.stat().st_mtime_ns for path in before} == before and len(before) == 3 + 5
    assert len(re.findall(rf"^\| {LABEL} ", said, re.MULTILINE)) == 3 * len(CHOICES)  # two groups of needles, the text
    made = [path.relative_to(out).parts[0] for path in out.glob("*/extend/iter_0000002")]
    head_map = HeadMap.load(out / left / "extend" / "head_map.json")
    assert made == [left] and (head_map.num_fa, len(head_map.heads_of(KIND))) == (4, 28)
