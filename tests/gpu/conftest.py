# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""What GPU tests share: kernels that are not tuned, and a run folder whose stages start as a user starts them.

Not yet run on a GPU.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hydra_mcore.config import HydraOptions, ModelShape, teacher_card
from hydra_mcore.heads import HeadMap
from hydra_mcore.model.build import build_model
from hydra_mcore.model.checkpoints import save_weights
from hydra_mcore.model.runtime import process_groups
from tests.support import one_configuration
from tests.support.paths import ROOT
from tests.support.stages import FLAGS, logged, randomise, write_data

SHAPE = ModelShape(
    num_layers=3, hidden_size=256, num_heads=4, num_kv_groups=2, head_dim=64, ffn_hidden_size=512, vocab_size=64,
    native_length=256
)  # fmt: skip
# As many GDN heads in every layer that has any: each number of heads is compiled anew.
HEAD_MAP = HeadMap.from_fa([(0, 1), (1, 0), (2, 3)], SHAPE.num_layers, SHAPE.num_heads, SHAPE.num_kv_groups)
Losses = dict[int, float]  # by step


@pytest.fixture(scope="session", autouse=True)
def one_configuration_a_kernel() -> None:
    if torch.cuda.is_available():
        one_configuration.install()


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The teacher and the student of random weights, and data."""
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


@pytest.fixture(scope="session")
def train(run_folder: Path) -> Callable[..., Losses]:
    """``train(stage, *flags, run="run")``: a stage in bf16 in a process of its own; what it logged as its loss."""

    def start(stage: str, *flags: str, run: str = "run") -> Losses:
        paths = {
            "run-dir": run_folder / run,
            "teacher": run_folder / "teacher",
            "data-path": run_folder / "data",
            "data-cache-path": run_folder / "cache",
        }
        words = [*FLAGS, "--seq-length", "256", "--bf16", "--lr", "1e-3"]
        words += [word for flag, path in paths.items() for word in (f"--{flag}", str(path))]
        command = [sys.executable, "-m", "tests.support.one_configuration", "hydra_mcore.train", "--stage", stage]
        done = subprocess.run(
            [*command, *words, *flags], cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
        return logged(run_folder / run / stage / "tensorboard")[f"{stage} loss"]

    return start
