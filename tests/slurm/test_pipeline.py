# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""slurm/pipeline.sh on a real SLURM of two nodes: one pipeline undisturbed, beside it one that is stopped in
every way.
"""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.slurm.cluster import Cluster, processes, wait_for
from tests.support.paths import ROOT, TINY_TEACHER
from tests.support.stages import logged

pytestmark = pytest.mark.timeout(1500)  # the first test waits for the jobs of all
STEPS = {"align": 40, "distill": 40, "extend": 4}
SAVE_INTERVAL = 7
# --nodes=2 with one rank each; the layout is data parallel
SITE = {
    "HYDRA_NODES": "2",
    "HYDRA_GPUS_PER_NODE": "0",
    "HYDRA_PYTHON": str(ROOT / ".venv" / "bin" / "python"),
    "SBATCH_TIMELIMIT": "15",
    "HYDRA_SAVE_SECONDS": "120",
}
RECIPE = """\
run-dir: {run}
teacher: {run}/teacher
data-path: {data}/data
data-cache-path: {run}/cache
split: 100,0,0
seq-length: 64
global-batch-size: 4
lr-warmup-iters: 1
log-interval: 1
save-interval: {save_interval}
distributed-timeout-minutes: 2
align: {{train-iters: {align}}}
distill: {{train-iters: {distill}}}
extend: {{train-iters: {extend}}}
import: {{hf: {hf}, out: {run}/teacher}}
select: {{teacher: {run}/teacher, strategy: global_random, out: {run}/heads}}
hybridize: {{teacher: {run}/teacher, head-map: {run}/heads/head_map.json, fusion-scale: one, out: {run}/student}}
evaluate: {{models: [{run}/extend], lengths: [128], prompts: 1, text: {data}/corpus.txt, out: {run}/evaluation}}
export: {{checkpoint: {run}/extend, out: {run}/hf}}
"""


@dataclass
class Pipeline:
    """A run folder and its jobs, by the names of their scripts."""

    cluster: Cluster
    run: Path
    said: str = ""
    jobs: dict[str, str] = field(default_factory=dict)

    def submit(self) -> None:
        environment = {**self.cluster.environment, **SITE, "HYDRA_LOGS": str(self.run / "logs")}
        recipe = str(self.run / "recipe.yaml")
        done = subprocess.run(
            ["bash", "slurm/pipeline.sh", recipe], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stdout + done.stderr
        self.said = done.stdout
        self.jobs = dict(re.findall(r"^(\w+): job (\d+),", self.said, re.MULTILINE))

    def log(self, script: str) -> str:
        paths = list((self.run / "logs").glob(f"{script}-*-{self.jobs[script]}.out"))
        return paths[0].read_text(errors="replace") if paths else ""

    def state(self, script: str) -> str:
        return self.cluster.job(self.jobs[script])["JobState"]

    def ended(self) -> bool:
        return all(self.state(script) not in ("PENDING", "RUNNING", "COMPLETING") for script in self.jobs)

    def reach(self, script: str, step: int, restarts: int) -> None:
        """Wait until a stage's job, started anew so many times, has made this step."""

        def reached() -> bool:
            log = self.log(script)
            assert self.state(script) in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING"), log[-3000:]
            starts = log.split("hydra_mcore.torchrun")[1:]
            done = re.findall(r" iteration +(\d+)/", starts[-1]) if starts else []
            return len(starts) == restarts + 1 and bool(done) and int(done[-1]) >= step

        wait_for(reached, 300, f"{script} at step {step} after {restarts} restarts")

    @contextlib.contextmanager
    def frozen(self, script: str) -> Iterator[None]:
        """Keep a stage's ranks where they are while the block runs, and the processor free."""
        ranks = processes(f"SLURM_JOB_ID={self.jobs[script]}", "LOCAL_RANK")
        assert len(ranks) >= 2
        for pid in ranks:
            os.kill(pid, signal.SIGSTOP)
        yield
        for pid in ranks:
            os.kill(pid, signal.SIGCONT)

    def files(self) -> dict[str, int]:
        """When each file was written, those of the jobs' output left out."""
        paths = [path for path in self.run.rglob("*") if path.is_file() and "logs" not in path.parts]
        return {str(path): path.stat().st_mtime_ns for path in paths}


def make_pipeline(cluster: Cluster, folder: Path, name: str) -> Pipeline:
    run = folder / name
    run.mkdir()
    values = {"run": run, "data": folder, "hf": TINY_TEACHER, "save_interval": SAVE_INTERVAL, **STEPS}
    (run / "recipe.yaml").write_text(RECIPE.format(**values))
    return Pipeline(cluster, run)


