# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Measure the core of each kind of heads, forward and backward.

Beside it stand attention, Gated DeltaNet and the torch code that one would call instead.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from megatron.core.ssm.gated_delta_net.common import torch_chunk_gated_delta_rule
from torch import Tensor

from hydra_mcore.config import HydraOptions
from hydra_mcore.kinds import DEFAULT_LINEAR, FA, KINDS
from hydra_mcore.kinds.lightning import decay_rate
from hydra_mcore.model.precision import DTYPES
from hydra_mcore.ops.gated_delta import gated_delta_rule
from hydra_mcore.ops.linear_attention import linear_attention
from hydra_mcore.progress import Progress
from tools.benchmarks.measure import Point, chosen_machine, gemm_speed, measured
from tools.benchmarks.report import Report
from tools.benchmarks.shapes import heads_alone

BASE = KINDS[DEFAULT_LINEAR].label  # what the other kinds are compared with
COLUMNS = (
    "tokens", "contestant", "s (least..most)", "times its kind", f"times {BASE}", f"operations, times {BASE}",
    "times attention", "GFLOP", "of the limit", "peak MiB", "KiB a token",
)  # fmt: skip
GROWTH_COLUMNS = ("contestant", "time", "peak memory", "operations")


class Inputs(NamedTuple):
    """Each core takes those that it needs."""

    q_bshd: Tensor
    k_bshd: Tensor
    v_bshd: Tensor
    log_decay_bsh: Tensor
    log_decay_bshd: Tensor
    write_bsh: Tensor
    rate_h: Tensor


Core = Callable[[Inputs], Tensor]


def _attention(x: Inputs) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in x[:3])
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


CORES: dict[str, Core] = {
    "fa": _attention,
    "gdn": lambda x: gated_delta_rule(*x[:3], x.log_decay_bsh, x.write_bsh)[0],
    "kda": lambda x: gated_delta_rule(*x[:3], x.log_decay_bshd, x.write_bsh)[0],
    "lightning": lambda x: linear_attention(*x[:3], x.rate_h)[0],
}
MEGATRON = "Megatron-Core's torch_chunk_gated_delta_rule"
# Of flash-linear-attention, plain torch: kind -> module, function, and how it is called.
NAIVE = {
    "kda": ("kda", "naive_chunk_kda", lambda rule, x: rule(*x[:3], x.log_decay_bshd, x.write_bsh)[0]),
    "lightning": (
        "simple_gla",
        "naive_chunk_simple_gla",
        lambda rule, x: rule(*x[:3], x.rate_h.expand(x.q_bshd.shape[:3]))[0],
    ),
}


def references() -> dict[str, tuple[str, Core]]:
    """Kind -> its name and the torch function that one would call instead, as far as packages are installed."""
    found: dict[str, tuple[str, Core]] = {
        "gdn": (MEGATRON, lambda x: torch_chunk_gated_delta_rule(*x[:3], x.log_decay_bsh, x.write_bsh)[0])
    }
    if importlib.util.find_spec("fla"):
        for kind, (module, name, call) in NAIVE.items():
            rule = getattr(importlib.import_module(f"fla.ops.{module}.naive"), name)
            found[kind] = (f"flash-linear-attention's {name}", partial(call, rule))
    return found


