# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Compute the bytes that a context-parallel rank sends for a layer, beside Megatron's all-to-all.

The formulas are those of hydra_mcore/costs/communication.py.
"""

from __future__ import annotations

import argparse
import itertools
from typing import Any

from hydra_mcore.config import HydraOptions
from hydra_mcore.costs.communication import cp_bytes, megatron_accepts, megatron_gdn_bytes, summed, total
from hydra_mcore.heads import HeadLayout, HeadsByKind
from hydra_mcore.kinds import DEFAULT_LINEAR, FA
from hydra_mcore.sequence import SequencePart
from tools.benchmarks.report import Report
from tools.benchmarks.shapes import QWEN3, spread_heads

COLUMNS = ("CP", "tokens", "GDN heads", "FA heads", "both", "Megatron, GDN heads", "ratio")
VALUE_BYTES = 2  # bf16


def run(args: argparse.Namespace) -> Report:
    num_gdn = QWEN3.num_heads - args.fa_heads
    rows = [_sent(args, cp_size, length) for cp_size, length in itertools.product(args.cp, args.lengths)]
    title = "MiB sent for one layer, forward and backward, by the rank that sends most"
    notes = (
        f"Qwen3-1.7B, {args.fa_heads} FA heads in different kv groups (the worst case), {num_gdn} GDN heads, head_dim"
        f" {QWEN3.head_dim}, batch 1, bf16, TP {args.tp}. Megatron: its all-to-alls for {num_gdn} GDN heads of this"
        " size; ratio: Megatron to ours, GDN heads alone."
    )
    refused = [size for size in args.cp if not megatron_accepts(num_gdn, args.tp, size)]
    if refused:
        sizes = ", ".join(map(str, refused))
        notes += (
            f" In brackets: Megatron refuses CP {sizes}, since {num_gdn} heads do not divide by TP x CP; what it would"
            " send otherwise."
        )
    return Report(title, notes, COLUMNS, rows)


def _sent(args: argparse.Namespace, cp_size: int, length: int) -> list[Any]:
    """A row of the table, for the rank that sends most."""
    layout = HeadLayout(
        HeadsByKind.from_fa(spread_heads(args.fa_heads, QWEN3), QWEN3.num_heads), QWEN3.num_kv_groups, args.tp
    )
    parts = [SequencePart(length, cp_size, rank) for rank in range(cp_size)]
    ranks = [
        cp_bytes(QWEN3, HydraOptions(), layout, tp_rank, part, VALUE_BYTES, rows=1)
        for part, tp_rank in itertools.product(parts, range(args.tp))
    ]
    ours = max(ranks, key=lambda by_kind: total(by_kind).total)
    linear, fa = (summed(ours.get(kind, {})).total for kind in (DEFAULT_LINEAR, FA))
    num_linear = len(layout.layer[DEFAULT_LINEAR])
    theirs = megatron_gdn_bytes(num_linear, parts[0], QWEN3.head_dim, VALUE_BYTES, 1, args.tp).total
    columns = [f"{sent / 2**20:.1f}" for sent in (linear, fa, total(ours).total, theirs)]
    if not megatron_accepts(num_linear, args.tp, cp_size):
        columns[-1] = f"({columns[-1]})"
    return [cp_size, length, *columns, f"{theirs / linear:.1f}" if linear else "-"]