def write_data(folder: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
    from transformers import AutoTokenizer

    (folder / "corpus.txt").write_text((ROOT / "hydra_mcore" / "heads.py").read_text() * 4)
    ids = AutoTokenizer.from_pretrained(TINY_TEACHER).encode((folder / "corpus.txt").read_text())
    builder = IndexedDatasetBuilder(str(folder / "data.bin"), dtype=np.uint16)
    builder.add_document(torch.tensor(ids), [len(ids)])
    builder.finalize(str(folder / "data.idx"))


def reach_the_time_limit(pipeline: Pipeline, script: str) -> None:
    """Let a running job's time run out: its limit, of whole minutes, is put where SLURM's next check, in half a minute,
    warns.
    """
    job = pipeline.jobs[script]
    with pipeline.frozen(script):
        hours, minutes, seconds = map(int, pipeline.cluster.job(job)["RunTime"].split(":"))
        age = 3600 * hours + 60 * minutes + seconds
        pipeline.cluster("scontrol", "update", f"JobId={job}", f"TimeLimit={(age + 40) // 60 + 1}")
        wait_for(lambda: "asked to stop" in pipeline.log(script), 100, "SLURM signals that the time limit is near")
    wait_for(lambda: pipeline.state(script) == "PENDING", 60, "the job is requeued")
    pipeline.cluster("scontrol", "update", f"JobId={job}", f"TimeLimit={SITE['SBATCH_TIMELIMIT']}")


@dataclass
class Story:
    """What the fixture saw; ``before`` are the states of ``whole`` and its files before it was submitted ``again``."""

    whole: Pipeline
    stopped: Pipeline
    again: Pipeline
    before: tuple[set[str], dict[str, int]]
    taken_port: int


@pytest.fixture(scope="module")
def story(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    """Two pipelines at once to the end, one of them stopped four times, the other submitted again when it is
    finished.
    """
    folder = tmp_path_factory.mktemp("pipelines")
    write_data(folder)
    whole, stopped = make_pipeline(cluster, folder, "whole"), make_pipeline(cluster, folder, "stopped")
    with socket.socket() as taken:
        whole.submit()
        taken.bind(("127.0.0.1", 20000 + int(whole.jobs["align"])))  # the port that the first stage would take
        taken.listen()
        wait_for(lambda: whole.state("select") == "COMPLETED", 300, "the first select job ends")
        for made in ("teacher", "heads", "student"):
            shutil.copytree(whole.run / made, stopped.run / made)
        stopped.submit()
        stopped.reach("align", 5, restarts=0)
        reach_the_time_limit(stopped, "align")
        stopped.reach("align", 20, restarts=1)
        cluster("scancel", "--batch", "--signal=USR1", stopped.jobs["align"])
        stopped.reach("distill", 5, restarts=0)
        cluster("scontrol", "requeue", stopped.jobs["distill"])
        stopped.reach("distill", 20, restarts=1)
        with stopped.frozen("distill"):
            wait_for(whole.ended, 300, "the undisturbed pipeline ends")
            before, again = (set(map(whole.state, whole.jobs)), whole.files()), Pipeline(cluster, whole.run)
            again.submit()
            wait_for(again.ended, 300, "the finished pipeline ends again")
        cluster.kill_node("n2")
        wait_for(lambda: stopped.state("distill") == "PENDING", 120, "the job of a lost node is requeued")
        cluster.start_node("n2")
        wait_for(stopped.ended, 300, "the stopped pipeline ends")
        yield Story(whole, stopped, again, before, taken.getsockname()[1])


def test_two_pipelines_at_once_end_well(story: Story) -> None:
    assert list(story.whole.jobs) == ["select", "align", "distill", "extend", "evaluate"]
    assert story.before[0] == {"COMPLETED"}
    for script in story.stopped.jobs:
        assert story.stopped.state(script) == "COMPLETED", story.stopped.log(script)[-3000:]
    for pipeline in (story.whole, story.stopped):
        assert (pipeline.run / "evaluation" / "results.json").exists() and (
            pipeline.run / "hf" / "config.json"
        ).exists()


def test_losses_of_the_stopped_pipeline_are_those_of_the_undisturbed_one(story: Story) -> None:
    for stage, steps in STEPS.items():
        whole, stopped = (logged(pipeline.run / stage / "tensorboard") for pipeline in (story.whole, story.stopped))
        for tag in (f"{stage} loss", "grad-norm", "learning-rate"):
            assert list(whole[tag]) == list(range(1, steps + 1))
            assert stopped[tag] == whole[tag], f"{stage}: {tag}"


def test_a_stop_that_is_announced_loses_no_step_and_a_lost_node_less_than_two_saves(story: Story) -> None:
    for script, lost in (("align", [0, 0]), ("distill", [0, 2 * SAVE_INTERVAL])):
        log = story.stopped.log(script)
        starts = [
            list(map(int, re.findall(r" iteration +(\d+)/", part))) for part in log.split("hydra_mcore.torchrun")[1:]
        ]
        assert len(starts) == 3 and starts[-1][-1] == STEPS["align"], log[-3000:]
        for earlier, later, most in zip(starts, starts[1:], lost, strict=False):
            assert earlier == list(range(earlier[0], earlier[-1] + 1))
            assert 0 <= earlier[-1] + 1 - later[0] <= most
    assert story.stopped.log("align").count("asked to stop and go on later") == 2


def test_a_finished_pipeline_does_nothing(story: Story) -> None:
    assert set(map(story.again.state, story.again.jobs)) == {"COMPLETED"}
    assert story.again.files() == story.before[1]
    assert (
        "holds a head map already" in story.again.log("select")
        and story.again.log("select").count("is there already") == 2
    )
    assert "holds a report with every piece already" in story.again.log(
        "evaluate"
    ) and "is there already" in story.again.log("evaluate")
    for stage in STEPS:
        assert f"stage {stage} is finished" in story.again.log(stage)


def test_a_port_that_is_taken_is_not_used(story: Story) -> None:
    assert f"--master-port={story.taken_port + 101} " in story.whole.log("align")
