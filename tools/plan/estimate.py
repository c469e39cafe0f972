# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Memory and time of a stage under its flags; the formulas are those of ``hydra_mcore/costs``."""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass
from typing import Any

from hydra_mcore.config import ConfigError, ModelCard
from hydra_mcore.costs.activations import Run
from hydra_mcore.costs.flops import step_flops
from hydra_mcore.costs.machine import Machine
from hydra_mcore.costs.seconds import step_seconds
from hydra_mcore.costs.step_communication import step_bytes
from hydra_mcore.costs.training_memory import TrainingMemory, fullest_rank
from hydra_mcore.train.arguments import check_settings

# Flags that change memory or time in ways that are not worked out here.
NOT_PLANNED = (
    "num-layers-per-virtual-pipeline-stage", "num-virtual-stages-per-pipeline-rank", "pipeline-model-parallel-layout",
    "decoder-first-pipeline-num-layers", "decoder-last-pipeline-num-layers", "optimizer-cpu-offload",
    "use-precision-aware-optimizer", "fp8-format",
)  # fmt: skip
SET_AS = {"fp8-format": "fp8"}  # by the flag, where the attribute has another name


@dataclass(frozen=True)
class Estimate:
    """One stage in one layout.

    ``communication``: bytes that the busiest rank sends in a step, by purpose; ``seconds`` of a step, by cause.
    """

    run: Run
    memory: TrainingMemory
    fits: bool
    flops: float
    communication: dict[str, float]
    seconds: dict[str, float]

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def hours(self) -> float:
        return self.step_seconds * self.run.steps / 3600

    @property
    def gpu_hours(self) -> float:
        return self.hours * self.run.ranks

    @property
    def tokens(self) -> int:
        return self.run.steps * self.run.global_rows * self.run.length


def estimate(card: ModelCard, known: argparse.Namespace, machine: Machine) -> Estimate:
    """A stage's memory and time under its parsed flags.

    Raises:
        InputError: flags that do not fit the model or the number of GPUs, or that are not known here.
    """
    for flag in NOT_PLANNED:
        if getattr(known, SET_AS.get(flag, flag.replace("-", "_")), None):
            raise ConfigError(f"--{flag} is not planned for; leave it out, and expect other memory and time")
    check_settings(known, card, machine.gpus)
    run = Run.from_flags(known, machine.gpus, fused=True)
    if run.global_rows % (run.rows * run.dp_size):
        raise ConfigError(
            f"global-batch-size {run.global_rows} does not divide by micro-batch-size {run.rows} x {run.dp_size}"
            " data-parallel ranks"
        )
    groups = card.shape.num_kv_groups
    if groups % run.tp_size and run.tp_size % groups:
        raise ConfigError(
            f"Megatron asks that tensor parallel size {run.tp_size} divides {groups} kv groups, or is a multiple of"
            " them"
        )
    for what, size in (("vocabulary", card.shape.vocab_size), ("MLP width", card.shape.ffn_hidden_size)):
        if size % run.tp_size:
            raise ConfigError(
                f"tensor parallel size {run.tp_size} does not divide the {what} of {size}; choose one that does"
            )
    memory = fullest_rank(card, run)
    flops = step_flops(card, run.stage, run.length, run.global_rows)
    sent = step_bytes(card, run)
    overlapped = known.overlap_grad_reduce and known.overlap_param_gather
    seconds = step_seconds(card, run, machine, flops, sent, overlapped)
    return Estimate(run, memory, memory.total <= machine.usable_bytes, flops, sent, seconds)


def as_json(at: Estimate) -> dict[str, Any]:
    """An estimate as plain values: bytes, seconds, FLOPs."""
    own = {
        name: getattr(at, name)
        for name in ("fits", "flops", "communication", "seconds", "step_seconds", "hours", "gpu_hours", "tokens")
    }
    return own | {
        "run": dataclasses.asdict(at.run),
        "memory": dataclasses.asdict(at.memory) | {"total": at.memory.total},
    }