def run(args: argparse.Namespace) -> Report:
    """Every length: all kinds in turn, then each reference once."""
    device, dtype = chosen_machine(args)
    product_dtype = "float32" if device == "cpu" else dtype  # our torch code computes bf16 inputs in float32 too
    before, others, lengths = gemm_speed(device, product_dtype), references(), sorted(args.lengths)
    kind_of = {kind.label: kind.name for kind in KINDS.values()} | {name: kind for kind, (name, _) in others.items()}
    points: list[Point] = []
    for length in Progress(lengths, desc="kinds", unit="length"):
        inputs = make_inputs(args.batch, length, args.heads, args.head_dim, device, dtype)
        ours = {kind.label: partial(_step, CORES[kind.name], inputs) for kind in KINDS.values()}
        points += measured(ours, length, args.repeats, device)
        if length <= args.slow_limit:
            points += measured(
                {name: partial(_step, core, inputs) for name, core in others.values()}, length, 1, device
            )
    speed = max(before, gemm_speed(device, product_dtype))  # of a machine that may be busy for a moment
    shape, heads = heads_alone(args.heads, args.head_dim), args.batch * args.heads
    operations = {
        (label, length): heads * length * KINDS[kind].core_flops(shape, HydraOptions(), length).total
        for (label, kind), length in itertools.product(kind_of.items(), lengths)
    }
    left_out = " Those for KDA and Lightning are left out: flash-linear-attention is not installed."
    notes = (
        f"{args.batch} x {args.heads} heads x {args.head_dim} channels, {dtype}, {device}; matrix products on this"
        f" machine: {speed / 1e9:.0f} GFLOP/s. Forward and backward; seconds: median (least..most) of {args.repeats},"
        f" all kinds in turn, the torch functions of others once.{'' if len(others) > 1 else left_out} Peak: beyond the"
        " inputs, gradients of the inputs included. Operations: matrix products and triangular solves as"
        " hydra_mcore/costs/flops.py counts them; the limit is their time at the speed of matrix products."
    )
    rows = _rows(points, kind_of, operations, speed)
    limits = {kind.label: {n: operations[kind.label, n] / speed for n in lengths} for kind in KINDS.values()}
    growth = _growth(points, operations, lengths[0], lengths[-1])
    return Report("The cores of all kinds of heads", notes, COLUMNS, rows, points, limits, more=(growth,))


def _rows(
    points: Sequence[Point], kind_of: Mapping[str, str], operations: Mapping[tuple[str, int], float], speed: float
) -> list[list[str | int]]:
    medians = {(point.name, point.length): point.median for point in points}
    rows = []
    for point in points:
        ours, base, full = (KINDS[kind].label for kind in (kind_of[point.name], DEFAULT_LINEAR, FA))
        times = {label: f"{point.median / medians[label, point.length]:.3g}" for label in (ours, base, full)}
        counted = operations[point.name, point.length]
        rows.append(
            [
                point.length, point.name, point.spread, times[ours], times[base],
                f"{counted / operations[base, point.length]:.3g}", times[full], f"{counted / 1e9:.3g}",
                f"{100 * counted / speed / point.median:.0f}%", f"{point.peak_bytes / 2**20:.1f}",
                f"{point.peak_bytes / 1024 / point.length:.1f}",
            ]
        )  # fmt: skip
    return rows


def _growth(
    points: Sequence[Point], operations: Mapping[tuple[str, int], float], shortest: int, longest: int
) -> Report:
    """How much more a contestant needs of the longest row than of the shortest."""
    first, last = ({point.name: point for point in points if point.length == n} for n in (shortest, longest))
    rows = [
        [
            name, f"{point.median / first[name].median:.2f}", f"{point.peak_bytes / first[name].peak_bytes:.2f}",
            f"{operations[name, longest] / operations[name, shortest]:.2f}",
        ]
        for name, point in last.items()
    ]  # fmt: skip
    notes = f"Rows of {longest} tokens over rows of {shortest}, {longest / shortest:.3g} times as long."
    return Report("Growth with the length", notes, GROWTH_COLUMNS, rows)


def make_inputs(batch: int, length: int, heads: int, head_dim: int, device: str, dtype: str) -> Inputs:
    """q and k of length 1, v, log decays of half-lives of 7 tokens and more, write strengths 0 to 1; the same every
    time. Gates are float32, as branches make them; Lightning's rates are those of a layer of as many heads.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (batch, length, heads)
    q, k, v = torch.randn(3, *shape, head_dim, generator=generator).unbind()
    by_channel, write = (
        -0.1 * torch.rand(*shape, head_dim, generator=generator),
        torch.rand(*shape, generator=generator),
    )
    wide = [x.to(DTYPES[dtype]) for x in (F.normalize(q, dim=-1), F.normalize(k, dim=-1), v)]
    gates = [by_channel.mean(-1), by_channel, write]
    rate_h = -decay_rate(HydraOptions(), torch.arange(heads).double(), heads)
    return Inputs(*(x.to(device).requires_grad_() for x in (*wide, *gates)), rate_h.float().to(device))


def _step(core: Core, inputs: Inputs) -> None:
    """Forward and backward, with the values, which are as random as any, as the gradient of the output."""
    out = core(inputs)
    torch.autograd.grad(out, inputs[:-1], inputs.v_bshd.detach().to(out.dtype), allow_unused=True)
