# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Count or time how evenly ``fa_balance`` deals a layer's attention to tensor-parallel ranks."""

from __future__ import annotations

import argparse
import contextlib
import random
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.testing._internal.distributed.fake_pg import FakeStore

from hydra_mcore.config import HydraOptions, ModelShape
from hydra_mcore.costs.communication import imbalance
from hydra_mcore.heads import Head, HeadLayout, HeadMap
from hydra_mcore.kinds import FA
from hydra_mcore.model.attention_plan import AttentionPlan
from hydra_mcore.model.build import transformer_config
from hydra_mcore.model.hydra_attention import HydraAttention
from hydra_mcore.selection.choose import choose_heads, parse_ratio
from hydra_mcore.sequence import SequencePart
from tools.benchmarks.report import Report
from tools.benchmarks.shapes import QWEN3, spread_heads

COUNTED = ("head map", "TP", "heads: mean", "heads: worst", "queries: mean", "queries: worst")
TIMED = ("FA heads", "way", "busiest rank, s", "mean of ranks, s", "busiest / mean", 'busiest / busiest of "heads"')
TIMED_COUNTS, TIMED_TP = (2, 4, 10), 8
RATIOS = ("3:1", "7:1", "15:1")
RANDOM_MAPS = 1000
WAYS = (
    '"heads" and "queries": see --fa-balance.\n"all by queries", for comparison: every rank takes its part of every FA'
    " head;\nthe same thing with fewer FA heads than ranks."
)


def run(args: argparse.Namespace) -> Report:
    return _timed(args) if args.measure else _counted(args)


def _timed(args: argparse.Namespace) -> Report:
    length = args.length or 4096
    rows = list(rank_rows({n: spread_heads(n, QWEN3) for n in TIMED_COUNTS}, QWEN3, TIMED_TP, length, args.repeats))
    title = f"Seconds of one layer's attention block, forward and backward, {length} tokens, TP {TIMED_TP}"
    notes = f"Each rank alone on this machine without communication; median of {args.repeats}. {WAYS}"
    return Report(title, notes, TIMED, rows)


def _counted(args: argparse.Namespace) -> Report:
    length = args.length or 16384
    rows: list[list[Any]] = []
    for name, maps in _head_maps(args.head_map):
        rows += _imbalances(name, maps, args.tp, length)
    title = f"Causal query-key products of the busiest tensor-parallel rank over the mean of ranks, {length} tokens"
    return Report(title, "One document; mean and worst of the layers that have FA heads.", COUNTED, rows)


def _head_maps(paths: Sequence[Path]) -> Iterator[tuple[str, list[HeadMap]]]:
    """Named head maps: the given files, heads drawn from the whole model at several ratios, any number in any layer."""
    for path in paths:
        yield str(path), [HeadMap.load(path)]
    total = QWEN3.num_layers * QWEN3.num_heads
    for ratio in RATIOS:
        yield (
            f"{ratio}, random scores, global",
            [choose_heads("global_random", QWEN3, parse_ratio(ratio, total), seed=0).head_map],
        )
    yield f"{RANDOM_MAPS} random maps", [_random_map(random.Random(seed)) for seed in range(RANDOM_MAPS)]


def _random_map(rng: random.Random) -> HeadMap:
    heads = range(QWEN3.num_heads)
    chosen: list[Head] = []
    for layer in range(QWEN3.num_layers):
        chosen += [(layer, head) for head in rng.sample(heads, rng.randint(0, QWEN3.num_heads))]
    return HeadMap.from_fa(chosen, QWEN3.num_layers, QWEN3.num_heads, QWEN3.num_kv_groups)


def _imbalances(name: str, maps: Sequence[HeadMap], tp_sizes: Sequence[int], length: int) -> Iterator[list[Any]]:
    part = SequencePart(length)
    for tp_size in tp_sizes:
        row: list[Any] = [name, tp_size]
        for way in ("heads", "queries"):
            found = [imbalance(layout, FA, part) for layout in _layouts_with_fa(maps, tp_size, way)]
            row += [f"{sum(found) / len(found):.3f}", f"{max(found):.3f}"] if found else ["-", "-"]
        yield row


