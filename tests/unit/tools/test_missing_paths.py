# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""A file or folder that is missing is refused in one line, before torch and Megatron-Core are imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

MISSING, HERE = "./nowhere", "."
# By command, what it needs beside the flags that it reads; then these flags.
COMMANDS = {
    "tools.convert import": ("--out out", "--hf"),
    "tools.convert hybridize": ("--out out", "--teacher --head-map --text --scores"),
    "tools.convert export": ("--out out", "--checkpoint --evaluation"),
    "tools.select_heads": ("--out out", "--teacher --scores --template --text --probe"),
    "tools.evaluate": ("--out out --lengths 8", "--models --text"),
    "tools.prepare_data": ("--out out", "--input --model --tokenizer"),
    "tools.tune_log_scale": ("--length 8", "--checkpoint --text"),
    "tools.verify .": ("", "--teacher --export --hf --text"),
    "tools.verify": ("", "CHECKPOINT"),
    "tools.plan.__main__": ("", "--config"),
    "tools.plan.__main__ --config .": ("", "--hf --head-map"),
    "tools.study run": ("", "STUDY"),
    "tools.benchmark decode": ("", "--teacher-hf --hf"),
    "tools.benchmark imitation": ("", "--teacher --text"),
    "hydra_mcore.train.__main__ --stage align": ("--run-dir out", "--config"),
    "hydra_mcore.train.__main__ --stage distill": ("--run-dir out", "--teacher --start-from"),
}
CHILD = """
import contextlib, importlib, io, json, sys
for module, argv in json.load(sys.stdin):
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            importlib.import_module(module).main(argv)
            status = 0
        except SystemExit as end:
            status = end.code
    print(json.dumps([status, said.getvalue(), sorted({"torch", "megatron"} & sys.modules.keys())]))
"""
CASES = [(command, flag) for command, (_, flags) in COMMANDS.items() for flag in flags.split()]


def arguments(command: str, missing: str) -> tuple[str, list[str]]:
    """The module and a command line in which all that is read is there but for one."""
    module, *words = command.split()
    needed, flags = COMMANDS[command]
    for flag in flags.split():
        path = MISSING if flag == missing else HERE
        words += [path] if flag.isupper() else [flag, f"own={path}" if flag in ("--probe", "--models") else path]
    return module, [*words, *needed.split()]


def run_each(commands: list[tuple[str, list[str]]]) -> list[tuple[int, str, list[str]]]:
    """Exit status, stderr and which of the heavy packages are loaded by then; one process for all."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD], cwd=ROOT, input=json.dumps(commands), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return list(map(json.loads, done.stdout.splitlines()))


@pytest.fixture(scope="module")
def outcomes() -> dict[tuple[str, str], tuple[int, str, list[str]]]:
    return dict(zip(CASES, run_each([arguments(*case) for case in CASES]), strict=True))


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_a_missing_path_is_refused_at_once(case: tuple[str, str], outcomes: dict) -> None:
    status, said, loaded = outcomes[case]
    assert status == 2 and said.count("\n") == 1 and Path(MISSING).name in said and not loaded, (said, loaded)


def test_a_stage_without_a_run_folder_or_a_teacher_is_refused_at_once() -> None:
    recipe = ["--config", "examples/tiny/recipe.yaml", "--dry-run"]
    lines = [["--stage", "extend", *recipe], ["--stage", "align", *recipe, "--run-dir", "out"]]
    first, second = run_each([("hydra_mcore.train.__main__", line) for line in lines])
    assert first == [2, "train: no run folder: set run-dir in the recipe or on the command line\n", []]
    assert second[0] == 2 and second[1].startswith("train: stage align needs the teacher: ") and not second[2]
