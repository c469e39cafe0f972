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

import functools
from dataclasses import dataclass

from hydra_mcore.config import HydraOptions
from hydra_mcore.heads import HeadLayout
from hydra_mcore.ops.sequence import SequencePart

STATE_BYTES = 4  # the recurrence computes in float32 (ops/gated_delta.py)


def fa_work(layout: HeadLayout, part: SequencePart) -> tuple[int, ...]:
    """Causal query-key products of the FA heads, index = tensor-parallel rank.

    Counted as the layer computes them: a query of the t-th token of a document sees t keys; second halves are exchanged
    with the mirror rank; a head that all ranks share is divided by queries.
    """
    whole = _products(part, 0, 1)
    return tuple(
        len(owned.fa) * whole + len(layout.shared_fa) * _products(part, rank, layout.tp_size)
        for rank, owned in enumerate(layout.ranks)
    )


def fa_imbalance(layout: HeadLayout, part: SequencePart) -> float:
    """FA work of the busiest tensor-parallel rank over the mean of all, 1.0 where there is none."""
    work = fa_work(layout, part)
    return max(work) * len(work) / sum(work) if sum(work) else 1.0


@functools.lru_cache(maxsize=1024)
def _products(part: SequencePart, share: int, shares: int) -> int:
    """Products of one head: the last of n queries sees all keys, the first n - 1 keys less."""
    total = 0
    for start, end, key_start, key_end in part.segments(part.query_rows(share, shares)):
        queries, keys = end - start, key_end - key_start
        total += queries * keys - queries * (queries - 1) // 2
    return total


@dataclass(frozen=True)
class Sent:
    """Bytes that one rank sends in a forward pass and in its backward pass."""

    forward: int
    backward: int

    def __add__(self, other: Sent) -> Sent:
        return Sent(self.forward + other.forward, self.backward + other.backward)

    @property
    def total(self) -> int:
        return self.forward + self.backward


@dataclass(frozen=True)
class LayerBytes:
    """What one rank sends for one layer, by purpose: of its GDN heads (states, halo), of its FA heads (the others)."""

    states: Sent
    halo: Sent
    keys_values: Sent
    queries: Sent

    @property
    def gdn(self) -> Sent:
        return self.states + self.halo

    @property
    def fa(self) -> Sent:
        return self.keys_values + self.queries

    @property
    def total(self) -> Sent:
        return self.gdn + self.fa


def cp_bytes(
    layout: HeadLayout,
    tp_rank: int,
    part: SequencePart,
    head_dim: int,
    value_bytes: int,
    batch: int,
    options: HydraOptions,
) -> LayerBytes:
    """What HydraAttention sends in its context-parallel group, for one layer; document boundaries make no difference.

    Under "core_attn" recompute backward also sends the forward bytes of the states again.

    Args:
        value_bytes: bytes of one activation, 2 for bf16.
    """
    owned, others = layout.ranks[tp_rank], part.cp_size - 1
    token_bytes = batch * head_dim * value_bytes  # one query, key, value or output of every row, for one head

    # state_from_previous (ops/context_parallel.py): all-gather of [A | B], [b, h, d, d + v] with v = d; backward
    # reduce-scatter. flash-linear-attention gathers as much forward and, instead of the reduce-scatter, backward
    # (fla/ops/cp/chunk_delta_h.py).
    states = others * batch * len(owned.gdn) * head_dim * 2 * head_dim * STATE_BYTES

    # ShortConv (model/gdn_heads.py): q, k, v of the last taps - 1 tokens to the next rank; backward to the previous
    # one.
    halo = max(options.gdn_conv_kernel - 1, 0) * len(owned.gdn) * 3 * token_bytes

    # FullAttentionHeads (model/fa_heads.py): all-gather of K and V by group, backward reduce-scatter.
    groups = len({layout.group_of(head_idx) for head_idx in owned.fa + layout.shared_fa})
    keys_values = others * groups * part.num_tokens * 2 * token_bytes

    # FullAttentionHeads: second halves of queries and of outputs to the mirror rank; backward their gradients.
    # The middle rank of an odd number is its own mirror.
    rows = len(owned.fa) * _second_half(part, 0, 1) + len(layout.shared_fa) * _second_half(
        part, tp_rank, layout.tp_size
    )
    queries = 0 if part.cp_rank == others - part.cp_rank else 2 * rows * token_bytes

    return LayerBytes(
        states=Sent(states, states),
        halo=Sent(halo if part.cp_rank < others else 0, halo if part.cp_rank > 0 else 0),
        keys_values=Sent(keys_values, keys_values),
        queries=Sent(queries, queries),
    )


def _second_half(part: SequencePart, share: int, shares: int) -> int:
    """Queries of a head that a rank exchanges with its mirror."""
    return sum(end - start for half in part.query_rows(share, shares)[1:] for start, end in half)


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
