# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Every command line answers --help at once: with examples, and without importing what takes seconds."""

import os
import re
import subprocess
import sys

import pytest

from tests.support.paths import ROOT
from tools.benchmarks.start_up import commands

HEAVY = {"torch", "megatron", "transformers", "datasets", "matplotlib", "wandb"}
WAYS = {f"tools.convert {way}" for way in ("import", "hybridize", "export")}  # each has examples of its own
COMMANDS = sorted({*commands(), *WAYS} - {"tools.convert"})
RUN = f"""
import runpy, sys
try:
    runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
finally:
    print("heavy:", sorted({HEAVY!r} & set(sys.modules)))
"""


def test_the_commands_are_found() -> None:
    assert {"tools.benchmark", "tools.doctor", "hydra_mcore.train", "examples.tiny.demo"} < set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples_and_is_light(command: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    call = [sys.executable, "-c", RUN, *command.split(), "--help"]
    done = subprocess.run(call, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search("examples?:", done.stdout, re.IGNORECASE)
    assert done.stdout.endswith("heavy: []\n"), done.stdout[-200:]
