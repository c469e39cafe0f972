# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The commands of hydra_mcore, as ``hydra-mcore COMMAND`` or ``python -m hydra_mcore COMMAND``.

convert         converts Hugging Face to a checkpoint, a teacher to a student, and a checkpoint to Hugging Face
prepare_data    turns text into token shards
select_heads    chooses the heads of a teacher that keep full attention
train           trains a stage: align, distill or extend
evaluate        compares models by RULER's tasks and the loss on text
verify          checks that a checkpoint is what it claims to be
tune_log_scale  chooses the base of the log-position scale
plan            computes memory, time and cost of a recipe
doctor          says what this environment can run
study           compares variants of a recipe
benchmark       measures what HydraHead costs

Each command has its own --help. In a checkout, ``python tools/COMMAND.py`` does the same.

examples:
  hydra-mcore convert import --hf Qwen3-1.7B --out runs/a/teacher
  hydra-mcore train --stage align --config recipe.yaml
  torchrun --nproc-per-node 8 -m hydra_mcore select_heads --teacher runs/a/teacher --out runs/a/heads
"""

from __future__ import annotations

import contextlib
import re
import runpy
import sys
from pathlib import Path

import hydra_mcore

PACKAGE = Path(__file__).resolve().parent
COMMANDS = re.findall(r"(?m)^(\w+)  +\w", __doc__.split("\n\n")[1])


def main() -> None:
    """Run the command that the first argument names; exit status 2 with one line where there is no such command."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("--help", "-h"):
        with contextlib.suppress(BrokenPipeError):  # a pager that was left
            print(__doc__.strip(), flush=True)
    elif name == "--version":
        print(hydra_mcore.__version__)
    elif name not in COMMANDS:
        sys.exit(_refused(name))
    elif name == "train":
        del sys.argv[1]
        runpy.run_module("hydra_mcore.train", run_name="__main__", alter_sys=True)
    else:
        del sys.argv[1]
        runpy.run_path(str(_tools() / f"{name}.py"), run_name="__main__")


def _refused(name: str) -> int:
    print(f"hydra-mcore: no command {name!r}; choose from {', '.join(COMMANDS)}", file=sys.stderr)
    return 2


def _tools() -> Path:
    """The folder of the commands: inside the package where it came as a wheel, beside it in a checkout."""
    inside = PACKAGE / "commands_of_the_wheel" / "tools"
    return inside if inside.is_dir() else PACKAGE.parent / "tools"


if __name__ == "__main__":
    main()
