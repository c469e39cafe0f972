# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""A kind of heads that lives in tests alone: plain decayed linear attention, S_t = decay S_{t-1} + k_t v_t^T.

This file is its description. With it, ``branch.py`` and ``kinds_hydra_head.py`` (the exported branch) it is all that a
kind needs; ``sitecustomize.py`` puts it into the tables of processes that a test starts.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hydra_mcore.errors import ConfigError
from hydra_mcore.kinds.kind import (
    FLOAT,
    Flops,
    HeadCount,
    HeadKind,
    HeadParameter,
    Kept,
    Options,
    Sent,
    Statistic,
    Workload,
    product,
    queries_keys_values,
)
from hydra_mcore.sequence import SequencePart
from hydra_mcore.shape import ModelShape

HERE = Path(__file__).parent
EXPORTED = str(HERE / "kinds_hydra_head.py")


@dataclass(kw_only=True, frozen=True)
class ToyOptions:
    """The options of toy heads."""

    toy_decay: float = 0.9
    """What is left of a toy head's state after each token [toy]."""


def check(options: Options) -> None:
    if not 0.0 < options.toy_decay <= 1.0:
        raise ConfigError(f"toy_decay is {options.toy_decay}; it is a share of the state")


def parameters(shape: ModelShape, options: Options) -> list[HeadParameter]:
    return queries_keys_values(shape, options, "head")


def core_flops(shape: ModelShape, options: Options, length: int) -> Flops:
    return 2 * product(shape.head_dim, length)


def kept(shape: ModelShape, options: Options, load: Workload, heads: HeadCount) -> Kept:
    """Queries, keys and values; scores of the row."""
    d, p = shape.head_dim, load.value_bytes
    return Kept(heads.own * 3 * d * p, heads.own * 2 * FLOAT * load.length / load.cp_size)


def working(shape: ModelShape, options: Options, load: Workload, heads: HeadCount) -> float:
    return load.tokens * heads.own * (6 * shape.head_dim * FLOAT + 2 * FLOAT * load.length / load.cp_size)


def sent(
    shape: ModelShape, options: Options, part: SequencePart, heads: HeadCount, rows: int, value_bytes: int
) -> dict[str, Sent]:
    states = (part.cp_size - 1) * rows * heads.own * 2 * shape.head_dim**2 * FLOAT
    return {"states": Sent(states, states)}


def cached(shape: ModelShape, options: Options, heads: HeadCount, tokens: float, rows: int, value_bytes: int) -> float:
    return rows * heads.own * FLOAT * shape.head_dim**2


TOY = HeadKind(
    name="toy",
    label="Toy",
    title="decayed linear attention",
    colour="#8a8a8a",
    branch="tests.toy_kind.branch:ToyHeads",
    exported=EXPORTED,
    options=ToyOptions,
    check=check,
    parameters=parameters,
    gate=lambda options: "none",
    core="linear attention",
    core_flops=core_flops,
    decode_flops=lambda head_dim, seen: 5 * head_dim**2,
    kept=kept,
    working=working,
    sent=sent,
    cached=cached,
    statistics=(Statistic("query size"),),
)
