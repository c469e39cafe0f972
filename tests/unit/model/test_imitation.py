# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Linear heads that imitate full attention, against recurrences token by token and a least-squares solver, in
float64.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hydra_mcore.kinds import FA, KINDS
from hydra_mcore.model.imitation import READS, RIDGES, Memory, Split, Task, imitate
from tests.support.naive_gated_delta import naive_gated_delta_rule
from tests.support.naive_linear_attention import naive_linear_attention

ROWS, LENGTH, HEAD, WIDTH = 8, 70, 6, 9  # a chunk and a little more
same = partial(torch.testing.assert_close, rtol=1e-8, atol=1e-10)
MEMORIES = [
    ("gdn", Memory(8.0, 0.5, 8.0)),
    ("kda", Memory(64.0, 0.9, 64.0)),
    ("kda", Memory(64.0, 0.5, 1.0)),
    ("lightning", Memory(8.0, 1.0, 8.0)),
]


@pytest.fixture
def x_bsm() -> Tensor:
    return torch.randn(ROWS, LENGTH, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def task(x_bsm: Tensor) -> Task:
    """Of softmax attention with random projections."""
    generator = torch.Generator().manual_seed(2)
    q, k, v = (x_bsm @ torch.randn(WIDTH, HEAD, dtype=torch.float64, generator=generator) for _ in range(3))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return Task(F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, out)


def naive_read(kind: str, memory: Memory, task: Task, values_bsv: Tensor) -> Tensor:
    q, k = (t[:, :, None] for t in (task.q_bsd, task.k_bsd))
    rate = math.log(2) / memory.half_life
    if kind == "lightning":
        decay = torch.tensor([-rate], dtype=torch.float64)
        return naive_linear_attention(q, k, values_bsv[:, :, None], decay, scale=1.0)[0][:, :, 0]
    decay = torch.full(q.shape, -rate, dtype=torch.float64)
    for pair in range(HEAD // 2):  # the first pair is the fastest, and half-lives are even in log
        half_life = memory.fastest * (memory.half_life / memory.fastest) ** (pair / (HEAD // 2 - 1))
        decay[..., [pair, pair + HEAD // 2]] = -math.log(2) / half_life
    write = torch.full(q.shape[:3], memory.write, dtype=torch.float64)
    return naive_gated_delta_rule(q, k, values_bsv[:, :, None], decay, write, scale=1.0)[0][:, :, 0]


def naive_fit(x_tm: Tensor, y_td: Tensor, ridge: float) -> Tensor:
    """Ridge regression as least squares with rows of zeros to meet."""
    strength = math.sqrt(ridge * float(x_tm.square().sum(0).mean()))
    held = torch.cat([x_tm, strength * torch.eye(x_tm.shape[1], dtype=x_tm.dtype)])
    return torch.linalg.lstsq(held, torch.cat([y_td, y_td.new_zeros(x_tm.shape[1], y_td.shape[1])])).solution


@pytest.mark.parametrize(("kind", "memory"), MEMORIES)
def test_equals_least_squares_on_a_recurrence(kind: str, memory: Memory, task: Task, x_bsm: Tensor) -> None:
    split = Split.of(ROWS)
    features, start = (naive_read(kind, memory, task, values) for values in (x_bsm, task.v_bsd))
    fit, choose, report = (
        [t[rows].flatten(0, 1) for t in (features, start, task.out_bsd)] for rows in vars(split).values()
    )
    scale = float((fit[1] * fit[2]).sum() / fit[1].square().sum())

    def left(part: list[Tensor], change_md: Tensor) -> float:
        error = part[2] - scale * part[1] - part[0] @ change_md
        return float(error.square().sum() / part[2].square().sum())

    changes = {ridge: naive_fit(fit[0], fit[2] - scale * fit[1], ridge) for ridge in RIDGES}
    ridge = min(RIDGES, key=lambda ridge: left(choose, changes[ridge]))
    found = imitate(kind, task, x_bsm, split, [memory])
    assert (found.memory, found.ridge) == (memory, ridge)
    same(found.change_md, changes[ridge])
    same(torch.tensor([found.scale, found.residual]), torch.tensor([scale, left(report, changes[ridge])]))
    same(torch.tensor(found.inherited), torch.tensor(left(report, torch.zeros_like(changes[ridge]))))
    assert 0 < found.residual < 1


@pytest.mark.parametrize(("kind", "memory"), [MEMORIES[0], *MEMORIES[2:]])
def test_a_head_that_is_linear_already_is_found(kind: str, memory: Memory, task: Task, x_bsm: Tensor) -> None:
    """With other values than the inherited ones; all memories of the kind are tried."""
    generator = torch.Generator().manual_seed(3)
    values = x_bsm @ torch.randn(WIDTH, HEAD, dtype=torch.float64, generator=generator)
    linear = task._replace(out_bsd=naive_read(kind, memory, task, values))
    found = imitate(kind, linear, x_bsm, Split.of(ROWS))
    assert found.memory == memory and found.residual < 1e-4 < 0.1 < found.inherited


def test_what_nothing_explains_is_left(task: Task, x_bsm: Tensor) -> None:
    """The fit is judged on other tokens: noise is not learned, and what does not help is held back."""
    noise = torch.randn(task.out_bsd.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    found = imitate("gdn", task._replace(out_bsd=noise), x_bsm, Split.of(ROWS))
    assert 0.98 < found.residual < 1.1 and found.ridge == max(RIDGES)


def test_a_silent_head_leaves_nothing(task: Task, x_bsm: Tensor) -> None:
    found = imitate("gdn", task._replace(out_bsd=torch.zeros_like(task.out_bsd)), x_bsm, Split.of(ROWS))
    assert (found.residual, found.inherited) == (0.0, 0.0) and not found.change_md.any()


def test_kda_with_equal_decays_is_gdn(task: Task, x_bsm: Tensor) -> None:
    found, other = (imitate(kind, task, x_bsm, Split.of(ROWS), READS["gdn"][1]) for kind in ("kda", "gdn"))
    assert dataclasses.replace(found, change_md=other.change_md) == other
    same(found.change_md, other.change_md, rtol=0, atol=0)


def test_every_linear_kind_can_imitate() -> None:
    assert set(READS) == set(KINDS) - {FA}


def test_rows_are_kept_apart() -> None:
    assert vars(Split.of(7)) == {"fit": slice(0, 3), "choose": slice(3, 4), "report": slice(4, 7)}
    with pytest.raises(ValueError, match="3 rows"):
        Split.of(3)
