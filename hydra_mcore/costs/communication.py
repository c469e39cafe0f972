# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""What a layer costs, worked out without running it: attention work of each rank, bytes that context parallelism sends.

Bytes are those that one rank sends in a group of p, by the algorithms whose cost NCCL's own benchmark takes as the
best possible (nccl-tests, doc/PERFORMANCE.md):

    all-gather       (p - 1) * n        n: bytes of the rank's own part
    reduce-scatter   (p - 1) * n        n: bytes of the rank's own part of the result
    all-to-all       (p - 1) * n / p    n: bytes that the rank holds
    point to point   n

What tensor parallelism sends is not counted. ``tests/distributed/test_costs.py`` compares these formulas with the
tensors that are really sent.
"""

from __future__ import annotations

from hydra_mcore.config import HydraOptions
from hydra_mcore.heads import HeadLayout
from hydra_mcore.kinds import KINDS
from hydra_mcore.kinds.kind import Sent
from hydra_mcore.sequence import SequencePart
from hydra_mcore.shape import ModelShape

NOTHING_SENT = Sent(0, 0)


def core_work(layout: HeadLayout, kind: str, part: SequencePart) -> tuple[int, ...]:
    """How much each tensor-parallel rank computes in the cores of a kind's heads, in the kind's own unit."""
    return tuple(KINDS[kind].work(part, layout.count(kind, rank)) for rank in range(layout.tp_size))


def imbalance(layout: HeadLayout, kind: str, part: SequencePart) -> float:
    """Work of the busiest tensor-parallel rank over the mean of all, 1.0 where there is none."""
    work = core_work(layout, kind, part)
    return max(work) * len(work) / sum(work) if sum(work) else 1.0


def cp_bytes(
    shape: ModelShape,
    options: HydraOptions,
    layout: HeadLayout,
    tp_rank: int,
    part: SequencePart,
    value_bytes: int,
    rows: int,
) -> dict[str, dict[str, Sent]]:
    """What HydraAttention sends in its context-parallel group, for one layer: kind of heads -> purpose -> bytes.

    Document boundaries make no difference. Under "core_attn" recompute backward also sends the forward bytes of states
    again.

    Args:
        value_bytes: bytes of one activation, 2 for bf16.
        rows: of a micro-batch.
    """
    return {
        kind: KINDS[kind].sent(shape, options, part, layout.count(kind, tp_rank), rows, value_bytes)
        for kind in layout.layer
    }


def summed(by_purpose: dict[str, Sent]) -> Sent:
    """All that is sent for some purposes."""
    return sum(by_purpose.values(), NOTHING_SENT)


def total(by_kind: dict[str, dict[str, Sent]]) -> Sent:
    """All that is sent for a layer."""
    return sum(map(summed, by_kind.values()), NOTHING_SENT)


def megatron_accepts(num_heads: int, tp_size: int, cp_size: int) -> bool:
    """Whether Megatron-Core takes a GDN layer of so many heads (TransformerConfig.__post_init__, "gated_delta_net")."""
    return num_heads % (tp_size * cp_size) == 0


def megatron_gdn_bytes(
    num_heads: int, part: SequencePart, head_dim: int, value_bytes: int, batch: int, tp_size: int = 1
) -> Sent:
    """The same for a GDN layer of Megatron-Core 0.19.2 with so many heads, all of one size.

    Context parallelism there trades tokens for heads by two all-to-alls (GatedDeltaNet.forward in
    megatron/core/ssm/gated_delta_net/gdn.py): ``tensor_a2a_cp2hp`` takes all tokens of some heads in, the projected q,
    k, v and gate of d channels each and two scalars a head; ``tensor_a2a_hp2cp`` takes the outputs back. Backward, the
    same the other way round. The gate is part of the layer there and cannot be left out.

    Where Megatron refuses (``megatron_accepts``), what it would send if heads could be divided, rounded down.
    """
    values = num_heads * (4 * head_dim + 2 + head_dim) * part.num_tokens * batch // tp_size
    sent = (part.cp_size - 1) * values * value_bytes // part.cp_size
    return Sent(sent, sent)
