# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Two trainings on one folder, and Ctrl-C at any moment of one: real processes and signals."""

import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hydra_mcore.model.checkpoints import TRACKER, check_complete, latest_iteration
from tests.support.launch import run_ranks
from tests.support.paths import ROOT
from tests.support.stages import FLAGS, make_run

STEPS = 400
SCHEDULE = ("--train-iters", str(STEPS), "--micro-batch-size", "1", "--log-interval", "1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("two"))


class Job:
    """Stage extend in forked ranks that a process of their own launches; its output is a file."""

    def __init__(
        self,
        folder: Path,
        run: str,
        *flags: str,
        ranks: int = 1,
        wait_s: float = 0.5,
        before: Callable[[], None] | None = None,
    ):
        argv = ["--stage", "extend", "--run-dir", str(folder / run), "--start-from", str(folder / "student")]
        argv += [
            "--data-path",
            str(folder / "data"),
            "--data-cache-path",
            str(folder / "cache"),
            *FLAGS,
            *SCHEDULE,
            *flags,
        ]
        self.save, self.lock = folder / run / "extend", folder / run / "extend.lock"
        self.log, self.statuses = folder / f"{run}-{time.monotonic_ns()}.log", folder / f"{run}-{time.monotonic_ns()}"
        self.statuses.mkdir()
        self.ranks, self.pid = ranks, os.fork()
        if self.pid == 0:
            try:
                ctypes.CDLL(None).prctl(1, signal.SIGKILL)
                os.environ["SLURM_JOB_ID"] = "4711"
                signal.setitimer(signal.ITIMER_REAL, 0)
                signal.signal(signal.SIGINT, signal.default_int_handler)
                run_ranks(_train, ranks, argv, self.log, self.statuses, wait_s, before)
            finally:
                os._exit(0)

    def output(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def until(self, found: Callable[[], object], seconds: float = 240) -> None:
        deadline = time.monotonic() + seconds
        while not found():
            assert time.monotonic() < deadline, self.output()[-3000:]
            time.sleep(0.02)

    def trains(self, step: int = 2) -> None:
        self.until(lambda: re.search(rf" iteration +{step}/", self.output()))

    def pids(self) -> list[int]:
        return [int(pid) for pid in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()]

    def send(self, number: signal.Signals) -> None:
        for pid in self.pids():
            os.kill(pid, number)

    def end(self) -> list[int]:
        """Exit statuses by rank, as far as ranks could write them."""
        self.until(lambda: os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT))
        os.waitpid(self.pid, 0)
        return [int(path.read_text()) for path in sorted(self.statuses.iterdir())]

    def refusals(self) -> list[str]:
        return [line for line in self.output().splitlines() if line.startswith("train: ")]


def _train(
    rank: int, argv: list[str], log: Path, statuses: Path, wait_s: float, before: Callable[[], None] | None
) -> None:
    from hydra_mcore.train import resume
    from hydra_mcore.train.__main__ import main

    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.__stderr__ = sys.stderr
    resume.WAIT_S = wait_s
    if before:
        before()
    code = 0
    try:
        main(argv)
    except SystemExit as stop:
        code = stop.code or 0
    (statuses / str(rank)).write_text(str(code))


@pytest.fixture
def job(folder: Path, request: pytest.FixtureRequest) -> Iterator[Callable[..., Job]]:
    jobs: list[Job] = []

    def start(*flags: str, run: str = "", **keywords: object) -> Job:
        name = run or re.sub(r"\W+", "-", request.node.name)
        jobs.append(Job(folder, name, *flags, **keywords))
        return jobs[-1]

    yield start
    for each in jobs:
        try:
            os.kill(each.pid, signal.SIGKILL)
            os.waitpid(each.pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_second_training_is_refused_and_harms_nothing(job: Callable[..., Job], ranks: int) -> None:
    first = job("--save-interval", "1", "--keep-last", "1", ranks=ranks)
    first.trains()
    half = first.save / "iter_9999999"
    half.mkdir()  # as a save under way looks to others
    second = job("--save-interval", "1", ranks=ranks)
    assert second.end() == [2] * ranks
    refusal = second.refusals()[-1]
    (holder,) = re.findall(r"extend: is being written by process (\d+) on \S+, SLURM job 4711, since 2\d\d\d-", refusal)
    assert int(holder) == first.pids()[0] and half.is_dir() and len(second.refusals()) == 1
    assert "waiting up to 0.5 seconds for its end" in second.output()
    half.rmdir()
    first.send(signal.SIGTERM)
    assert first.end() == [0] * ranks and not first.lock.exists()
    check_complete(latest_iteration(first.save))


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("--async-save", "--save-interval", "1"), ("--num-workers", "2")], ids=" ".join)
def test_a_killed_training_holds_nothing(job: Callable[..., Job], flags: tuple[str, ...]) -> None:
    """Also where data workers or the writer live a moment longer."""
    first = job(*flags)
    first.trains()
    os.kill(first.pids()[0], signal.SIGKILL)
    second = job("--exit-interval", "5", wait_s=5)
    assert second.end() == [0] and not second.lock.exists()
    first.end()


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_job_that_ends_is_waited_for_and_its_last_save_gone_on_from(job: Callable[..., Job], ranks: int) -> None:
    """A requeued job that starts before the old one has gone, which has no checkpoint yet."""
    first = job(ranks=ranks)
    first.trains()
    second = job("--exit-interval", "100000", ranks=ranks, wait_s=200)
    second.until(lambda: "waiting up to 200 seconds for its end" in second.output())
    first.send(signal.SIGTERM)
    assert first.end() == [0] * ranks
    saved = int((first.save / TRACKER).read_text())
    second.trains(saved + 1)
    assert " iteration        1/" not in second.output()
    second.send(signal.SIGTERM)
    assert second.end() == [0] * ranks


