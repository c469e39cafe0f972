# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Memory and time of an evaluation, by model and length, from the section evaluate of a recipe.

Replicas share the prompts. The plan leaves out communication, the steps of decoding, and the loss on held-out text.
"""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass
from typing import Any

from hydra_mcore.config import ModelCard, teacher_card
from hydra_mcore.costs.batch_sizes import rows_a_forward
from hydra_mcore.costs.evaluation_memory import EvaluationMemory, Forward, fullest_rank
from hydra_mcore.costs.machine import MEMORY_SHARE, Machine
from hydra_mcore.costs.seconds import prompt_seconds
from hydra_mcore.errors import InputError
from hydra_mcore.evaluation.evaluate import named_tasks
from hydra_mcore.heads import HeadLayout
from hydra_mcore.recipe import parse_with_recipe
from hydra_mcore.ruler.prompts import TASKS
from tools.evaluate import parser
from tools.plan.report import GIB, table

ANSWER_TOKENS = 128  # of room for an answer, the most that RULER gives one


@dataclass(frozen=True)
class Examination:
    """One model at one length. ``seconds`` are those of a prompt on one replica, ``hours`` those of all tasks'
    prompts.
    """

    model: str
    run: Forward
    replicas: int
    memory: EvaluationMemory
    fits: bool
    seconds: float
    hours: float


def examinations(card: ModelCard, flags: list[str], machine: Machine) -> list[Examination]:
    """The teacher and the student ``card`` at every length that the flags of tools/evaluate.py name.

    Raises:
        InputError: an unknown task, or a layout that does not fit the model or the GPUs.
    """
    args = parse_with_recipe(parser(), "evaluate", flags)
    tp_size, pp_size, cp_size = sizes = layout_of(args)
    check_layout(card, sizes, machine.gpus)
    tasks = named_tasks(args.tasks)
    decodes = args.scoring == "generation" or (
        args.scoring is None and not all(TASKS[task].one_answer for task in tasks)
    )
    replicas = machine.gpus // (tp_size * pp_size * cp_size)
    found = []
    for name, model in (("teacher", teacher_card(card.shape, fingerprint="")), ("student", card)):
        for length in args.lengths:
            run = Forward(
                length=length,
                rows=rows_a_forward(length),
                room=ANSWER_TOKENS if decodes else 0,
                value_bytes=4 if args.dtype == "float32" else 2,
                tp_size=tp_size,
                pp_size=pp_size,
                cp_size=cp_size,
            )
            memory = fullest_rank(model, run)
            seconds = prompt_seconds(model, run, machine)
            hours = seconds * len(tasks) * -(-args.prompts // replicas) / 3600
            found.append(Examination(name, run, replicas, memory, memory.total <= machine.usable_bytes, seconds, hours))
    return found


def layout_of(args: argparse.Namespace) -> tuple[int, int, int]:
    return args.tensor_model_parallel_size, args.pipeline_model_parallel_size, args.context_parallel_size


def check_layout(card: ModelCard, sizes: tuple[int, int, int], gpus: int) -> None:
    """Raise InputError for a layout that evaluation would refuse."""
    tp_size, pp_size, cp_size = sizes
    if min(sizes) < 1 or gpus % (tp_size * pp_size * cp_size):
        raise InputError(
            f"{gpus} GPUs are no multiple of tensor {tp_size} x pipeline {pp_size} x context parallel {cp_size}"
        )
    HeadLayout(card.head_map.layers[0], card.shape.num_kv_groups, tp_size)
    for what, size, ranks in (
        ("vocabulary", card.shape.vocab_size, tp_size),
        ("MLP width", card.shape.ffn_hidden_size, tp_size),
        ("number of layers", card.shape.num_layers, pp_size),
    ):
        if size % ranks:
            raise InputError(f"{ranks} ranks do not divide the {what} of {size}; choose another layout")


def evaluation_section(found: list[Examination], machine: Machine) -> str:
    """A table of all models and lengths; markdown."""
    run, replicas = found[0].run, found[0].replicas
    rows = [
        [
            f"{at.model}, {at.run.length:,}",
            *(f"{value / GIB:.2f}" for value in dataclasses.astuple(at.memory)),
            f"{at.memory.total / GIB:.1f}" + ("" if at.fits else " (too much)"),
            f"{at.seconds:.2f}",
            f"{at.hours:.1f}",
        ]
        for at in found
    ]
    columns = [
        "model, tokens",
        "weights",
        "kept to decode",
        "forward",
        "GiB of the fullest rank",
        "s a prompt",
        "hours",
    ]
    usable = f"{machine.usable_bytes / GIB:.1f} GiB usable ({MEMORY_SHARE:.0%} of {machine.gpu.memory_gib:g})"
    hours = sum(at.hours for at in found)
    return "\n\n".join([
        f"\n## evaluate: TP {run.tp_size} x PP {run.pp_size} x CP {run.cp_size}, {replicas} replicas of each model",
        table(columns, rows),
        ("Fits: " if all(at.fits for at in found) else "DOES NOT FIT: ") + usable,
        f"{hours:.1f} h, {hours * machine.gpus:,.0f} GPU-hours, computing at {machine.efficiency:.0%} of the peak; "
        "communication, "
        "decoding and the loss on text come on top",
    ])  # fmt: skip


def as_json(at: Examination) -> dict[str, Any]:
    """Bytes, seconds, hours as plain values."""
    return dataclasses.asdict(at) | {"memory": dataclasses.asdict(at.memory) | {"total": at.memory.total}}
