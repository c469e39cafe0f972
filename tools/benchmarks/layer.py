# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""One attention block, forward and backward: the teacher's (all heads FA, rotary) beside HydraHead's at several
ratios.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence

from hydra_mcore.config import ModelShape
from tools.benchmarks.measure import Point, gemm_speed
from tools.benchmarks.options import QWEN3, add_machine, chosen_machine, positive
from tools.benchmarks.parts import add_profile
from tools.benchmarks.report import Report

HELP = "seconds and memory of an attention block by length: all heads FA beside HydraHead at 3:1, 7:1 and all GDN"
EXAMPLES = """\
  one attention block forward and backward, the teacher's beside HydraHead's, and where they cross (minutes)
      python tools/benchmark.py layer --json layer.json --figure layer.png
  the shape of Qwen3-1.7B on a GPU, to 512K tokens
      python tools/benchmark.py layer --device cuda
  which part of each block takes how long at 16K tokens
      python tools/benchmark.py layer --lengths 16384 --profile
"""
COLUMNS = ("tokens", "heads", "s (least..most)", "of all FA", "limit, s", "limit, of all FA", "peak MiB", "KiB a token")
CROSSING_COLUMNS = ("heads", "faster than all FA from, tokens")
SIZES = {
    "cpu": {"heads": 8, "kv_groups": 4, "head_dim": 128, "hidden": 1024},
    "cuda": {
        "heads": QWEN3.num_heads, "kv_groups": QWEN3.num_kv_groups, "head_dim": QWEN3.head_dim,
        "hidden": QWEN3.hidden_size,
    },
}  # fmt: skip
LENGTHS = {"cpu": [2**power for power in range(11, 16)], "cuda": [2**power for power in range(11, 20)]}


def add_options(parser: argparse.ArgumentParser) -> None:
    lengths = "tokens (default 2048 ... 32768, on a GPU ... 524288)"
    parser.add_argument("--lengths", nargs="+", type=positive, metavar="N", help=lengths)
    for name, on_cpu in SIZES["cpu"].items():
        what = f"default {on_cpu}, on a GPU {SIZES['cuda'][name]}"
        parser.add_argument("--" + name.replace("_", "-"), type=positive, metavar="N", help=what)
    parser.add_argument("--repeats", type=positive, default=3, metavar="N", help="the median counts (default 3)")
    add_profile(parser)
    add_machine(parser)


def run(args: argparse.Namespace) -> Report:
    from tools.benchmarks.layers import TEACHER, limits, measured_layers

    device, dtype = chosen_machine(args)
    sizes = {name: getattr(args, name) or default for name, default in SIZES[device].items()}
    lengths = sorted(args.lengths or LENGTHS[device])
    shape = ModelShape(
        num_layers=1, num_heads=sizes["heads"], num_kv_groups=sizes["kv_groups"], head_dim=sizes["head_dim"],
        hidden_size=sizes["hidden"], ffn_hidden_size=1, vocab_size=1, native_length=max(lengths),
    )  # fmt: skip
    before = gemm_speed(device, dtype)
    points, parts = measured_layers(shape, lengths, args.repeats, device, dtype, args.profile)
    speed = max(before, gemm_speed(device, dtype))  # of a machine that may be busy for a moment
    names = ", ".join(f"{name.replace('_', ' ')} {size}" for name, size in sizes.items())
    notes = (
        f"One layer's attention block, forward and backward, all weights trained: {names}; one row, {dtype}, {device};"
        f" matrix products on this machine: {speed / 1e9:.0f} GFLOP/s. Seconds: median (least..most) of {args.repeats},"
        " all in turn. Peak: beyond weights, their gradients and the input. Limit: what all FA takes beyond its"
        " projections, times the share of FA heads, and everything else at the speed of matrix products."
    )
    teachers = _medians(points, TEACHER)
    least, rows = limits(shape, teachers, speed), []
    for point in points:
        teacher, limit = teachers[point.length], least.get(point.name, {}).get(point.length)
        bound = ["-", "-"] if limit is None else [f"{limit:.3g}", f"{limit / teacher:.3f}"]
        memory = [f"{point.peak_bytes / 2**20:.1f}", f"{point.peak_bytes / 1024 / point.length:.1f}"]
        rows.append([point.length, point.name, point.spread, f"{point.median / teacher:.3f}", *bound, *memory])
    crossings = [[name, crossing(teachers, _medians(points, name))] for name in least]
    where = Report(
        "Where HydraHead becomes faster",
        "Between two lengths: interpolated on log scales.",
        CROSSING_COLUMNS,
        crossings,
    )
    return Report("Attention block, forward and backward", notes, COLUMNS, rows, points, least, more=(where, *parts))


def crossing(reference: Mapping[int, float], contestant: Mapping[int, float]) -> str:
    """The length from which on a contestant takes less time, in words.

    Args:
        reference, contestant: seconds by length; both have the same lengths.
    """
    lengths = sorted(reference)
    above = {n: math.log(contestant[n] / reference[n]) for n in lengths}  # below 0 where it is faster
    slower = [n for n in lengths if above[n] >= 0]
    if not slower:
        return f"below {lengths[0]}"
    if slower[-1] == lengths[-1]:
        return f"above {lengths[-1]}"
    a, b = slower[-1], lengths[lengths.index(slower[-1]) + 1]
    return str(round(math.exp(math.log(a) + (math.log(b) - math.log(a)) * above[a] / (above[a] - above[b]))))


def _medians(points: Sequence[Point], name: str) -> dict[int, float]:
    return {point.length: point.median for point in points if point.name == name}
