# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Measure the gated delta rule beside what one would call instead.

That is the torch code of Megatron-Core and of transformers, attention, and the kernel of flash-linear-attention (FLA).
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.ssm.gated_delta_net.common import torch_chunk_gated_delta_rule as megatron_rule
from torch import Tensor
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule as transformers_rule

from hydra_mcore.compat import install
from hydra_mcore.kinds.delta_rule import chunked_flops
from hydra_mcore.kinds.full_attention import causal_attention
from hydra_mcore.model.precision import DTYPES
from hydra_mcore.ops.chunked_delta_rule import chunked_delta_rule, recurrent_delta_rule
from hydra_mcore.ops.gated_delta import gated_delta_rule
from hydra_mcore.progress import Progress
from tools.benchmarks.measure import Point, chosen_machine, gemm_speed, measured
from tools.benchmarks.report import Report

COLUMNS = (
    "tokens", "contestant", "s (least..most)", "times ours", "times attention", "peak MiB", "KiB a token", "GFLOP",
    "of the limit",
)  # fmt: skip
SWEEP_COLUMNS = ("tokens", "rows a chunk", "s (least..most)", "times 64 rows", "peak MiB")
ERROR_COLUMNS = ("contestant", "output", "dq", "dk", "dv", "d log decay", "d write")
GRADIENT, FORWARD = "forward and backward", "forward"
KEPT = "freed memory kept"
SLOW_TURNS = 4096  # tokens up to which the slow references take part in all turns
OURS, ATTENTION = "hydra_mcore", "attention (SDPA, causal)"

Rule = Callable[..., Tensor]  # of q, k, v, log decay, write


def run(args: argparse.Namespace) -> Report:
    """Every length: all contestants in turn, the slow ones of long rows once behind them; then the chunk sizes, then
    the errors.

    First in a process as it is, which is how one would call the others; then with what hydra_mcore installs in its own.
    """
    device, dtype = chosen_machine(args)
    rules = Rules(args.batch, args.heads, args.head_dim, device, dtype)
    product_dtype = "float32" if device == "cpu" else dtype  # our torch code computes bf16 inputs in float32 too
    before = gemm_speed(device, product_dtype)
    lengths = sorted(args.lengths)
    ways = (GRADIENT, FORWARD, KEPT) if device == "cpu" else (GRADIENT, FORWARD)
    points: dict[str, list[Point]] = {way: [] for way in ways}
    for way, length in Progress(list(itertools.product(ways, lengths)), desc="delta-rule"):
        if way == KEPT:
            install()
        points[way] += rules.points(length, args.repeats, way != FORWARD, length <= args.slow_limit)
    speed = max(before, gemm_speed(device, product_dtype))  # of a machine that may be busy for a moment
    shape = f"{args.batch} x {args.heads} heads x {args.head_dim} channels, {dtype}, {device}"
    notes = (
        f"{shape}; matrix products on this machine: {speed / 1e9:.0f} GFLOP/s. Seconds: median (least..most) of"
        f" {args.repeats}, all in turn; beyond {SLOW_TURNS} tokens Megatron-Core and transformers once. Peak: beyond"
        " the inputs, gradients of the inputs included. GFLOP: matrix products and triangular solves as"
        " hydra_mcore/costs/flops.py counts them; the limit is their time at the speed of matrix products."
    )
    kept = (
        f"{shape}; glibc keeps what is freed (hydra_mcore.compat does so), where it gave blocks back to the system"
        " above."
    )
    about = {GRADIENT: notes, FORWARD: shape, KEPT: kept}
    tables = [_table(way, points[way], rules.flops(lengths, way != FORWARD), speed, about[way]) for way in ways]
    if args.chunk_sizes:
        tables.append(_sweep(rules.chunk_points(lengths, args.chunk_sizes, args.repeats), shape))
    notes = (
        f"Largest difference over the largest value, {args.accuracy_length} tokens, {shape}; gradients of the product"
        " of output and values."
    )
    tables.append(
        Report("Error against the float64 recurrence", notes, ERROR_COLUMNS, rules.errors(args.accuracy_length))
    )
    return dataclasses.replace(tables[0], more=tables[1:])


def _table(
    way: str, points: Sequence[Point], flops: Mapping[str, Mapping[int, float]], speed: float, notes: str
) -> Report:
    """One direction's table.

    Args:
        flops: of the "delta rule" and of "attention", by length.
    """
    medians = {(point.name, point.length): point.median for point in points}
    rows: list[list[Any]] = []
    for point in points:
        counted = flops["attention" if point.name == ATTENTION else "delta rule"][point.length]
        ours, attention = (point.median / medians[name, point.length] for name in (OURS, ATTENTION))
        peak = [f"{point.peak_bytes / 2**20:.1f}", f"{point.peak_bytes / 1024 / point.length:.1f}"]
        share = f"{100 * counted / speed / point.median:.0f}%"
        rows.append(
            [
                point.length,
                point.name,
                point.spread,
                f"{ours:.3g}",
                f"{attention:.3g}",
                *peak,
                f"{counted / 1e9:.3g}",
                share,
            ]
        )
    names = {"delta rule": OURS, "attention": ATTENTION}
    limits = {
        names[what]: {length: counted / speed for length, counted in each.items()} for what, each in flops.items()
    }
    return Report(f"Gated delta rule, {way}", notes, COLUMNS, rows, points, limits)


def _sweep(points: Sequence[Point], notes: str) -> Report:
    rows = []
    for point in points:
        beside = next((other.median for other in points if other.name == "64" and other.length == point.length), None)
        ratio = f"{point.median / beside:.3g}" if beside else "-"
        rows.append([point.length, point.name, point.spread, ratio, f"{point.peak_bytes / 2**20:.1f}"])
    return Report("Our torch code by rows a chunk, forward and backward", notes, SWEEP_COLUMNS, rows)


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
            DTYPES[dtype],
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
        for name, counted in (("delta rule", chunked_flops), ("attention", causal_attention)):
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
