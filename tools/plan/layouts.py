# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Changes of a stage's flags with which it fits: the smallest one, or all layouts by their time."""

from __future__ import annotations

import argparse
import functools
import itertools
import operator
from collections.abc import Iterable, Iterator
from typing import Any

from hydra_mcore.config import ModelCard
from hydra_mcore.costs.machine import GPUS_PER_NODE, Machine
from hydra_mcore.errors import InputError
from tools.plan.estimate import Estimate, estimate

Changes = dict[str, Any]  # parsed flag -> value

SELECTIVE = {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


def smallest_change(card: ModelCard, known: argparse.Namespace, machine: Machine) -> tuple[Changes, Estimate] | None:
    """The smallest change of flags with which a stage fits: the fewest settings, then the least time; None if none of
    up to three.
    """
    knobs = list(_knobs(known))
    for count in (1, 2, 3):
        combinations = itertools.combinations(knobs, count)
        chosen = itertools.chain.from_iterable(itertools.product(*some) for some in combinations)
        changes = (functools.reduce(operator.or_, some) for some in chosen)
        if found := fitting(card, known, machine, changes):
            return found[0]
    return None


def layouts(card: ModelCard, known: argparse.Namespace, machine: Machine) -> list[tuple[Changes, Estimate]]:
    """Every layout of tensor, pipeline and context parallelism, micro-batch and recompute in which a stage fits,
    fastest first.
    """
    sizes = [2**power for power in range(machine.gpus.bit_length())]
    recompute: list[Changes] = [{"recompute_granularity": None}, SELECTIVE, FULL]
    changes = (
        {
            "tensor_model_parallel_size": tp, "sequence_parallel": tp > 1, "pipeline_model_parallel_size": pp,
            "context_parallel_size": cp, "micro_batch_size": rows, **again,
        }
        for tp, pp, cp, rows, again in itertools.product(
            [s for s in sizes if s <= GPUS_PER_NODE], sizes, sizes, (1, 2, 4, 8), recompute
        )
        if tp * pp * cp <= machine.gpus
    )  # fmt: skip
    return fitting(card, known, machine, changes)


def fitting(
    card: ModelCard, known: argparse.Namespace, machine: Machine, changes: Iterable[Changes]
) -> list[tuple[Changes, Estimate]]:
    """The changes to the flags with which the stage fits, fastest first; impossible ones are left out."""
    found = []
    for change in changes:
        try:
            found.append((change, estimate(card, argparse.Namespace(**vars(known) | change), machine)))
        except InputError:
            continue
    return sorted(((change, at) for change, at in found if at.fits), key=lambda pair: pair[1].step_seconds)


def _knobs(known: argparse.Namespace) -> Iterator[list[Changes]]:
    """What may be turned to save memory, each with its settings."""
    tp_size = known.tensor_model_parallel_size
    if tp_size > 1 and not known.sequence_parallel:
        yield [{"sequence_parallel": True}]
    if not known.use_distributed_optimizer:
        yield [{"use_distributed_optimizer": True}]
    if known.micro_batch_size > 1:
        yield [
            {"micro_batch_size": rows}
            for rows in range(1, known.micro_batch_size)
            if known.micro_batch_size % rows == 0
        ]
    if known.recompute_granularity != "full":
        yield [FULL] if known.recompute_granularity else [SELECTIVE, FULL]
    yield [{"context_parallel_size": known.context_parallel_size * more} for more in (2, 4, 8)]
    yield [{"tensor_model_parallel_size": tp_size * more, "sequence_parallel": True} for more in (2, 4, 8)]
    yield [{"pipeline_model_parallel_size": known.pipeline_model_parallel_size * more} for more in (2, 4, 8)]


def as_flags(changes: Changes) -> str:
    """Changes as a command line has them."""
    words: list[str] = []
    for name, value in changes.items():
        if value is None or value is False:
            continue
        words.append("--" + name.replace("_", "-"))
        words += [] if value is True else [str(item) for item in (value if isinstance(value, list) else [value])]
    return " ".join(words)
