# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""One table: what each stage starts from, compares, trains and optimises (paper section 3.3, its Table 9)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from hydra_mcore.errors import InputError

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

    Args:
        starts_from: the folder under the run directory that holds its starting weights.
        compares: the attention output of every layer by itself with the teacher's, or the model's distribution of each
            next token with the text's and, where there is one, the teacher's.
        teacher: how much of one runs beside the student; its layers make attention outputs without an output layer.
        trains: the part of a parameter's name that marks it as trained; "" trains all.
        flags: recipe defaults.
    """

    starts_from: str
    compares: Literal["attention", "tokens"]
    teacher: Literal["none", "layers", "whole"]
    trains: str
    flags: dict[str, Any]

    @property
    def fits_layers(self) -> bool:
        """Whether each layer's attention is fitted by itself, without a gradient from the layers behind it."""
        return self.compares == "attention"

    @property
    def needs_teacher(self) -> bool:
        return self.teacher != "none"

    @property
    def needs_teacher_logits(self) -> bool:
        """Whether the teacher has its output layer."""
        return self.teacher == "whole"

    @property
    def streams(self) -> int:
        """How many hidden states travel through the pipeline together: for logits, the teacher's beside the student's;
        where layers are fitted, only the teacher's.
        """
        return 2 if self.needs_teacher_logits else 1


STAGES: dict[str, Stage] = {
    "align": Stage(
        starts_from="student",
        compares="attention",
        teacher="layers",
        trains="self_attention.",
        flags={"lr": 1e-3, "min-lr": 1e-5, "global-batch-size": 32, "seq-length": 512, "train-iters": 20_000},
    ),
    "distill": Stage(
        starts_from="align",
        compares="tokens",
        teacher="whole",
        trains="",
        flags={"lr": 1e-4, "min-lr": 1e-5, "global-batch-size": 96, "seq-length": 512, "train-iters": 20_000},
    ),
    "extend": Stage(
        starts_from="distill",
        compares="tokens",
        teacher="none",
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


def check_named(stage: str, run_dir: str | None, teacher: str | None) -> None:
    """Raise InputError where a stage's run folder, or the teacher that it needs, has no name."""
    if not run_dir:
        raise InputError("no run folder: set run-dir in the recipe or on the command line")
    if STAGES[stage].needs_teacher and not teacher:
        raise InputError(
            f"stage {stage} needs the teacher: set teacher to the folder that tools/convert.py import wrote"
        )


def default_flags(stage: str) -> dict[str, Any]:
    """The recipe that holds before the user's own, paper values."""
    return {**OPTIMISER, **STAGES[stage].flags}
