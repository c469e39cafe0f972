# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Output gates: act(W x + b) for each head, by channel or by head, nearly constant at the start."""

from __future__ import annotations

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from hydra_mcore.model.attention_plan import HeadSet
from hydra_mcore.model.branch import branch_class
from hydra_mcore.model.gates import OutputGate
from tests.support.one_layer import D, M, one_layer, random, scrambled

S, B, H = 5, 2, 3
X = random(S, B, M)


def make(
    groups: ProcessGroupCollection, granularity: str, activation: str = "sigmoid", heads: HeadSet | None = None
) -> OutputGate:
    heads = heads or HeadSet(tuple(range(H)), total=H)
    return OutputGate(one_layer().config, heads, granularity, activation, groups)


@pytest.mark.parametrize("activation", ["sigmoid", "silu"])
@pytest.mark.parametrize(("granularity", "width"), [("elementwise", D), ("headwise", 1)])
def test_equals_its_formula(one_rank: ProcessGroupCollection, granularity: str, width: int, activation: str) -> None:
    gate = scrambled(make(one_rank, granularity, activation))
    found = gate(X)
    assert found.shape == (S, B, H, width)
    for head in range(H):
        rows = slice(head * width, (head + 1) * width)
        logits = X @ gate.linear.weight[rows].T + gate.linear.bias[rows]
        sigmoid = 1 / (1 + (-logits).exp())
        expected = sigmoid if activation == "sigmoid" else logits * sigmoid
        torch.testing.assert_close(found[:, :, head], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("granularity", ["elementwise", "headwise"])
def test_starts_near_a_constant(one_rank: ProcessGroupCollection, granularity: str) -> None:
    """W ~ N(0, 1e-3) and b = 1 (paper section 3.2): sigmoid(1) nearly everywhere, but not without a gradient."""
    torch.manual_seed(0)
    gate = make(one_rank, granularity)
    assert (gate.linear.bias == 1).all()
    assert 0.7e-3 < gate.linear.weight.std() < 1.3e-3
    found = gate(X)
    torch.testing.assert_close(found, torch.full_like(found, 0.7310585786), rtol=0, atol=1e-2)
    assert found.std() > 0


def test_shared_heads_have_rows_of_their_own(one_rank: ProcessGroupCollection) -> None:
    gate = scrambled(make(one_rank, "headwise", heads=HeadSet((0, 2), total=3, shared=(1,))))
    linear = gate.linear
    expected = (X @ linear.weight_shared.T + linear.bias_shared).sigmoid()[..., None]
    assert gate(X).shape == (S, B, 2, 1)
    torch.testing.assert_close(gate(X, shared=True), expected, rtol=1e-12, atol=0)


def test_a_rank_without_heads(one_rank: ProcessGroupCollection) -> None:
    gate = make(one_rank, "elementwise", heads=HeadSet((), total=3))
    assert not list(gate.parameters())
    assert gate(X).shape == (S, B, 0, D)


@pytest.mark.parametrize(("kind", "default"), [("fa", D), ("gdn", None)])
@pytest.mark.parametrize(("granularity", "width"), [("none", None), ("headwise", 1), ("elementwise", D)])
def test_each_kind_has_the_gate_of_its_option(
    one_rank: ProcessGroupCollection, kind: str, default: int | None, granularity: str, width: int | None
) -> None:
    for options, expected in (({}, default), ({f"{kind}_gate": granularity}, width)):
        gate = branch_class(kind)(*one_layer(**options), one_rank).gate
        assert (None if gate is None else gate(X).shape[-1]) == expected
