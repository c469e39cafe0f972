# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""A chain of elementwise functions over long rows, a few rows at a time: on a CPU each link then finds its input in the
cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["in_tiles"]

TILE_VALUES = 2**18


def in_tiles(
    function: Callable[..., Tensor],
    by_row: Sequence[Tensor | None],
    for_all: Sequence[Tensor | None] = (),
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``function(*by_row, *for_all)``, where the function treats every row of axis 0 by itself.

    On a CPU it is called for a few rows at a time, and once more in backward, for which nothing is kept but the
    arguments: that is cheaper than to fetch from memory what every link would have kept. Elsewhere, and for a compiler,
    it is called once.

    Args:
        function: gives a tensor of the shape of the first argument.
        by_row: tensors [s, ...]; of one with more rows than the first, those behind are not read.
        for_all: tensors that all rows share. None, here or above, is handed on as it is.
        dtype: of the function's result, that of the first argument unless given.
    """
    if by_row[0].device.type != "cpu" or torch.compiler.is_compiling():
        return function(*by_row, *for_all)
    return _InTiles.apply(function, by_row[0].dtype if dtype is None else dtype, len(by_row), *by_row, *for_all)


class _InTiles(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, function: Callable[..., Tensor], dtype: torch.dtype, count: int, *tensors: Tensor | None
    ) -> Tensor:
        ctx.function, ctx.count = function, count
        ctx.save_for_backward(*tensors)
        by_row, for_all = tensors[:count], tensors[count:]
        out = torch.empty(by_row[0].shape, dtype=dtype)
        for rows in _tiles(out):
            out[rows] = function(*(None if x is None else x[rows] for x in by_row), *for_all)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        tensors, wanted = ctx.saved_tensors, ctx.needs_input_grad[3:]
        gradients = [_gradient(x, i < ctx.count) if wanted[i] else None for i, x in enumerate(tensors)]
        for rows in _tiles(d_out):
            with torch.enable_grad():
                parts = [x[rows] if x is not None and i < ctx.count else x for i, x in enumerate(tensors)]
                parts = [
                    x if x is None else x.detach().requires_grad_(want) for x, want in zip(parts, wanted, strict=True)
                ]
                out = ctx.function(*parts)
            found = iter(torch.autograd.grad(out, [x for x in parts if x is not None and x.requires_grad], d_out[rows]))
            for i, gradient in enumerate(gradients):
                if gradient is not None and i < ctx.count:
                    gradient[rows] = next(found)
                elif gradient is not None:
                    gradient += next(found)
        return None, None, None, *(x if x is None else x.to(tensors[i].dtype) for i, x in enumerate(gradients))


def _gradient(x: Tensor, by_row: bool) -> Tensor:
    """Where the gradients of tiles go, or are summed up."""
    return torch.empty_like(x) if by_row else torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))


def _tiles(x: Tensor) -> Iterator[slice]:
    rows = max(1, TILE_VALUES // max(1, x[:1].numel()))
    return (slice(start, min(start + rows, len(x))) for start in range(0, len(x), rows))
