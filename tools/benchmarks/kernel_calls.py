# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Call every function of ``ops/fla_kernels.py`` in each way that leads to other kernels, as a model does."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from hydra_mcore.ops import fla_kernels
from hydra_mcore.ops.chunks import FEW_TOKENS
from hydra_mcore.sequence import SequencePart

LENGTH, HEADS, TAPS = 2048, 2, 4
PACKED = (0, 1, 70, LENGTH)  # boundaries of documents: not at multiples of a kernel's chunk
PARTS, PART = 3, 1  # context-parallel ranks; the one in the middle takes a state and hands one on

Call = tuple[str, Callable[[], object]]


def calls(kind: str, head_dim: int, dtype: torch.dtype, backward: bool) -> Iterator[Call]:
    """Name and function of everything that heads of a kind, their convolution or their norm launch."""
    if kind == "conv":
        yield from _conv_calls(head_dim, dtype, backward)
    elif kind == "norm":
        tokens = _leaf(LENGTH, 1, HEADS, head_dim, dtype=dtype)
        yield "whole rows", lambda: _run(fla_kernels.unit_length, [tokens], backward)
        yield "one token", lambda: _run(fla_kernels.unit_length, [tokens[:1]], False)
    else:
        yield from _recurrence_calls(kind, head_dim, dtype, backward)


def _recurrence_calls(kind: str, d: int, dtype: torch.dtype, backward: bool) -> Iterator[Call]:
    """Backward passes begin where training has them: whole rows, packed documents and context-parallel parts."""
    rule, few = _rule(kind), functools.partial(_rule(kind), few=True)
    tokens = functools.partial(_tokens, kind, d, dtype)
    state = _leaf(1, HEADS, d, d, dtype=torch.float32)
    parts = kind == "lightning" and backward  # its parts begin from a state, the others' within their kernels
    yield "whole rows", lambda: _run(rule, [*tokens(LENGTH), None], backward)
    yield "packed documents", lambda: _run(functools.partial(rule, bounds=PACKED), [*tokens(LENGTH), None], backward)
    yield "from a state", lambda: _run(rule, [*tokens(LENGTH), state], parts)
    yield "a few tokens", lambda: _run(few, [*tokens(FEW_TOKENS), state], False)
    yield "one token", lambda: _run(few, [*tokens(1), state], False)
    if kind == "lightning":
        states = _leaf(len(PACKED) - 1, HEADS, d, d, dtype=torch.float32)
        yield "packed parts", lambda: _run(functools.partial(rule, bounds=PACKED), [*tokens(LENGTH), states], backward)
        return
    wide = _leaf(1, HEADS, d, 2 * d, dtype=torch.float32)
    yield "what a part does to a state", lambda: _run(rule, [*tokens(LENGTH, value_dim=2 * d), wide], False)
    part = SequencePart(PARTS * LENGTH, PARTS, PART)
    on_parts = lambda *inputs: fla_kernels.delta_rule_on_parts(inputs, None, part, _group())  # noqa: E731
    yield "parts", lambda: _run(on_parts, tokens(LENGTH), backward)


def _rule(kind: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """The recurrence of its tokens' tensors and the state before them."""

    def lightning(*inputs: Any, bounds: Any = None, few: bool = False) -> tuple[Tensor, Tensor]:
        return fla_kernels.linear_attention((*inputs[:-1], torch.zeros(HEADS)), None, inputs[-1], bounds, few)

    def delta(*inputs: Any, bounds: Any = None, few: bool = False) -> tuple[Tensor, Tensor]:
        return fla_kernels.delta_rule(inputs[:-1], None, inputs[-1], bounds, few)

    return lightning if kind == "lightning" else delta


def _tokens(kind: str, d: int, dtype: torch.dtype, length: int, value_dim: int | None = None) -> list[Tensor]:
    rows = (1, length, HEADS)
    vectors = [_leaf(*rows, size, dtype=dtype) for size in (d, d, value_dim or d)]
    if kind == "lightning":
        return vectors
    decay_shape = (*rows, d) if kind == "kda" else rows
    return [*vectors, _leaf(*decay_shape, dtype=torch.float32), _leaf(*rows, dtype=torch.float32)]


def _conv_calls(d: int, dtype: torch.dtype, backward: bool) -> Iterator[Call]:
    for name, bounds in (("whole rows", None), ("packed", PACKED)):
        for activation in (None, "silu"):
            inputs = [_leaf(LENGTH, 1, HEADS, 3 * d, dtype=dtype), _leaf(HEADS * 3 * d, TAPS, dtype=dtype)]
            convolve = functools.partial(fla_kernels.short_conv, bounds=bounds, activation=activation)
            yield f"{name}, {activation}", functools.partial(_run, convolve, inputs, backward)


def _run(function: Callable[..., Any], inputs: list[Tensor | None], backward: bool) -> None:
    """Forward, and backward from all results that have a gradient."""
    with torch.set_grad_enabled(backward):
        results = function(*inputs)
    results = [x for x in (results if isinstance(results, tuple) else (results,)) if x is not None and x.requires_grad]
    if backward:
        torch.autograd.backward(results, [torch.zeros_like(x) for x in results])


def _leaf(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.zeros(shape, dtype=dtype, requires_grad=True)


@functools.cache
def _group() -> dist.ProcessGroup:
    """Ranks that are not there: what would come from them is left as it is."""
    from fla.ops.cp import chunk_bwd, chunk_delta_h, chunk_fwd, chunk_merge

    for module in (chunk_bwd, chunk_delta_h, chunk_fwd, chunk_merge):
        module._check_cp_device = lambda device: None  # it asks for CUDA tensors
    dist.init_process_group("fake", store=FakeStore(), rank=PART, world_size=PARTS)
    return dist.group.WORLD
