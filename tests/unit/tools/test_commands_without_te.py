# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Every command that imports Megatron-Core, where Transformer Engine is half installed: one line on a GPU, and on a CPU
nothing is noticed.

``import megatron.core`` raises there.  So the one line also shows that a command decides before it imports the engine.
"""

import importlib
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from hydra_mcore.compat import accelerators
from tests.support.accelerators import TE_PYTHON, needs_te
from tests.support.commands import ended
from tests.support.launch import run_ranks
from tests.support.paths import ROOT, TINY_TEACHER
from tests.support.stages import FLAGS, logged, make_run

pytestmark = needs_te
TINY = TINY_TEACHER.parent
OUT = ("--out", "out")
COMMANDS = {
    "hydra_mcore.train.__main__": ("--stage", "align", "--run-dir", "out", "--teacher", "teacher"),
    "tools.convert": ("import", "--hf", str(TINY_TEACHER), *OUT),
    "tools.select_heads": ("--teacher", "teacher", *OUT),
    "tools.evaluate": ("--models", "a=teacher", "--lengths", "64", *OUT),
    "tools.verify": ("student",),
    "tools.plan.__main__": ("--config", str(TINY / "recipe.yaml"), "--hf", str(TINY_TEACHER)),
    "tools.prepare_data": ("--input", "text.txt", "--tokenizer", str(TINY_TEACHER), *OUT),
    "tools.tune_log_scale": ("--checkpoint", "student", "--text", "text.txt", "--length", "64"),
    "tools.benchmark": ("layer",),
    "tools.benchmark delta-rule": ("delta-rule",),
    "examples.tiny.demo": OUT,
}


def started(_rank: int, module: str, argv: Sequence[str], folder: Path) -> tuple[Any, str]:
    """Exit status and stderr of a command in a process without Megatron-Core, on what looks like a GPU."""
    ours = {"megatron", "hydra_mcore", "tools", "examples", *accelerators.TE, *accelerators.APEX}
    for name in [name for name in sys.modules if name.partition(".")[0] in ours]:
        del sys.modules[name]
    torch.cuda.is_available = lambda: True
    sys.path.append(str(TE_PYTHON))
    os.chdir(folder)
    return ended(importlib.import_module(module).main, argv)


@pytest.mark.parametrize("command", COMMANDS)
def test_on_a_gpu_a_command_ends_in_one_line(command: str, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("some text")
    for folder in ("teacher", "student"):  # a path that is not there is refused earlier
        (tmp_path / folder).mkdir()
    (answer,) = run_ranks(started, 1, command.split()[0], COMMANDS[command], tmp_path)
    status, said = answer
    assert status == 2 and said.count("\n") == 1, said
    assert ": Transformer Engine does not load (Found empty `transformer-engine` meta package" in said
    assert not (tmp_path / "out").exists()


@needs_te
def test_a_rank_of_verify_decides_first() -> None:
    with pytest.raises(AssertionError, match="Unusable: Transformer Engine does not load"):
        run_ranks(started, 1, "hydra_mcore.evaluation.layout_logits", (), Path())


@pytest.mark.slow
def test_on_a_cpu_training_works(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    command = [sys.executable, "-m", "hydra_mcore.train", "--stage", "align", "--run-dir", str(folder / "run")]
    command += ["--teacher", str(folder / "teacher"), "--start-from", str(folder / "student")]
    command += ["--data-path", str(folder / "data"), *FLAGS, "--train-iters", "1", "--lr-warmup-iters", "0"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, TE_PYTHON)))}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    assert list(logged(folder / "run" / "align" / "tensorboard")["align loss"]) == [1]
