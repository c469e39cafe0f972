# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Signals, failing disks and dying writers, with whole stages: training stops in time, says why, and goes on where it
was.
"""

import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hydra_mcore.model.checkpoints import TRACKER, iterations, latest_iteration
from hydra_mcore.train import checkpoint_care
from tests.support.commands import ended
from tests.support.launch import run_ranks
from tests.support.stages import FLAGS, make_run, run_stage

SCHEDULE = ("--train-iters", "8", "--save-interval", "2", "--micro-batch-size", "1")
ASYNC = ("--async-save",)
TAGS = ("extend loss", "grad-norm", "learning-rate")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("care"))


@pytest.fixture(scope="module")
def whole(folder: Path) -> dict[str, dict[int, float]]:
    return run_stage(folder, "extend", 1, *SCHEDULE, run="whole")


def disturbed(
    folder: Path, run: str, *flags: str, ranks: int = 1, at: int = 0, act: Callable[[], None] = lambda: None
) -> tuple[int, str]:
    """Run stage extend, calling ``act`` on every rank after step ``at`` (0: models are built, -1: at once): exit
    status, stderr.
    """
    argv = ["--stage", "extend", "--run-dir", str(folder / run), "--start-from", str(folder / "student"), *FLAGS]
    argv += ["--data-path", str(folder / "data"), "--data-cache-path", str(folder / "cache"), *SCHEDULE, *flags]
    return run_ranks(_disturbed, ranks, argv, at, act, timeout=100)[0]


def _disturbed(rank: int, argv: list[str], at: int, act: Callable[[], None]) -> tuple[int, str]:
    from megatron.training import training

    from hydra_mcore.train import run as stage_run
    from hydra_mcore.train.__main__ import main

    step, prepare = training.train_step, stage_run._prepare_models
    calls = iter(range(1, 100))

    def train_step(*args: Any, **keywords: Any) -> Any:
        result = step(*args, **keywords)
        if next(calls) == at:
            act()
        return result

    def prepare_models(*args: Any) -> Any:
        if not at:
            act()
        return prepare(*args)

    training.train_step, stage_run._prepare_models = train_step, prepare_models
    if at < 0:
        act()
    return ended(main, argv)


def tell_everybody(name: signal.Signals) -> None:
    """A signal to every process of the job, the background writer included, as SLURM sends it."""
    os.killpg(0, name)


@pytest.mark.parametrize(
    ("flags", "at", "sent", "stops"),
    [((), 0, signal.SIGTERM, 1), (("--exit-signal", "SIGUSR2"), 4, signal.SIGUSR2, 4), (ASYNC, 5, signal.SIGTERM, 5)],
    ids=["while-models-are-built", "usr2-at-a-save", "async-between-saves"],
)
def test_a_signal_saves_and_the_next_run_goes_on(
    folder: Path, whole: dict, flags: tuple, at: int, sent: signal.Signals, stops: int
) -> None:
    run = f"signal-{at}"
    assert disturbed(folder, run, *flags, at=at, act=lambda: tell_everybody(sent))[0] == 0
    assert latest_iteration(folder / run / "extend").name == f"iter_{stops:07d}"
    if stops % 2:  # not a step at which it saves anyway
        found = run_stage(folder, "extend", 1, *SCHEDULE, run=run)
        for tag in TAGS:
            assert found[tag] == whole[tag]


def test_a_time_limit_saves(folder: Path) -> None:
    def an_hour_passes() -> None:
        from megatron.training import training

        training._TRAIN_START_TIME -= 3600

    assert disturbed(folder, "limit", "--exit-duration-in-mins", "60", at=3, act=an_hour_passes)[0] == 0
    assert latest_iteration(folder / "limit" / "extend").name == "iter_0000003"


@pytest.fixture(scope="module")
def two_steps(folder: Path) -> Path:
    """A run stopped at its first checkpoint; not to be written to."""
    run_stage(folder, "extend", 1, *SCHEDULE, "--exit-interval", "2", run="two-steps")
    return folder / "two-steps"


def refused(outcome: tuple[int, str]) -> str:
    """The one line of a run that ended with exit status 2."""
    code, said = outcome
    lines = [line for line in said.splitlines() if line.startswith("train: ")]
    assert code == 2 and len(lines) == 1 and "Traceback" not in said, said
    return lines[0]


def short_files() -> None:
    """From here on, no file of this process and those it starts can be longer than half a megabyte, as if the disk were
    full.
    """
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, resource.RLIM_INFINITY))


@pytest.mark.parametrize(
    ("ranks", "flags"),
    [(1, ()), pytest.param(2, (), marks=pytest.mark.slow), pytest.param(1, ASYNC, marks=pytest.mark.slow)],
    ids=["sync", "sync-dp2", "async"],
)
def test_a_save_that_cannot_be_written_stops_training(
    folder: Path, two_steps: Path, whole: dict, ranks: int, flags: tuple
) -> None:
    run = folder / f"unwritable-{ranks}-{len(flags)}"
    shutil.copytree(two_steps, run)
    line = refused(disturbed(folder, run.name, *flags, ranks=ranks, at=-1, act=short_files))
    assert "a checkpoint cannot be written, is the disk full?" in line and "step 2 is complete" in line
    assert list(iterations(run / "extend")) == [2] and (run / "extend" / TRACKER).read_text() == "2"
    if ranks == 1 and not flags:
        assert run_stage(folder, "extend", 1, *SCHEDULE, run=run.name)["extend loss"] == whole["extend loss"]


@pytest.mark.slow
def test_a_writer_that_dies_stops_training(folder: Path) -> None:
    def kill_writer() -> None:
        from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

        PersistentAsyncCaller._persistent_process.kill()

    line = refused(disturbed(folder, "dead-writer", *ASYNC, at=3, act=kill_writer))
    assert "the background writer died (exit status -9)" in line


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Makes a file system of so many kB."""
    mounted: list[Path] = []

    def mount(kilobytes: int) -> Path:
        place = tmp_path / f"disk-{kilobytes}"
        place.mkdir()
        if subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", place], capture_output=True
        ).returncode:
            pytest.skip("mounting a small disk needs root")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", "--lazy", place], check=True)


def test_a_disk_without_room_is_noticed_before_training_and_before_a_save(
    folder: Path, small_disk: Callable[[int], Path]
) -> None:
    line = refused(disturbed(folder, str(small_disk(500))))
    assert "a checkpoint will take about 926.2 kB and" in line
    disk = small_disk(9_000)
    line = refused(disturbed(folder, str(disk), "--keep-last", "3"))
    assert "a checkpoint takes 3.2 MB and" in line and "step 6 is not saved" in line and "step 4 is complete" in line
    assert list(iterations(disk / "extend")) == [2, 4]
    assert disturbed(folder, str(disk), "--keep-last", "1")[0] == 0
    assert list(iterations(disk / "extend")) == [8]


@pytest.mark.slow
def test_little_shared_memory_makes_saves_synchronous(
    folder: Path, small_disk: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_care, "SHARED_MEMORY", small_disk(500))  # ranks are forked from here

    def no_async_save_yet() -> None:
        from megatron.training import async_utils

        assert async_utils._async_calls_queue.call_idx == -1
        assert (folder / "little" / "extend" / TRACKER).read_text() == "2"

    assert disturbed(folder, "little", *ASYNC, "--exit-interval", "4", at=3, act=no_async_save_yet)[0] == 0
    assert list(iterations(folder / "little" / "extend")) == [2, 4]