def _layouts_with_fa(maps: Sequence[HeadMap], tp_size: int, way: str) -> Iterator[HeadLayout]:
    """The head layout of every layer that has FA heads."""
    for head_map in maps:
        for layer_idx, layer in enumerate(head_map.layers):
            if layer[FA]:
                yield HeadLayout(layer, head_map.num_kv_groups, tp_size, layer_idx, way)


def rank_rows(
    heads: dict[int, list[int]], shape: ModelShape, tp_size: int, length: int, repeats: int
) -> Iterator[list[Any]]:
    """Table rows, three ways for each choice of FA heads: seconds of the busiest rank and of the mean, and what they
    compare to.
    """
    for count, fa in heads.items():
        head_map = HeadMap.from_fa([(0, head) for head in fa], 1, shape.num_heads, shape.num_kv_groups)
        ranks = [_rank_seconds(rank, tp_size, head_map, shape, length, repeats) for rank in range(tp_size)]
        by_heads = max(seconds["heads"] for seconds in ranks)
        for way in ranks[0]:
            busiest, mean = max(seconds[way] for seconds in ranks), statistics.mean(seconds[way] for seconds in ranks)
            yield [count, way, f"{busiest:.3f}", f"{mean:.3f}", f"{busiest / mean:.2f}", f"{busiest / by_heads:.2f}"]


def _rank_seconds(
    rank: int, tp_size: int, head_map: HeadMap, shape: ModelShape, length: int, repeats: int
) -> dict[str, float]:
    """Median seconds by way; the ways take turns, so that a slow moment of the machine does not fall on one of them."""
    seconds: dict[str, list[float]] = {}
    with _rank_of(rank, tp_size) as groups:
        layers = _layers(head_map, shape, groups)
        for repeat in range(repeats + 1):
            for way, layer in layers.items():
                taken = _seconds(layer, shape, length)
                if repeat:  # the first one warms up
                    seconds.setdefault(way, []).append(taken)
    print(f"{head_map.num_fa} FA heads, rank {rank}: {seconds}", file=sys.stderr)
    return {way: statistics.median(taken) for way, taken in seconds.items()}


@contextlib.contextmanager
def _rank_of(rank: int, tp_size: int) -> Iterator[ProcessGroupCollection]:
    """Be one of the ranks, alone: torch's fake groups return at once and leave tensors as they are, so results are
    wrong.
    """
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=tp_size)
    try:
        yield ProcessGroupCollection(tp=dist.group.WORLD, cp=dist.new_group([rank]))
    finally:
        dist.destroy_process_group()


def _layers(head_map: HeadMap, shape: ModelShape, groups: ProcessGroupCollection) -> dict[str, HydraAttention]:
    config = transformer_config(shape, torch.bfloat16 if torch.cuda.is_available() else torch.float32)

    def layer(fa_balance: str) -> HydraAttention:
        plan = AttentionPlan(head_map, HydraOptions(), log_scale=True, fa_balance=fa_balance)
        return HydraAttention(config, 1, plan, groups).to(torch.cuda.current_device())

    layers = {"heads": layer("heads"), "queries": layer("queries")}
    nothing_dealt = property(lambda layout: [()] * layout.tp_size)
    with mock.patch.object(HeadLayout, "_dealt_fa", nothing_dealt):
        layers["all by queries"] = layer("queries")
    return layers


def _seconds(layer: HydraAttention, shape: ModelShape, length: int) -> float:
    """Forward and backward of one row."""
    weight = next(layer.parameters())
    x = torch.randn(length, 1, shape.hidden_size, dtype=weight.dtype, device=weight.device, requires_grad=True)
    rotary = RotaryEmbedding(shape.head_dim, 1.0, cp_group=layer.cp_group).get_emb(length).to(weight.device)
    torch.cuda.synchronize()
    start = time.perf_counter()
    out, _ = layer(x, rotary_pos_emb=rotary)
    out.sum().backward()
    torch.cuda.synchronize()
    return time.perf_counter() - start
