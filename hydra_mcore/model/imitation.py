# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""How well a linear head can imitate a full-attention head, before any training and in closed form.

A linear head's output is linear in its values. Take the full-attention head's own queries and keys, and in place of
values the whole input of the layer: what the recurrence then reads out are features, and the best value projection is a
ridge regression of the head's output on them. What it leaves on other tokens, no value projection can repair.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hydra_mcore.ops.chunked_delta_rule import chunked_delta_rule
from hydra_mcore.ops.chunked_linear_attention import chunked_linear_attention
from hydra_mcore.ops.chunks import state_dtype

HALF_LIVES = (1.0, 8.0, 64.0, 512.0, 4096.0)  # tokens
WRITES = (0.5, 0.9)  # a sigmoid can start there
FEWEST_ROWS = 4
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # of the features' mean square: how strongly inherited values are held


class Memory(NamedTuple):
    """How a linear head remembers: constant gates."""

    half_life: float  # tokens; of KDA's channels that of the slowest rotary pair
    write: float  # write strength; 1 for a kind that has none
    fastest: float  # half-life in the channels of the fastest rotary pair, between the two evenly in log; or half_life


@dataclass(frozen=True)
class Split:
    """Three sets of rows: the fit is made on the first, memory and ridge are chosen on the second, and the third says
    what is left.
    """

    fit: slice
    choose: slice
    report: slice

    @classmethod
    def of(cls, rows: int) -> Split:
        """Half, a quarter and a quarter of at least ``FEWEST_ROWS``; raises ValueError for fewer."""
        if rows < FEWEST_ROWS:
            raise ValueError(f"{rows} rows: a fit needs {FEWEST_ROWS} at least")
        half, rest = rows // 2, rows // 2 + rows // 4
        return cls(slice(0, half), slice(half, rest), slice(rest, rows))


class Task(NamedTuple):
    """What a linear head works with and what it is to put out, float32 or float64."""

    q_bsd: Tensor  # queries and keys as the recurrence takes them
    k_bsd: Tensor
    v_bsd: Tensor  # inherited values
    out_bsd: Tensor  # of the full-attention head, before the output projection


@dataclass(frozen=True)
class Imitation:
    """The best linear head found in a full-attention head's place.

    Its values are ``scale`` times the inherited ones plus x @ ``change_md``.
    """

    memory: Memory
    ridge: float
    scale: float
    change_md: Tensor
    residual: float  # share of the output's square that is left on the rows to report, with the best values
    inherited: float  # the same with the inherited values times the best number, in the same memory


def values_input(x_bsm: Tensor, bias: bool) -> Tensor:
    """What values are made of: the layer's normed input in float32 at least, with a column of ones for their bias."""
    x_bsm = x_bsm.to(state_dtype(x_bsm))
    return torch.cat([x_bsm, torch.ones_like(x_bsm[..., :1])], dim=-1) if bias else x_bsm


