# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""How a command is started on this machine, by a study or an example."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path

TAIL = 15  # lines


def command(words: Iterable[object], ranks: int = 1) -> list[str]:
    """Python with these arguments, on as many ranks."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)) if ranks > 1 else ()
    return [sys.executable, *launcher, *map(str, words)]


def environment(processes: int = 1) -> dict[str, str]:
    """For one of so many processes that share the cores: its threads, W&B offline unless it is set otherwise.

    A core for each process: one process with two threads takes half as long again for a step of align.
    """
    threads = str(max(1, usable_cores() // processes))
    own = {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": threads, "WANDB_MODE": os.environ.get("WANDB_MODE", "offline")}
    return {**os.environ, **own}


def end_of(log: Path) -> str:
    """The last lines of a command's output, which say why it failed."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-TAIL:])


def usable_cores() -> int:
    """The number of cores of this machine that this process may use."""
    return len(os.sched_getaffinity(0))
