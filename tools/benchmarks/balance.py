# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""How evenly tensor-parallel ranks share a layer's attention, by ``fa_balance``: counted, or timed rank by rank."""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra_mcore.heads import HeadLayout, HeadMap
from hydra_mcore.kinds import FA
from tools.benchmarks.options import QWEN3, positive, spread_heads
from tools.benchmarks.report import Report

HELP = "the busiest tensor-parallel rank's attention against the mean, by fa_balance"
EXAMPLES = """\
  attention work of tensor-parallel ranks of Qwen3-1.7B, for a head map of your own too
      python tools/benchmark.py balance --head-map runs/heads/head_map.json
  the seconds of every rank's layer on this machine (minutes, one process)
      python tools/benchmark.py balance --measure
"""
COUNTED = ("head map", "TP", "heads: mean", "heads: worst", "queries: mean", "queries: worst")
TIMED = ("FA heads", "way", "busiest rank, s", "mean of ranks, s", "busiest / mean", 'busiest / busiest of "heads"')
TIMED_COUNTS, TIMED_TP = (2, 4, 10), 8
RATIOS = ("3:1", "7:1", "15:1")
RANDOM_MAPS = 1000


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--head-map",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help="head maps to show before the synthetic ones",
    )
    parser.add_argument(
        "--tp", nargs="+", type=positive, default=[2, 4, 8], metavar="N", help="tensor parallel sizes (default 2 4 8)"
    )
    parser.add_argument(
        "--length", type=positive, metavar="N", help="tokens of the one document (default 16384, with --measure 4096)"
    )
    parser.add_argument(
        "--measure", action="store_true", help="time one layer of every rank of TP 8 instead of counting; takes minutes"
    )
    parser.add_argument(
        "--repeats", type=positive, default=3, metavar="N", help="of --measure; the median counts (default 3)"
    )


def run(args: argparse.Namespace) -> Report:
    return _timed(args) if args.measure else _counted(args)


def _timed(args: argparse.Namespace) -> Report:
    from tools.benchmarks.rank_seconds import WAYS, measured

    length = args.length or 4096
    rows = list(measured({n: spread_heads(n, QWEN3) for n in TIMED_COUNTS}, QWEN3, TIMED_TP, length, args.repeats))
    title = f"Seconds of one layer's attention block, forward and backward, {length} tokens, TP {TIMED_TP}"
    notes = f"Each rank alone on this machine without communication; median of {args.repeats}. {WAYS}"
    return Report(title, notes, TIMED, rows)


def _counted(args: argparse.Namespace) -> Report:
    length = args.length or 16384
    rows = [row for name, maps in _head_maps(args.head_map) for row in _imbalances(name, maps, args.tp, length)]
    title = f"Causal query-key products of the busiest tensor-parallel rank over the mean of ranks, {length} tokens"
    return Report(title, "One document; mean and worst of the layers that have FA heads.", COUNTED, rows)


def _head_maps(paths: Sequence[Path]) -> Iterator[tuple[str, list[HeadMap]]]:
    """Named head maps: the given files, heads drawn from the whole model at several ratios, any number in any layer."""
    from hydra_mcore.selection.choose import choose_heads, parse_ratio

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
    chosen = [
        (layer, head)
        for layer in range(QWEN3.num_layers)
        for head in rng.sample(heads, rng.randint(0, QWEN3.num_heads))
    ]
    return HeadMap.from_fa(chosen, QWEN3.num_layers, QWEN3.num_heads, QWEN3.num_kv_groups)


def _imbalances(name: str, maps: Sequence[HeadMap], tp_sizes: Sequence[int], length: int) -> Iterator[list[Any]]:
    from hydra_mcore.costs.communication import imbalance
    from hydra_mcore.sequence import SequencePart

    part = SequencePart(length)
    for tp_size in tp_sizes:
        row: list[Any] = [name, tp_size]
        for way in ("heads", "queries"):
            found = [
                imbalance(HeadLayout(layer, head_map.num_kv_groups, tp_size, layer_idx, way), FA, part)
                for head_map in maps
                for layer_idx, layer in enumerate(head_map.layers)
                if layer[FA]
            ]
            row += [f"{sum(found) / len(found):.3f}", f"{max(found):.3f}"] if found else ["-", "-"]
        yield row