def decay_rates(memory: Memory, head_dim: int) -> Tensor:
    """-ln(alpha) of each channel of a head, [d] float64. Channels i and i + d / 2 are a rotary pair, the first the
    fastest.
    """
    share_p = torch.linspace(1.0, 0.0, head_dim // 2, dtype=torch.float64)
    return math.log(2) / memory.half_life * (memory.half_life / memory.fastest) ** share_p.repeat(2)


def delta_rule(memory: Memory, q_bsd: Tensor, k_bsd: Tensor, values_bsv: Tensor) -> Tensor:
    """What a delta-rule head with constant gates reads: [b, s, v]."""
    rate_d = decay_rates(memory, q_bsd.shape[-1]).to(q_bsd)
    decay_bs1d = -rate_d.expand_as(q_bsd)[:, :, None]
    decay = decay_bs1d[..., 0] if memory.fastest == memory.half_life else decay_bs1d
    write_bs1 = torch.full_like(decay_bs1d[..., 0], memory.write)
    heads = (t[:, :, None] for t in (q_bsd, k_bsd, values_bsv))
    return chunked_delta_rule(*heads, decay, write_bs1, scale=1.0)[0][:, :, 0]


def linear_attention(memory: Memory, q_bsd: Tensor, k_bsd: Tensor, values_bsv: Tensor) -> Tensor:
    """What a head of decayed linear attention reads: [b, s, v]."""
    decay_1 = q_bsd.new_tensor([-math.log(2) / memory.half_life], dtype=torch.float64)
    heads = (t[:, :, None] for t in (q_bsd, k_bsd, values_bsv))
    return chunked_linear_attention(*heads, decay_1, scale=1.0)[0][:, :, 0]


_equal = [Memory(half_life, write, half_life) for half_life, write in itertools.product(HALF_LIVES, WRITES)]
_spread = [Memory(half_life, write, 1.0) for half_life, write in itertools.product(HALF_LIVES[1:], WRITES)]
READS: dict[str, tuple[Callable[[Memory, Tensor, Tensor, Tensor], Tensor], list[Memory]]] = {
    "gdn": (delta_rule, _equal),
    "kda": (delta_rule, _equal + _spread),  # with equal decays KDA is GDN
    "lightning": (linear_attention, [Memory(half_life, 1.0, half_life) for half_life in HALF_LIVES]),
}


def imitate(kind: str, task: Task, x_bsm: Tensor, split: Split, memories: Iterable[Memory] | None = None) -> Imitation:
    """The best imitation of a head by a linear head of a kind in ``READS``.

    Args:
        x_bsm: what values are made of (``values_input``).
        split: which rows serve for what.
        memories: those to choose from, all of ``READS`` unless given.
    """
    read, every = READS[kind]
    values_bsv, parts = torch.cat([x_bsm, task.v_bsd], dim=-1), (x_bsm.shape[-1], task.v_bsd.shape[-1])
    best: tuple[float, Imitation] | None = None
    for memory in every if memories is None else memories:
        features_bsm, start_bsd = read(memory, task.q_bsd, task.k_bsd, values_bsv).split(parts, dim=-1)
        chosen, found = fit_values(memory, features_bsm, start_bsd, task.out_bsd, split)
        if best is None or chosen < best[0]:
            best = (chosen, found)
    assert best is not None  # memories is never empty
    return best[1]


def fit_values(
    memory: Memory, features_bsm: Tensor, start_bsd: Tensor, out_bsd: Tensor, split: Split
) -> tuple[float, Imitation]:
    """The residual on the rows to choose by, and the fit with the ridge that is best there.

    Args:
        features_bsm: what a head reads out where its values are the layer's input.
        start_bsd: what it reads out of the inherited values.
    """
    start_td, out_td = start_bsd[split.fit], out_bsd[split.fit]
    scale = float((start_td * out_td).sum() / start_td.square().sum().clamp(min=1e-30))
    missing_bsd = out_bsd - scale * start_bsd
    left, ridge, change_md = ridge_fit(features_bsm, missing_bsd, split)
    chosen, residual = (share(left[rows], out_bsd[rows]) for rows in (split.choose, split.report))
    inherited = share(missing_bsd[split.report], out_bsd[split.report])
    return chosen, Imitation(memory, ridge, scale, change_md, residual, inherited)


def ridge_fit(x_bsm: Tensor, missing_bsd: Tensor, split: Split) -> tuple[Tensor, float, Tensor]:
    """What is left of ``missing_bsd`` after the best x @ change, with the ridge of ``RIDGES`` that leaves least on the
    rows to choose by; that ridge, and the change [m, d].
    """
    x_tm, missing_td = (t[split.fit].flatten(0, 1) for t in (x_bsm, missing_bsd))
    gram_mm, moment_md = (x_tm.T @ x_tm).double(), (x_tm.T @ missing_td).double()
    mean = gram_mm.diagonal().mean().clamp(min=1e-30)
    eye_mm = torch.eye(len(gram_mm), dtype=gram_mm.dtype, device=gram_mm.device)

    def fit(ridge: float) -> Tensor:
        return torch.cholesky_solve(moment_md, torch.linalg.cholesky(gram_mm + ridge * mean * eye_mm)).to(x_bsm.dtype)

    def squares(change_md: Tensor) -> float:
        return float((missing_bsd[split.choose] - x_bsm[split.choose] @ change_md).double().square().sum())

    changes = {ridge: fit(ridge) for ridge in RIDGES}
    ridge = min(RIDGES, key=lambda ridge: squares(changes[ridge]))
    return missing_bsd - x_bsm @ changes[ridge], ridge, changes[ridge]


def share(difference: Tensor, whole: Tensor) -> float:
    """The sum of squares of ``difference`` as a share of that of ``whole``; 0 if both are 0."""
    return float(difference.double().square().sum() / whole.double().square().sum().clamp(min=1e-30))


def imitation_flops(kinds: Sequence[str], tokens: int, hidden: int, head_dim: int) -> float:
    """Floating-point operations of ``imitate`` for one head and these kinds."""
    read = 8 * head_dim * hidden * tokens
    fit = hidden * hidden * tokens + len(RIDGES) * hidden**3 / 3
    return sum(len(READS[kind][1]) for kind in kinds) * (read + fit)
