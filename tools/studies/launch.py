# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""How commands are started on this machine, by a study or an example."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from threading import Event

from hydra_mcore.commands import end_with_parent
from hydra_mcore.recipe import Recipe
from hydra_mcore.stages import default_flags

ROOT = Path(__file__).resolve().parents[2]
TAIL = 15  # lines


def environment(processes: int = 1) -> dict[str, str]:
    """For one of so many processes that share the cores: its threads, W&B offline unless it is set otherwise.

    A core for each process: one process with two threads takes half as long again for a step of align.
    """
    threads = str(max(1, usable_cores() // processes))
    own = {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": threads, "WANDB_MODE": os.environ.get("WANDB_MODE", "offline")}
    return {**os.environ, **own}


def run_logged(words: Sequence[str], own: Mapping[str, str], log: Path) -> int:
    """Run a command from the checkout, add its output to a log, and return its exit status."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as sink:
        sink.write(f"$ {shlex.join(words)}\n")
        sink.flush()
        streams = {"stdout": sink, "stderr": sink}
        return subprocess.run(words, cwd=ROOT, env=own, preexec_fn=end_with_parent, check=False, **streams).returncode


def end_of(log: Path) -> str:
    """The last lines of a command's output, which say why it failed."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-TAIL:])


def usable_cores() -> int:
    """The number of cores of this machine that this process may use."""
    return len(os.sched_getaffinity(0))


def trained(stage: Path, recipes: Sequence[Path]) -> bool:
    """Whether a stage's last checkpoint is in its folder: training that is asked to stop saves and ends well."""
    from hydra_mcore.model.checkpoints import TRACKER  # takes seconds: not for --help

    newest = stage / TRACKER
    wanted = (default_flags(stage.name) | Recipe.load(recipes, stage.name).values)["train-iters"]
    return newest.exists() and newest.read_text().strip() == str(wanted)


def side_by_side(jobs: Sequence[Callable[[Event], None]], at_once: int) -> None:
    """So many at a time; after one that fails, or a Ctrl-C, no other step begins."""
    stop = Event()

    def guarded(job: Callable[[Event], None]) -> None:
        try:
            if not stop.is_set():
                job(stop)
        except BaseException:
            stop.set()  # here, as this thread takes the next job at once
            raise

    with ThreadPoolExecutor(at_once) as pool:
        try:
            for done in as_completed([pool.submit(guarded, job) for job in jobs]):
                done.result()
        finally:
            stop.set()
