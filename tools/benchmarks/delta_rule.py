# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The gated delta rule beside what one would call instead: Megatron-Core's and transformers' torch code, attention,
FLA's kernel.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from tools.benchmarks.measure import Point, gemm_speed
from tools.benchmarks.options import add_machine, chosen_machine, positive
from tools.benchmarks.report import Report

HELP = "seconds and memory of the gated delta rule by length, beside Megatron-Core, transformers, attention and FLA"
EXAMPLES = """\
  the gated delta rule, forward and backward, beside Megatron-Core's, transformers' and attention (minutes)
      python tools/benchmark.py delta-rule --json delta_rule.json --figure delta_rule.png
  the same without the two slow ones beyond 2K tokens (a minute)
      python tools/benchmark.py delta-rule --slow-limit 2048
"""
COLUMNS = (
    "tokens", "contestant", "s (least..most)", "times ours", "times attention", "peak MiB", "KiB a token", "GFLOP",
    "of the limit",
)  # fmt: skip
SWEEP_COLUMNS = ("tokens", "rows a chunk", "s (least..most)", "times 64 rows", "peak MiB")
ERROR_COLUMNS = ("contestant", "output", "dq", "dk", "dv", "d log decay", "d write")
GRADIENT, FORWARD = "forward and backward", "forward"
KEPT = "freed memory kept"


def add_options(parser: argparse.ArgumentParser) -> None:
    lengths = [2**power for power in range(10, 15)]
    parser.add_argument(
        "--lengths", nargs="+", type=positive, default=lengths, metavar="N", help="tokens (default 1024 ... 16384)"
    )
    parser.add_argument("--heads", type=positive, default=4, metavar="N", help="default 4")
    parser.add_argument(
        "--head-dim", type=positive, default=128, metavar="N", help="channels of queries, keys and values (default 128)"
    )
    parser.add_argument("--batch", type=positive, default=1, metavar="N", help="rows (default 1)")
    parser.add_argument("--repeats", type=positive, default=5, metavar="N", help="the median counts (default 5)")
    slow = "longest row that Megatron-Core's and transformers' torch code read (default 16384; 0 leaves them out)"
    parser.add_argument("--slow-limit", type=int, default=16384, metavar="N", help=slow)
    sizes = "rows a chunk of our torch code to compare (default 32 64 128)"
    parser.add_argument("--chunk-sizes", nargs="*", type=positive, default=[32, 64, 128], metavar="N", help=sizes)
    exact = "tokens on which all are compared with the float64 recurrence (default 512)"
    parser.add_argument("--accuracy-length", type=positive, default=512, metavar="N", help=exact)
    add_machine(parser)


def run(args: argparse.Namespace) -> Report:
    """Every length: all contestants in turn, the slow ones of long rows once behind them; then the chunk sizes, then
    the errors.

    First in a process as it is, which is how one would call the others; then with what hydra_mcore installs in its own.
    """
    from tqdm import tqdm

    from hydra_mcore.compat import install
    from tools.benchmarks.delta_rules import SLOW_TURNS, Rules

    device, dtype = chosen_machine(args)
    rules = Rules(args.batch, args.heads, args.head_dim, device, dtype)
    product_dtype = "float32" if device == "cpu" else dtype  # our torch code computes bfloat16 inputs in float32 too
    before = gemm_speed(device, product_dtype)
    lengths = sorted(args.lengths)
    ways = (GRADIENT, FORWARD, KEPT) if device == "cpu" else (GRADIENT, FORWARD)
    points: dict[str, list[Point]] = {way: [] for way in ways}
    for way, length in tqdm([(way, length) for way in ways for length in lengths], desc="delta-rule"):
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
    from tools.benchmarks.delta_rules import ATTENTION, OURS

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
