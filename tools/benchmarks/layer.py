# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Measure one attention block, forward and backward, at several ratios of heads.

The teacher's block has FA heads with rotary positions only. It stands beside HydraHead's blocks.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from hydra_mcore.config import HydraOptions, ModelShape
from hydra_mcore.costs.flops import attention_block
from hydra_mcore.heads import HeadMap, HeadsByKind
from hydra_mcore.kinds import FA, KINDS
from hydra_mcore.model.attention_plan import AttentionPlan
from hydra_mcore.model.build import transformer_config
from hydra_mcore.model.hydra_attention import HydraAttention
from hydra_mcore.model.precision import DTYPES
from hydra_mcore.model.runtime import process_groups
from hydra_mcore.progress import Progress
from tools.benchmarks.measure import Point, chosen_machine, gemm_speed, measured
from tools.benchmarks.profile_table import parts_report
from tools.benchmarks.report import Report
from tools.benchmarks.shapes import BLOCKS, SHARES, spread_heads

COLUMNS = ("tokens", "heads", "s (least..most)", "of all FA", "limit, s", "limit, of all FA", "peak MiB", "KiB a token")
CROSSING_COLUMNS = ("heads", "faster than all FA from, tokens")
LENGTHS = {"cpu": [2**power for power in range(11, 16)], "cuda": [2**power for power in range(11, 20)]}
TEACHER = "all FA (teacher)"
FLA = "flash-linear-attention's own layer"


def run(args: argparse.Namespace) -> Report:
    device, dtype = chosen_machine(args)
    sizes = {name: getattr(args, name) or default for name, default in BLOCKS[device].items()}
    lengths = sorted(args.lengths or LENGTHS[device])
    shape = ModelShape(
        num_layers=1, num_heads=sizes["heads"], num_kv_groups=sizes["kv_groups"], head_dim=sizes["head_dim"],
        hidden_size=sizes["hidden"], ffn_hidden_size=1, vocab_size=1, native_length=max(lengths),
    )  # fmt: skip
    before = gemm_speed(device, dtype)
    points, parts = measured_layers(args, shape, lengths, device, dtype)
    speed = max(before, gemm_speed(device, dtype))  # of a machine that may be busy for a moment
    names = ", ".join(f"{name.replace('_', ' ')} {size}" for name, size in sizes.items())
    notes = (
        f"One layer's attention block, forward and backward, all weights trained: {names}; one row, {dtype}, {device};"
        f" matrix products on this machine: {speed / 1e9:.0f} GFLOP/s. Seconds: median (least..most) of {args.repeats},"
        " all in turn. Peak: beyond weights, their gradients and the input. Limit: what all FA takes beyond its"
        " projections, times the share of FA heads, and everything else at the speed of matrix products."
    )
    teachers = _medians(points, TEACHER)
    least, rows = limits(args.ratios, shape, teachers, speed), []
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


def measured_layers(
    args: argparse.Namespace, shape: ModelShape, lengths: Sequence[int], device: str, dtype: str
) -> tuple[list[Point], list[Report]]:
    """The points of every length, and where the flags ask for them tables by part, at the last length."""
    points = []
    with process_groups():
        blocks = _blocks(args.ratios, shape, device, dtype)
        for length in Progress(lengths, desc="layer", unit="length"):
            x_sbm = torch.randn(length, 1, shape.hidden_size, device=device, dtype=DTYPES[dtype]).requires_grad_()
            rotary = RotaryEmbedding(shape.head_dim, 1.0, rotary_base=shape.rope_theta).get_emb(length).to(device)
            calls = {name: partial(_step, block, x_sbm, rotary) for name, block in blocks.items()}
            points += measured(calls, length, args.repeats, device)
        parts = (
            [parts_report(name, length, calls[name], [block]) for name, block in blocks.items()] if args.profile else []
        )
    return points, parts


def limits(
    ratios: Sequence[str], shape: ModelShape, teachers: Mapping[int, float], speed: float
) -> dict[str, dict[int, float]]:
    """What HydraHead's blocks need at least: name -> length -> seconds.

    The share of FA heads of what the teacher takes beyond its projections, and all else at the speed of matrix
    products.

    Args:
        teachers: seconds of the teacher's block by length.
        speed: operations a second of matrix products.
    """
    everyone = HeadsByKind.from_fa(range(shape.num_heads), shape.num_heads)
    found: dict[str, dict[int, float]] = {}
    for name, fa in _fa_heads(ratios, shape).items():
        heads, found[name] = HeadsByKind.from_fa(fa, shape.num_heads), {}
        for length, seconds in teachers.items():
            attention = KINDS[FA].core_flops(shape, HydraOptions(), length).total
            projections = (
                attention_block(shape, HydraOptions.teacher(), everyone, length).total - shape.num_heads * attention
            )
            linear = attention_block(shape, HydraOptions(), heads, length).total - len(fa) * attention
            fa_seconds = len(fa) / shape.num_heads * (seconds - length * projections / speed)
            found[name][length] = fa_seconds + length * linear / speed
    return found


def _fa_heads(ratios: Sequence[str], shape: ModelShape) -> dict[str, list[int]]:
    return {name: spread_heads(round(SHARES[name] * shape.num_heads), shape) for name in ratios}


def _blocks(ratios: Sequence[str], shape: ModelShape, device: str, dtype: str) -> dict[str, torch.nn.Module]:
    """By name; every weight has a gradient that the next one adds to, as in training."""
    groups = ProcessGroupCollection.use_mpu_process_groups()
    config = transformer_config(shape, DTYPES[dtype])

    def block(fa: Sequence[int], options: HydraOptions) -> HydraAttention:
        head_map = HeadMap.from_fa([(0, head) for head in fa], 1, shape.num_heads, shape.num_kv_groups)
        return HydraAttention(config, 1, AttentionPlan(head_map, options, options.log_scale_in("distill")), groups)

    blocks: dict[str, torch.nn.Module] = {TEACHER: block(range(shape.num_heads), HydraOptions.teacher())}
    blocks |= {name: block(fa, HydraOptions()) for name, fa in _fa_heads(ratios, shape).items()}
    if device == "cuda" and "all GDN" in ratios and importlib.util.find_spec("fla"):
        blocks[FLA] = _FlaLayer(shape).to(DTYPES[dtype])
    for module in blocks.values():
        for parameter in module.to(device).parameters():
            parameter.grad = torch.zeros_like(parameter)
    return blocks


class _FlaLayer(torch.nn.Module):
    """Gated DeltaNet as flash-linear-attention has it, of our shape and without an output gate, called as our blocks
    are.
    """

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        from fla.layers import GatedDeltaNet

        sizes = {"hidden_size": shape.hidden_size, "num_heads": shape.num_heads, "head_dim": shape.head_dim}
        self.layer = GatedDeltaNet(**sizes, expand_v=1.0, use_gate=False)

    def forward(self, x_sbm: Tensor, *, rotary_pos_emb: Tensor) -> tuple[Tensor, None]:
        return self.layer(x_sbm.transpose(0, 1))[0].transpose(0, 1), None


def _step(block: Callable[..., tuple[Tensor, None]], x_sbm: Tensor, rotary: Tensor) -> None:
    out_sbm, _ = block(x_sbm, rotary_pos_emb=rotary)
    x_sbm.grad = None
    out_sbm.backward(x_sbm.detach())
