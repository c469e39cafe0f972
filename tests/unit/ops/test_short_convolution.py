# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The short convolution against its definition, token by token."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hydra_mcore.ops import short_convolution


def naive(padded_sbhc: Tensor, weight_hct: Tensor, position_s: Tensor | None) -> Tensor:
    taps = weight_hct.shape[-1]
    rows = []
    for s in range(len(padded_sbhc) - taps + 1):
        lags = range(taps if position_s is None else min(taps, int(position_s[s]) + 1))
        rows.append(sum(padded_sbhc[s + taps - 1 - lag] * weight_hct[..., taps - 1 - lag] for lag in lags))
    return torch.stack(rows)


@pytest.mark.parametrize("values", [1, 3 * 2 * 3 * 5, 2**18], ids=["a row", "three rows", "all rows"])
@pytest.mark.parametrize("taps", [1, 4])
@pytest.mark.parametrize("lengths", [None, [1, 2, 5, 9]], ids=["one document", "packed"])
def test_equals_its_definition(
    values: int, taps: int, lengths: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(short_convolution, "TILE_VALUES", values)
    torch.manual_seed(0)
    position_s = None if lengths is None else torch.cat([torch.arange(length) for length in lengths])
    inputs = [torch.randn(17 + taps - 1, 2, 3, 5, dtype=torch.float64), torch.randn(3, 5, taps, dtype=torch.float64)]
    d_out = torch.randn(17, 2, 3, 5, dtype=torch.float64)
    results = []
    for convolution in (short_convolution.short_convolution, naive):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = convolution(*leaves, position_s)
        results.append([out, *torch.autograd.grad(out, leaves, d_out)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_no_heads_and_no_tokens_stay_connected() -> None:
    for tokens, heads in ((5, 0), (0, 3)):
        leaves = [
            torch.randn(tokens + 3, 2, heads, 5, requires_grad=True),
            torch.randn(heads, 5, 4, requires_grad=True),
        ]
        out = short_convolution.short_convolution(*leaves)
        assert out.shape == (tokens, 2, heads, 5)
        assert [x.shape for x in torch.autograd.grad(out.sum(), leaves)] == [x.shape for x in leaves]


def test_bfloat16_sums_weights_in_float32() -> None:
    """A gradient that bfloat16 sums would stop short of."""
    padded = torch.ones(3 + 4096, 1, 1, 1, dtype=torch.bfloat16)
    weight = torch.ones(1, 1, 4, dtype=torch.bfloat16, requires_grad=True)
    (gradient,) = torch.autograd.grad(short_convolution.short_convolution(padded, weight).sum(), [weight])
    assert gradient.dtype == torch.bfloat16 and gradient.eq(4096).all()
