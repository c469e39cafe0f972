# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Every command on a checkpoint that somebody made to run code, or that lost a byte: one line, exit status 2, nothing
run.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hydra_mcore.config import HydraOptions, ModelCard
from hydra_mcore.convert.inherit import hybridize
from hydra_mcore.heads import HeadMap
from hydra_mcore.model.checkpoints import latest_iteration
from hydra_mcore.model.runtime import process_groups
from tests.support.commands import training_ended
from tests.support.launch import run_ranks
from tests.support.paths import ROOT
from tests.support.planted_code import INDEX, plant
from tests.support.stages import FLAGS, make_run

TENSOR = "decoder.layers.0.mlp.linear_fc1.weight"
SAVING = [flag for flag in FLAGS if flag != "--no-save-rng"]


@pytest.fixture(scope="module")
def text_models(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher and a student with tokenizers, a head map and a text."""
    folder, shape = tmp_path_factory.mktemp("planted"), ModelCard.load(tiny_teacher).shape
    head_map = HeadMap.from_fa([(0, 1)], shape.num_layers, shape.num_heads, shape.num_kv_groups)
    head_map.save(folder / "head_map.json")
    shutil.copytree(tiny_teacher, folder / "teacher")
    with process_groups():
        hybridize(tiny_teacher, head_map, HydraOptions(), folder / "student")
    (folder / "text.txt").write_text((ROOT / "hydra_mcore" / "heads.py").read_text())
    return folder


COMMANDS = {
    "hybridize": (
        ("tools/convert.py hybridize --teacher {teacher} --head-map {head_map.json} --text {text.txt} --out {out}"),
        "teacher",
    ),
    "export": ("tools/convert.py export --checkpoint {student} --out {out}", "student"),
    "select": ("tools/select_heads.py --teacher {teacher} --out {out} --pairs 1 --length 128", "teacher"),
    "evaluate": (
        "tools/evaluate.py --models {student} --out {out} --lengths 64 --prompts 1 --no-text-loss --text {text.txt}",
        "student",
    ),
    "verify": ("tools/verify.py {student} --length 32", "student"),
    "tune": ("tools/tune_log_scale.py --checkpoint {student} --text {text.txt} --length 600 --windows 2", "student"),
}


@pytest.mark.slow
@pytest.mark.parametrize("place", [INDEX, "common.pt", "common_state", TENSOR, "zeros"])
@pytest.mark.parametrize("command", COMMANDS)
def test_commands(text_models: Path, tmp_path: Path, command: str, place: str) -> None:
    """Their own processes, as a user starts them."""
    line, victim = COMMANDS[command]
    folder = Path(shutil.copytree(text_models, tmp_path / "models"))
    marker, checkpoint = tmp_path / "ran", latest_iteration(folder / victim)
    if place == "zeros":
        for file in checkpoint.glob("*.distcp"):
            file.write_bytes(bytes(file.stat().st_size))
    else:
        plant(checkpoint, place, marker)
    for name in ("teacher", "student", "head_map.json", "text.txt", "out"):
        line = line.replace("{" + name + "}", str(folder / name))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *line.split()], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert not marker.exists()
    if command == "export" and place == "common_state":  # it reads tensors alone
        assert done.returncode == 0, done.stderr
        return
    assert "Traceback" not in done.stderr
    if command == "verify" and place in ("common_state", TENSOR, "zeros"):  # what its checks find are verdicts
        code, prefix, said = 1, "FAIL", done.stdout.splitlines()
    else:
        code, prefix, said = 2, line.split("/")[1].split(".py")[0] + ": ", done.stderr.splitlines()
    said = [line for line in said if line.startswith(prefix)]
    assert done.returncode == code and said and (code == 1 or len(said) == 1), done.stdout + done.stderr
    assert ("damaged" if place == "zeros" else "could run code") in said[0]


def arguments(folder: Path, stage: str, run: str, iterations: int) -> list[str]:
    argv = [
        "--stage",
        stage,
        "--run-dir",
        str(folder / run),
        "--teacher",
        str(folder / "teacher"),
        "--start-from",
        str(folder / "student"),
    ]
    argv += ["--data-path", str(folder / "data"), "--data-cache-path", str(folder / "cache"), *SAVING]
    return [*argv, "--train-iters", str(iterations), "--rerun-mode", "validate_results"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_run(tmp_path_factory.mktemp("trained"))
    ((code, said),) = run_ranks(training_ended, 1, arguments(folder, "extend", "run", 3))
    assert code == 0, said
    return folder


VICTIMS = [
    *(
        ("extend", place)
        for place in (INDEX, "common.pt", "common_state", "rng_state", "rerun_state_machine_state", TENSOR)
    ),
    ("extend", "optimizer.state.exp_avg"),
    *((folder, place) for folder in ("student", "teacher") for place in (INDEX, "common.pt", "common_state", TENSOR)),
]


@pytest.mark.slow
@pytest.mark.parametrize(("victim", "place"), VICTIMS)
def test_training(trained: Path, tmp_path: Path, victim: str, place: str) -> None:
    """A start from a planted checkpoint, with a planted teacher, and going on from one."""
    folder, marker = Path(shutil.copytree(trained, tmp_path / "run")), tmp_path / "ran"
    save = folder / "run" / "extend" if victim == "extend" else folder / victim
    checkpoint = latest_iteration(save)
    stage, run = ("extend", "run") if victim == "extend" else ("distill", "other")
    plant(checkpoint, place, marker)
    ((code, said),) = run_ranks(training_ended, 1, arguments(folder, stage, run, 6))
    lines = [line for line in said.splitlines() if line.startswith("train: ")]
    assert not marker.exists() and checkpoint.is_dir()
    if place == "rerun_state_machine_state":  # Megatron does not take it up again
        assert code == 0, said
        return
    assert code == 2 and len(lines) == 1 and "could run code" in lines[0] and "Traceback" not in said, said
