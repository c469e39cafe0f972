# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""kill -9 at random moments of training, saving and pruning: the stage always goes on, as if it had never been
stopped.
"""

import contextlib
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from hydra_mcore.commands import end_with_parent
from hydra_mcore.model.checkpoints import TRACKER, check_complete, iterations, latest_iteration
from hydra_mcore.train.checkpoint_care import resumable
from tests.support.launch import run_ranks
from tests.support.stages import FLAGS, make_run

STEPS, INTERVAL = 24, 2
SCHEDULE = (
    "--train-iters",
    str(STEPS),
    "--save-interval",
    str(INTERVAL),
    "--keep-every",
    "8",
    "--micro-batch-size",
    "1",
)
TAGS = ("extend loss", "grad-norm", "learning-rate")
ASYNC = ("--async-save",)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("kills"))


@pytest.mark.parametrize(
    ("ranks", "flags", "kills"),
    [
        pytest.param(1, (), 3, id="sync-3"),
        pytest.param(1, (), 25, id="sync-25", marks=[pytest.mark.slow, pytest.mark.timeout(600)]),
        pytest.param(2, (), 10, id="sync-dp2-10", marks=[pytest.mark.slow, pytest.mark.timeout(600)]),
        pytest.param(1, ASYNC, 10, id="async-10", marks=[pytest.mark.slow, pytest.mark.timeout(600)]),
        pytest.param(2, ASYNC, 5, id="async-dp2-5", marks=[pytest.mark.slow, pytest.mark.timeout(600)]),
    ],
)
def test_killed_at_random_moments(folder: Path, ranks: int, flags: tuple[str, ...], kills: int) -> None:
    name = f"{ranks}-{'async' if flags else 'sync'}-{kills}"
    began = time.monotonic()
    whole = Run(folder, f"whole-{name}", ranks)
    whole.finish(whole.start())
    moments, took = random.Random(kills), time.monotonic() - began
    runs = (Run(folder, f"killed-{name}-{number}", ranks, flags) for number in range(kills))
    run = next(runs)
    for _ in range(kills):
        job = run.start()
        if run.killed(
            job, run.moment(moments, 1.5 * took + (5 if flags else 0))
        ):  # a background writer starts in seconds
            run.check_what_is_left()
        else:  # it was faster than its kill: that counts as none of them losing anything, and the next run is a new one
            run.check_equals(whole)
            run = next(runs)
    run.finish(run.start())
    run.check_equals(whole)


class Run:
    """Stage extend in a folder, started as real processes as often as it takes; every step's values are journalled at
    once.
    """

    def __init__(self, folder: Path, name: str, ranks: int, flags: tuple[str, ...] = ()) -> None:
        self.save, self.journal, self.ranks = folder / name / "extend", folder / f"{name}.journal", ranks
        self.argv = [
            "--stage",
            "extend",
            "--run-dir",
            str(folder / name),
            "--start-from",
            str(folder / "student"),
            *FLAGS,
        ]
        self.argv += [
            "--data-path",
            str(folder / "data"),
            "--data-cache-path",
            str(folder / "cache"),
            *SCHEDULE,
            *flags,
        ]
        self.tracked = 0

    def start(self) -> int:
        """Fork the process that launches the ranks; they die with it."""
        if pid := os.fork():
            return pid
        code = 1
        try:
            end_with_parent(signal.SIGKILL)
            log = os.open(self.journal.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            signal.setitimer(signal.ITIMER_REAL, 0)  # pytest's time-out
            run_ranks(_train, self.ranks, self.argv, self.journal)
            code = 0
        except BaseException as error:
            os.write(2, str(error).encode())
        finally:
            os._exit(code)

    def finish(self, job: int) -> None:
        code = os.waitstatus_to_exitcode(os.waitpid(job, 0)[1])
        assert code == 0, self.journal.with_suffix(".log").read_text()[-4000:]

    def killed(self, job: int, moment: Callable[[], bool]) -> bool:
        """Kill the job when the moment has come, and see that no process of it stays; False when it ended before."""
        while not moment():
            if os.waitid(os.P_PID, job, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                self.finish(job)
                return False
            with contextlib.suppress(OSError, ValueError):
                self.tracked = max(self.tracked, int((self.save / TRACKER).read_text()))
            time.sleep(0.0005)
        ranks = [int(pid) for pid in Path(f"/proc/{job}/task/{job}/children").read_text().split()]
        os.kill(job, signal.SIGKILL)
        os.waitpid(job, 0)
        deadline = time.monotonic() + 60  # a writer that is still importing looks for its trainer after that
        for rank in ranks:  # each is a process group with the helpers it started
            while _group_lives(rank):
                assert time.monotonic() < deadline, f"a process of the killed rank {rank} stays"
                time.sleep(0.01)
        return True

    def moment(self, moments: random.Random, longest_s: float) -> Callable[[], bool]:
        """A random time of the whole run, or shortly after a random event: a save begins, one is complete, one is
        removed.
        """
        began, seen = time.monotonic(), _entries(self.save)
        kind = moments.choice(["time", "iter_*", "iter_*", TRACKER, "removing_*"])
        wait, left = (
            (moments.uniform(0.0, longest_s), 0)
            if kind == "time"
            else (moments.uniform(0.0, 0.06), moments.randint(1, 3))
        )
        state = {"left": left, "at": began + wait if kind == "time" else None}

        def come() -> bool:
            if state["at"] is None:
                fresh = {name for name in _entries(self.save, kind) if name not in seen}
                seen.update(fresh)
                state["left"] -= len(fresh)
                if state["left"] <= 0:
                    state["at"] = time.monotonic() + wait
            return state["at"] is not None and time.monotonic() >= state["at"]

        return come

    def check_what_is_left(self) -> None:
        """The newest checkpoint that ever counted still does, and no more than an interval of training is lost with a
        plain save.
        """
        found = resumable(self.save)
        step = int(found.name.removeprefix("iter_")) if found else 0
        assert step >= self.tracked
        if "--async-save" not in self.argv:
            assert step >= max((s for _, s, _ in self.values()), default=0) - INTERVAL

    def values(self) -> Iterator[tuple[str, int, str]]:
        for line in self.journal.read_text().splitlines() if self.journal.is_file() else []:
            tag, step, value = line.split("\t")
            yield tag, int(step), value

    def check_equals(self, whole: "Run") -> None:
        """Every value that any of its processes logged is that of the uninterrupted run, no step is missing; so is the
        result.
        """
        reference = {(tag, step): value for tag, step, value in whole.values()}
        logged = list(self.values())
        assert {(tag, step) for tag, step, _ in logged} == set(reference) and len(reference) == len(TAGS) * STEPS
        for tag, step, value in logged:
            assert value == reference[tag, step], f"{tag} at step {step}"
        assert iterations(self.save).keys() == {8, 16, STEPS - INTERVAL, STEPS}
        for step_folder in iterations(self.save).values():
            check_complete(step_folder)
        assert not list(self.save.glob("removing_*"))
        mine, theirs = (_state(latest_iteration(run.save)) for run in (self, whole))
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def _train(rank: int, argv: list[str], journal: Path) -> None:
    """A stage whose every logged value is on the disk at once, and whose removals take a while, so that kills meet
    them.
    """
    from torch.utils.tensorboard import SummaryWriter

    from hydra_mcore.train.__main__ import main

    add, rmtree = SummaryWriter.add_scalar, shutil.rmtree
    line = os.open(journal, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def add_scalar(self: SummaryWriter, tag: str, value: Any, step: int) -> None:
        if tag in TAGS:
            os.write(line, f"{tag}\t{step}\t{float(value)!r}\n".encode())
        add(self, tag, value, step)

    def slow_rmtree(path: Path, *args: Any, **keywords: Any) -> None:
        time.sleep(0.01)
        rmtree(path, *args, **keywords)

    SummaryWriter.add_scalar, shutil.rmtree = add_scalar, slow_rmtree
    main(argv)


def _entries(save: Path, pattern: str = "*") -> set[str]:
    """Names in a folder; the tracker's with what it says."""
    names = {path.name for path in save.glob(pattern)}
    if TRACKER in names:
        with contextlib.suppress(OSError):
            names = names - {TRACKER} | {TRACKER + (save / TRACKER).read_text()}
    return names


def _group_lives(group: int) -> bool:
    """Whether a process group has a member that is not just waiting to be collected."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, member_of = stat.read_text().rpartition(")")[2].split()[:3]
            if int(member_of) == group and state != "Z":
                return True
    return False


def _state(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint."""
    reader = dcp.FileSystemReader(checkpoint)
    entries = reader.read_metadata().state_dict_metadata
    state = {
        name: torch.zeros(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries.items()
        if hasattr(entry, "size")
    }
    dcp.load(state, storage_reader=reader, no_dist=True)
    return state
