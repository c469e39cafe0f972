# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""One study run in one go, killed and resumed, and as jobs of a real SLURM of two nodes: the numbers are the same."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.slurm.cluster import Cluster, wait_for
from tests.support.paths import ROOT, TINY_TEACHER

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "WANDB_MODE": "offline"}


def make_study(folder: Path) -> Path:
    """Two head maps of the tiny teacher, a few steps each."""
    folder.mkdir()
    text = " ".join(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")))
    (folder / "text.txt").write_text(text[:200_000])
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in text.split("\n\n")))
    at = {name: str(folder / name) for name in ("teacher", "text.txt", "text.jsonl", "data")}
    rows = {"global-batch-size": 2, "micro-batch-size": 2, "seq-length": 64}
    recipe = {
        **{"teacher": at["teacher"], "data-path": at["data"], "split": "100,0,0"},
        "align": {**rows, "train-iters": 4, "lr": 1e-3, "lr-warmup-iters": 0, "save-interval": 2},
        "prepare": {"input": [at["text.jsonl"]], "tokenizer": str(TINY_TEACHER), "out": at["data"]},
        "import": {"hf": str(TINY_TEACHER), "out": at["teacher"]},
        "select": {"teacher": at["teacher"], "pairs": 2, "length": 128, "text": at["text.txt"], "knock-out": 0},
        "hybridize": {"teacher": at["teacher"], "text": at["text.txt"]},
        "evaluate": {"text": at["text.txt"], "lengths": [128], "prompts": 2, "yarn": ["teacher=2"]},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    study = {"recipes": ["recipe.yaml"], "out": str(folder / "out"), "stages": ["align"]}
    study["variants"] = {"chosen": {}, "random": {"select": {"strategy": "global_random"}}}
    (folder / "study.yaml").write_text(yaml.safe_dump(study))
    return folder / "study.yaml"


def start(study: Path, word: str, *flags: str) -> subprocess.Popen:
    call = [sys.executable, str(ROOT / "tools/study.py"), word, str(study), *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(call, cwd=ROOT, env=ENVIRONMENT, start_new_session=True, **pipes)


def ended(process: subprocess.Popen) -> str:
    said, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors[-3000:]
    return said


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of the study in one go."""
    found = ended(start(make_study(tmp_path_factory.mktemp("whole") / "study"), "run"))
    assert all(f"| {name} | " in found for name in ("teacher", "teacher + YaRN x2", "chosen", "random"))
    return found


def test_a_study_is_killed_and_goes_on(tables: str, tmp_path: Path) -> None:
    study = make_study(tmp_path / "study")
    first = start(study, "run", "--jobs", "2")
    stage = study.parent / "out/seed0/chosen/align/latest_checkpointed_iteration.txt"
    deadline = time.monotonic() + 600
    while not stage.exists() and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    first.kill()  # its commands end by themselves
    assert stage.exists(), first.communicate()[1][-3000:]
    assert "chosen, seed 0: " in ended(start(study, "run", "--dry-run"))
    scores = (study.parent / "out/seed0/shared/heads/scores.json").stat().st_mtime_ns
    assert ended(start(study, "run")) == tables
    assert (study.parent / "out/seed0/shared/heads/scores.json").stat().st_mtime_ns == scores
    assert ended(start(study, "table")) == tables


def test_a_study_s_jobs_on_a_cluster(tables: str, tmp_path: Path, cluster: Cluster) -> None:
    study = make_study(tmp_path / "study")
    site = {"HYDRA_PYTHON": sys.executable, "HYDRA_GPUS_PER_NODE": "0", "SBATCH_TIMELIMIT": "15"}

    def submit(*flags: str) -> str:
        call = ["sbatch", "--parsable", "--gres=gpu:0", f"--output={tmp_path}/%A_%a.out", *flags]
        environment = cluster.environment | ENVIRONMENT | site | {"PATH": cluster.environment["PATH"]}
        done = subprocess.run(
            [*call, "slurm/study.sh", str(study)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def logs() -> str:
        return "".join(path.read_text(errors="replace")[-2000:] for path in sorted(tmp_path.glob("*.out")))

    tasks = submit(f"--dependency=afterok:{submit()}", "--array=0-1")

    def all_ended() -> bool:
        states = re.findall(r"JobState=(\w+)", cluster("scontrol", "show", "job", tasks))
        assert not {"FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"} & set(states), logs()
        return set(states) == {"COMPLETED"}

    wait_for(all_ended, 900, "the study's jobs")
    assert ended(start(study, "table")) == tables, logs()
