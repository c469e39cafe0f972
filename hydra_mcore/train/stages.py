# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""One table: what each stage starts from, trains, compares and optimises (paper section 3.3, its Table 9)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra_mcore.config import ConfigError, StageOptions
from hydra_mcore.model.checkpoints import TRACKER

# AdamW as in HALO; the paper names rates, batches and lengths, which each stage sets below.
OPTIMISER: dict[str, Any] = {
    "optimizer": "adam",
    "adam-beta1": 0.9,
    "adam-beta2": 0.95,
    "weight-decay": 0.0,
    "clip-grad": 1.0,
    "lr-warmup-iters": 50,
    "lr-decay-style": "cosine",
}


@dataclass(frozen=True)
class Stage:
    """A row of the table.

    ``starts_from`` names the folder under the run directory that holds its starting weights; ``trains`` is the
    part of a parameter's name that marks it as trained ("" trains all); ``flags`` are recipe defaults.
    """

    starts_from: str
    needs_teacher: bool
    trains: str
    flags: dict[str, Any]


STAGES: dict[str, Stage] = {
    "align": Stage(
        starts_from="student",
        needs_teacher=True,
        trains="self_attention.",
        flags={"lr": 1e-3, "min-lr": 1e-5, "global-batch-size": 32, "seq-length": 512, "train-iters": 20_000},
    ),
    "distill": Stage(
        starts_from="align",
        needs_teacher=True,
        trains="",
        flags={"lr": 1e-4, "min-lr": 1e-5, "global-batch-size": 96, "seq-length": 512, "train-iters": 20_000},
    ),
    "extend": Stage(
        starts_from="distill",
        needs_teacher=False,
        trains="",
        flags={
            "lr": 1e-5,
            "min-lr": 1e-5,
            "lr-decay-style": "constant",
            "global-batch-size": 128,
            "seq-length": 16_384,
            "train-iters": 500,
        },
    ),
}


def default_flags(stage: str) -> dict[str, Any]:
    """The recipe that holds before the user's own, paper values."""
    return {**OPTIMISER, **STAGES[stage].flags}


def start_dir(options: StageOptions) -> Path:
    """The checkpoint folder whose weights a stage starts from; raises ConfigError when it is not there yet."""
    if options.start_from:
        return Path(options.start_from)
    if not options.run_dir:
        raise ConfigError("no run folder: set run-dir in the recipe or on the command line")
    folder = Path(options.run_dir) / STAGES[options.stage].starts_from
    if not (folder / TRACKER).is_file():
        maker = (
            "tools/convert.py hybridize" if options.stage == "align" else f"stage {STAGES[options.stage].starts_from}"
        )
        raise ConfigError(
            f"stage {options.stage} starts from {folder}, which holds no complete checkpoint; run {maker} first, or set"
            " start-from"
        )
    return folder
