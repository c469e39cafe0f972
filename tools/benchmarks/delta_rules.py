# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The contestants of ``tools/benchmark.py delta-rule``, their inputs and their errors."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.ssm.gated_delta_net.common import torch_chunk_gated_delta_rule as megatron_rule
from torch import Tensor
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule as transformers_rule

from hydra_mcore.kinds.full_attention import causal_attention
from hydra_mcore.kinds.gated_delta import delta_rule
from hydra_mcore.ops.chunked_delta_rule import chunked_delta_rule, recurrent_delta_rule
from hydra_mcore.ops.gated_delta import gated_delta_rule
from tools.benchmarks.measure import Point, measured

SLOW_TURNS = 4096  # tokens up to which the slow references take part in all turns
OURS, ATTENTION = "hydra_mcore", "attention (SDPA, causal)"

Rule = Callable[..., Tensor]  # of q, k, v, log decay, write


def _attention(q_bshd: Tensor, k_bshd: Tensor, v_bshd: Tensor, *_gates: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q_bshd, k_bshd, v_bshd))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def _first(rule: Callable[..., tuple[Tensor, Any]]) -> Rule:
    """A rule without the state that it returns too."""
    return lambda *inputs: rule(*inputs)[0]


# Unwrapped: where flash-linear-attention is installed, transformers would call its kernel under this name.
SLOW: dict[str, Rule] = {
    "Megatron-Core": _first(megatron_rule),
    "transformers": _first(inspect.unwrap(transformers_rule)),
}


class Rules:
    """Contestants on one shape, device and dtype."""

    def __init__(self, batch: int, heads: int, head_dim: int, device: str, dtype: str) -> None:
        self.batch, self.heads, self.head_dim, self.device, self.dtype = (
            batch,
            heads,
            head_dim,
            device,
            getattr(torch, dtype),
        )
        self.fast: dict[str, Rule] = {OURS: _first(gated_delta_rule), ATTENTION: _attention}
        if device == "cuda" and importlib.util.find_spec("fla"):
            from fla.ops.gated_delta_rule import chunk_gated_delta_rule

            self.fast["flash-linear-attention"] = lambda q, k, v, log_decay, write: chunk_gated_delta_rule(
                q, k, v, g=log_decay, beta=write
            )[0]

    def points(self, length: int, repeats: int, gradient: bool, with_slow: bool) -> list[Point]:
        """Seconds and memory at one length; beyond ``SLOW_TURNS`` tokens the slow ones are timed once, behind the
        others.
        """
        inputs = self.inputs(length)
        fast, slow = (
            {name: _call(rule, inputs, gradient) for name, rule in rules.items()} for rules in (self.fast, SLOW)
        )
        if not with_slow:
            return measured(fast, length, repeats, self.device)
        if length <= SLOW_TURNS:
            return measured(fast | slow, length, repeats, self.device)
        return measured(fast, length, repeats, self.device) + measured(slow, length, 1, self.device)

    def chunk_points(self, lengths: Sequence[int], sizes: Sequence[int], repeats: int) -> list[Point]:
        """Our torch code by rows a chunk, forward and backward; points are named by the size."""
        rules = {str(size): _first(partial(chunked_delta_rule, chunk_size=size)) for size in sizes}
        points = []
        for length in lengths:
            inputs = self.inputs(length)
            points += measured(
                {size: _call(rule, inputs, True) for size, rule in rules.items()}, length, repeats, self.device
            )
        return points

    def flops(self, lengths: Sequence[int], gradient: bool) -> dict[str, dict[int, float]]:
        """Operations by length of "delta rule" and "attention"."""
        found = {}
        for name, counted in (("delta rule", delta_rule), ("attention", causal_attention)):
            a_token = {length: counted(self.head_dim, length) for length in lengths}
            tokens = self.batch * self.heads
            found[name] = {n: n * tokens * (flops.total if gradient else flops.forward) for n, flops in a_token.items()}
        return found

    def errors(self, length: int) -> list[list[str]]:
        """Rows of contestant, error of the output and of the five gradients: the largest over the largest exact
        value.
        """
        inputs = self.inputs(length)
        exact = _results(_first(recurrent_delta_rule), [x.double() for x in inputs])
        rules = {name: rule for name, rule in (self.fast | SLOW).items() if name != ATTENTION}
        return [[name, *_differences(_results(rule, inputs), exact)] for name, rule in rules.items()]

    def inputs(self, length: int) -> list[Tensor]:
        """q and k of length 1, v, log decays of half-lives of 7 tokens and more, write strengths 0 to 1; the same every
        time.

        Gates are float32, as GDN heads make them.
        """
        generator = torch.Generator().manual_seed(0)
        shape = (self.batch, length, self.heads)
        q, k, v = torch.randn(3, *shape, self.head_dim, generator=generator).unbind()
        decay, write = torch.rand(2, *shape, generator=generator).unbind()
        wide = [x.to(self.dtype) for x in (F.normalize(q, dim=-1), F.normalize(k, dim=-1), v)]
        return [x.to(self.device).requires_grad_() for x in (*wide, -0.1 * decay, write)]


def _call(rule: Rule, inputs: Sequence[Tensor], gradient: bool) -> Callable[[], object]:
    return partial(_results if gradient else _forward, rule, inputs)


@torch.no_grad()
def _forward(rule: Rule, inputs: Sequence[Tensor]) -> Tensor:
    return rule(*inputs)


def _results(rule: Rule, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The output and the inputs' gradients of its product with the values, which are as random as any; attention has no
    gates.
    """
    out = rule(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, inputs[2].detach(), allow_unused=True)]


def _differences(found: Sequence[Tensor], exact: Sequence[Tensor]) -> list[str]:
    return [f"{float((a.double() - b).abs().max() / b.abs().max()):.0e}" for a, b in zip(found, exact, strict=True)]
