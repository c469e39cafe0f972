# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""A chain of functions over rows in tiles against the same at once."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hydra_mcore.ops import tiles


def chain(x: Tensor, gate: Tensor, angle: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x * gate.sigmoid(), weight.shape, weight) * angle.cos()


@pytest.mark.parametrize("values", [1, 3 * 4 * 5, 2**18], ids=["a row", "three rows", "all rows"])
def test_results_and_gradients_are_those_of_one_call(values: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "TILE_VALUES", values)
    torch.manual_seed(0)
    shapes = (17, 4, 5), (17, 4, 1), (20, 1, 5), (5,)  # the angles of more rows than there are
    x, gate, angle, weight = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    d_out, found = torch.randn(17, 4, 5, dtype=torch.float64), []
    for run in (
        lambda *xs: tiles.in_tiles(chain, xs[:3], xs[3:]),
        lambda x, gate, angle, weight: chain(x, gate, angle[:17], weight),
    ):
        leaves = [t.clone().requires_grad_() for t in (x, gate, weight)]
        out = run(*leaves[:2], angle, leaves[2])
        found.append([out, *torch.autograd.grad(out, leaves, d_out)])
    for actual, expected in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_arguments_without_gradient_and_empty_rows() -> None:
    weight = torch.ones(5, requires_grad=True)
    for rows, heads in ((0, 4), (17, 0)):
        x, gate, angle = torch.randn(rows, heads, 5), torch.randn(rows, heads, 1), torch.randn(rows, 1, 5)
        out = tiles.in_tiles(chain, [x, gate, angle], [weight])
        (gradient,) = torch.autograd.grad(out.sum(), [weight])
        assert out.shape == x.shape and torch.equal(gradient, torch.zeros(5))


def test_a_result_of_another_dtype() -> None:
    x = torch.randn(17, 4, 5).bfloat16().requires_grad_()
    out = tiles.in_tiles(lambda x: x.float().exp(), [x], dtype=torch.float32)
    (gradient,) = torch.autograd.grad(out.sum(), [x])
    assert out.dtype == torch.float32 and gradient.dtype == torch.bfloat16
    assert torch.equal(out, x.float().exp()) and torch.equal(gradient, out.bfloat16())


def test_backward_keeps_the_arguments_alone() -> None:
    kept: list[Tensor] = []
    x, weight = torch.randn(17, 4, 5, requires_grad=True), torch.ones(5, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        tiles.in_tiles(lambda x, weight: F.rms_norm(x.sin(), weight.shape, weight).exp(), [x], [weight])
    assert [t.data_ptr() for t in kept] == [x.data_ptr(), weight.data_ptr()]