@pytest.mark.slow
def test_what_writes_nothing_needs_no_lock(job: Callable[..., Job]) -> None:
    first = job()
    first.trains()
    assert job("--dry-run").end() == [0]
    other = job("--exit-interval", "1", run="another")
    assert other.end() == [0]
    first.send(signal.SIGTERM)
    assert first.end() == [0]
    step = (first.save / TRACKER).read_text()
    shutil.copytree(first.save.parent, first.save.parent.with_name("finished"))
    assert job("--train-iters", step, "--lr-decay-iters", str(STEPS), run="finished").end() == [0]
    assert [path.name for path in (first.save.parent.with_name("finished")).iterdir()] == ["extend"]


def _slow_saves() -> None:
    from hydra_mcore.train import checkpoint_care

    room = checkpoint_care._make_room

    def make_room(*rest: object) -> None:
        print("saving", flush=True)
        time.sleep(1)
        room(*rest)

    checkpoint_care._make_room = make_room


MOMENTS = {
    "a step": ((), None, lambda job: job.trains()),
    "models are built": (
        (),
        None,
        lambda job: job.until(lambda: "setting number of microbatches" in job.output() or job.lock.exists()),
    ),
    "a save": (("--save-interval", "2"), _slow_saves, lambda job: job.until(lambda: "saving" in job.output())),
    "a save in the background": (("--save-interval", "2", "--async-save"), None, lambda job: job.trains(3)),
    "data workers": (("--num-workers", "2"), None, lambda job: job.trains()),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "ranks"),
    [(moment, ranks) for moment in MOMENTS for ranks in (1, 2)],
)
def test_ctrl_c_saves_and_ends(job: Callable[..., Job], moment: str, ranks: int) -> None:
    flags, before, come = MOMENTS[moment]
    training = job(*flags, ranks=ranks, before=before)
    come(training)
    groups = training.pids()
    if moment == "models are built":
        time.sleep(0.3)
    for group in groups:  # a terminal sends it to the helpers of a rank too
        os.killpg(group, signal.SIGINT)
    statuses = training.end()
    output = training.output()
    assert "Traceback" not in output, output[-4000:]
    assert not training.lock.exists()
    if moment == "models are built" and statuses == [130] * ranks:  # it came before there was anything to save
        assert training.refusals() == ["train: stopped by Ctrl-C"]
        return
    assert statuses == [0] * ranks
    assert training.refusals() == [
        "train: Ctrl-C: the step under way, then a save, then the end; Ctrl-C again ends it at once",
    ]
    last = max(int(step) for step in re.findall(r" iteration +(\d+)/", output))
    assert int((training.save / TRACKER).read_text()) == last
    check_complete(latest_iteration(training.save))


@pytest.mark.slow
def test_a_second_ctrl_c_ends_it_at_once(job: Callable[..., Job]) -> None:
    training = job("--save-interval", "2", before=_slow_saves)
    training.until(lambda: "saving" in training.output())
    training.send(signal.SIGINT)
    training.until(lambda: "Ctrl-C again" in training.output())
    training.send(signal.SIGINT)
    training.end()
    assert training.refusals()[-1] == "train: Ctrl-C: ended at once" and "Traceback" not in training.output()
    again = job("--exit-interval", "5", wait_s=0)
    assert again.end() == [0]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("ranks", [1, 2])
def test_ctrl_c_under_torchrun(folder: Path, ranks: int) -> None:
    """On the terminal's group: torchrun hands it on to its ranks, which are no part of it."""
    run = folder / f"torchrun-{ranks}"
    argv = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(ranks),
        "-m",
        "hydra_mcore.train",
    ]
    argv += ["--stage", "extend", "--run-dir", str(run), "--start-from", str(folder / "student")]
    argv += ["--data-path", str(folder / "data"), "--data-cache-path", str(folder / "cache"), *FLAGS, *SCHEDULE]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "300",
    }
    with (folder / f"torchrun-{ranks}.log").open("w+") as log:
        heard = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731
        process = subprocess.Popen(
            argv, env=environment, cwd=ROOT, stdout=log, stderr=log, text=True, start_new_session=True, preexec_fn=heard
        )
        deadline = time.monotonic() + 400
        while " iteration        2/" not in Path(log.name).read_text():
            assert time.monotonic() < deadline and process.poll() is None, Path(log.name).read_text()[-3000:]
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)
        process.wait(300)
        output = Path(log.name).read_text()
    assert "train: Ctrl-C: the step under way" in output and "ended at once" not in output
    check_complete(latest_iteration(run / "extend"))
    assert not (run / "extend.lock").exists()
