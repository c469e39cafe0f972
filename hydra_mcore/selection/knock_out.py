# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Knock-out curves: how often the teacher still finds the needle as its heads are silenced one after another."""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Collection, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hydra_mcore.heads import Head
from hydra_mcore.selection.evidence import KNOCK_OUT_ORDERS, KnockOut
from hydra_mcore.selection.probes import ProbeBatch
from hydra_mcore.selection.receivers import answer_positions
from hydra_mcore.selection.scoring import Piece, Scoring
from hydra_mcore.selection.teacher import Teacher

FRACTIONS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.25)


def knock_out(scoring: Scoring, batches: Sequence[ProbeBatch], ranking: Sequence[Head], seed: int) -> KnockOut:
    """Accuracy with the first n heads of an order silenced: best first, worst first, and at random.

    Each batch of prompts has a random order of its own: as many runs as for one order, and the luck of an order weighs
    less.

    Args:
        batches: prompts that the scores were not made from.
        ranking: all heads, best first.
        seed: of the random orders.
    """
    counts = sorted({round(fraction * len(ranking)) for fraction in FRACTIONS})
    solved = {order: [0.0] * len(counts) for order in KNOCK_OUT_ORDERS}
    names: dict[str, list[tuple[str, int]]] = {}  # of a piece: the points that it counts for
    pieces: dict[str, Piece] = {}
    for index, batch in enumerate(batches):
        shuffled = random.Random(seed + index).sample(ranking, len(ranking))
        for order, heads in zip(KNOCK_OUT_ORDERS, (ranking, ranking[::-1], shuffled), strict=True):
            for at, count in enumerate(counts):
                name = f"{_name(heads[:count])} {index}"
                pieces[name] = partial(_answered, scoring.teacher, batch, frozenset(heads[:count]))
                names.setdefault(name, []).append((order, at))
    for points, result in zip(names.values(), scoring.run("knock-out", pieces), strict=True):
        for order, at in points:
            solved[order][at] += float(result["solved"].sum())
    prompts = sum(len(batch.clean_bs) for batch in batches)
    return KnockOut(
        fractions=tuple(count / len(ranking) for count in counts),
        heads=tuple(counts),
        accuracy={order: (tuple(count / prompts for count in curve),) for order, curve in solved.items()},
        prompts=prompts,
    )


def runs_a_prompt() -> int:
    """How many forward passes a prompt takes: all orders share the pass in which no head is silenced."""
    return 1 + len(KNOCK_OUT_ORDERS) * (len(FRACTIONS) - 1)


def _name(silent: Sequence[Head]) -> str:
    """The journal's name of a run with these heads silenced. It hashes the heads: other rankings have other names."""
    return f"knock-out {hashlib.sha256(repr(sorted(silent)).encode()).hexdigest()[:16]}"


@torch.no_grad()
def _answered(teacher: Teacher, batch: ProbeBatch, silent: Collection[Head]) -> dict[str, Tensor] | None:
    """Which prompts the teacher answers right without these heads; None except on the last pipeline stage."""
    batch = batch.to(teacher.device)
    with _silenced(teacher, silent):
        logits_bpw = teacher.forward(batch.clean_bs, answer_positions(batch))
    return {"solved": teacher.solved(logits_bpw, batch.answer_bp)} if teacher.last else None


@contextlib.contextmanager
def _silenced(teacher: Teacher, silent: Collection[Head]) -> Iterator[None]:
    """Within the block, the given heads pass zeros to the output projection."""
    with contextlib.ExitStack() as hooks:
        for layer_idx, layer in teacher.layers.items():
            off = [own for own, head_idx in enumerate(teacher.own_heads(layer_idx)) if (layer_idx, head_idx) in silent]
            if off:

                def before_projection(module: Any, args: tuple, off: list[int] = off) -> tuple:
                    heads_sbhd = args[0].unflatten(-1, (-1, teacher.model.config.kv_channels))
                    index = torch.tensor(off, device=teacher.device)
                    return (heads_sbhd.index_fill(2, index, 0.0).flatten(2), *args[1:])

                hooks.enter_context(layer.self_attention.linear_proj.register_forward_pre_hook(before_projection))
        yield
