# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The three stages on one GPU in bfloat16, each a process of its own as a user starts it. Not yet run on a GPU."""

from __future__ import annotations

import dataclasses
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hydra_mcore.config import HydraOptions, ModelShape, teacher_card
from hydra_mcore.heads import HeadMap
from hydra_mcore.model.build import build_model
from hydra_mcore.model.checkpoints import save_weights
from hydra_mcore.model.runtime import process_groups
from tests.support.paths import ROOT
from tests.support.stages import FLAGS, logged, randomise, write_data

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU (not yet run on one)"),
]
SHAPE = ModelShape(
    num_layers=3, hidden_size=256, num_heads=4, num_kv_groups=2, head_dim=64, ffn_hidden_size=512, vocab_size=64,
    native_length=256
)  # fmt: skip
HEAD_MAP = HeadMap.from_fa([(1, 0), (2, 0), (2, 3)], SHAPE.num_layers, SHAPE.num_heads, SHAPE.num_kv_groups)
STAGES = ("align", "distill", "extend")
STEPS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder: the teacher and the student of random weights, and data."""
    folder = tmp_path_factory.mktemp("run")
    teacher = teacher_card(SHAPE, fingerprint="f" * 64)
    with process_groups():
        for name, head_map, options in (
            ("teacher", teacher.head_map, teacher.options),
            ("student", HEAD_MAP, HydraOptions()),
        ):
            card = dataclasses.replace(teacher, head_map=head_map, options=options, stage=name)
            model = build_model(card, "align")
            randomise(model)
            save_weights([model], card, folder / name)
    write_data(folder / "data", SHAPE.vocab_size)
    return folder


@pytest.mark.timeout(400)
def test_all_stages_in_turn(folder: Path) -> None:
    for stage in STAGES:
        flags = [*FLAGS, "--seq-length", "256", "--bf16", "--train-iters", str(STEPS), "--lr", "1e-3"]
        flags += [] if stage == "distill" else ["--packed-documents", "--micro-batch-size", "1"]
        paths = {
            "run-dir": folder,
            "teacher": folder / "teacher",
            "data-path": folder / "data",
            "data-cache-path": folder / "cache",
        }
        flags += [word for flag, path in paths.items() for word in (f"--{flag}", str(path))]
        command = [sys.executable, "-m", "hydra_mcore.train", "--stage", stage, *flags]
        done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
        losses = logged(folder / stage / "tensorboard")[f"{stage} loss"]
        assert len(losses) == STEPS and all(math.isfinite(loss) for loss in losses.values()), losses
        assert losses[STEPS] < losses[1], f"{stage}: {losses}"
