# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The time of one tensor-parallel rank's share of a layer, without the other ranks (for ``tools/benchmark.py
balance``).
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.testing._internal.distributed.fake_pg import FakeStore

from hydra_mcore.config import HydraOptions, ModelShape
from hydra_mcore.heads import HeadLayout, HeadMap
from hydra_mcore.model.attention_plan import AttentionPlan
from hydra_mcore.model.build import transformer_config
from hydra_mcore.model.hydra_attention import HydraAttention

WAYS = (
    '"heads" and "queries": see --fa-balance.\n"all by queries", for comparison: every rank takes its part of every FA'
    " head;\nthe same thing with fewer FA heads than ranks."
)


def measured(
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
