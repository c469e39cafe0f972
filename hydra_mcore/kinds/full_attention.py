# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Full attention (FA): the teacher's own heads, without positions and with an output gate (``model/fa_heads.py``)."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import Literal

from hydra_mcore.errors import ConfigError
from hydra_mcore.kinds.kind import (
    FLOAT,
    Flops,
    HeadCount,
    HeadKind,
    HeadParameter,
    Kept,
    Options,
    Sent,
    Workload,
    gate_kept,
    gate_width,
    norm_kept,
    norm_working,
    output_gate,
    product,
    qk_norms,
    queries_keys_values,
)
from hydra_mcore.sequence import SequencePart
from hydra_mcore.shape import ModelShape


@dataclass(kw_only=True, frozen=True)
class FullAttentionOptions:
    """The options of FA heads."""

    fa_position: Literal["nope", "rope"] = "nope"
    """Positions of FA heads: none, or rotary [paper: nope]."""
    fa_log_scale: Literal["never", "extend", "always"] = "extend"
    """When FA queries are multiplied by ln(t+a)/ln(a): never, from stage extend on and at inference, or always [HALO,
    ours].
    """
    fa_log_scale_base: float = 500.0
    """The base a of the log-position scale, in tokens [paper: 500]."""
    fa_gate: Literal["none", "elementwise", "headwise"] = "elementwise"
    """Output gate of FA heads, computed from the layer's input [HALO: elementwise]."""


def check(options: Options) -> None:
    if not options.fa_log_scale_base > 1.0:  # so written, NaN is refused too
        raise ConfigError("fa_log_scale_base must exceed 1")


def parameters(shape: ModelShape, options: Options) -> list[HeadParameter]:
    """The parameters of FA heads; keys and values exist for each kv group that has an FA head."""
    norms = qk_norms(shape) if shape.qk_norm else []
    return [*queries_keys_values(shape, options, "group"), *norms, *output_gate(shape, options.fa_gate)]


def causal_attention(head_dim: int, length: int) -> Flops:
    """q k^T and its product with v of one head, for each token of a row, which sees (length + 1) / 2 keys on
    average.
    """
    keys = (length + 1) / 2
    return 2 * product(head_dim, keys)


def decode_flops(head_dim: int, seen: float) -> float:
    """2 d for q k^T and 2 d for the product with v, for each token that is seen."""
    return 4 * head_dim * seen


def work(part: SequencePart, heads: HeadCount) -> int:
    """Causal query-key products on one tensor-parallel rank.

    Counted as the layer computes them: a query of the t-th token of a document sees t keys; second halves are exchanged
    with the mirror rank; a head that all ranks share is divided by queries.
    """
    return heads.own * _products(part, 0, 1) + heads.shared * _products(part, heads.tp_rank, heads.tp_size)


@functools.lru_cache(maxsize=1024)
def _products(part: SequencePart, share: int, shares: int) -> int:
    """Products of one head: the last of n queries sees all keys, the first n - 1 keys less."""
    total = 0
    for start, end, key_start, key_end in part.segments(part.query_rows(share, shares)):
        queries, keys = end - start, key_end - key_start
        total += queries * keys - queries * (queries - 1) // 2
    return total


def kept(shape: ModelShape, options: Options, load: Workload, heads: HeadCount) -> Kept:
    """Norms, rotary, scale and gates; keys and values of the whole row, by head; attention's result, and the logarithm
    of its softmax's sum.
    """
    d, p = shape.head_dim, load.value_bytes
    inputs = heads.computed * (p * d + gate_kept(options.fa_gate, d, load))
    if shape.qk_norm:
        inputs += (heads.computed + heads.groups) * norm_kept(d, load)
        if load.fused or p == FLOAT:
            inputs += heads.groups * p * d  # the norm's input is the keys, in one tensor with the values
    if options.fa_position == "rope":
        inputs += 4 * p * d  # cosines and sines, of queries and of keys
    inputs += p  # the log-position scale
    inputs += 2 * heads.held * load.cp_size * p * d
    return Kept(inputs, heads.computed * (p * d + FLOAT))


def working(shape: ModelShape, options: Options, load: Workload, heads: HeadCount) -> float:
    """Bytes of the forward pass at its fullest moment: keys and values of the kv groups, for the part and gathered for
    the row, and the larger of two sets: queries before and after rotary or norm, or keys and values of the row by head
    with attention's result.
    """
    d, p, row = shape.head_dim, load.value_bytes, load.rows * load.length
    rope, gated = options.fa_position == "rope", options.fa_gate != "none"
    keys_values, by_head = 2 * d * p * heads.groups * (load.tokens + row), 2 * d * p * heads.own * row
    normed = norm_working(load) if shape.qk_norm else 0
    queries = d * heads.own * max(normed, 4 * p if rope else 0, 3 * p if gated else 2 * p)
    queries += 2 * d * p if rope else 0  # cosines and sines
    swapped = load.cp_size > 1
    masks = 0.0
    if swapped and not load.fused:  # of half a part's queries: as booleans and as what is added to the scores
        masks = load.tokens / load.rows / 2 * load.length * (1 + p)
    copies = 1 + swapped + (1 if masks else 2) + gate_width(options.fa_gate, d) / d
    attended = by_head + heads.own * d * p * load.tokens * copies + masks
    return keys_values + max(load.tokens * queries, attended)


def decoding(shape: ModelShape, load: Workload, heads: HeadCount, tokens: float) -> float:
    """Bytes that a decoding step needs: keys and values by head in float32, and one of the two in the cache's type."""
    return heads.own * tokens * shape.head_dim * (2 * FLOAT + load.value_bytes)


def sent(
    shape: ModelShape, options: Options, part: SequencePart, heads: HeadCount, rows: int, value_bytes: int
) -> dict[str, Sent]:
    """All-gather of keys and values by group, backward reduce-scatter; second halves of queries and of outputs to the
    mirror rank, backward their gradients. The middle rank of an odd number is its own mirror.
    """
    token_bytes = rows * shape.head_dim * value_bytes  # one query, key, value or output of every row, for one head
    others = part.cp_size - 1
    keys_values = others * heads.groups * part.num_tokens * 2 * token_bytes
    exchanged = heads.own * _second_half(part, 0, 1)
    exchanged += heads.shared * _second_half(part, heads.tp_rank, heads.tp_size)
    queries = 0 if part.cp_rank == others - part.cp_rank else 2 * exchanged * token_bytes
    return {"keys and values": Sent(keys_values, keys_values), "queries": Sent(queries, queries)}


def _second_half(part: SequencePart, share: int, shares: int) -> int:
    """Queries of a head that a rank exchanges with its mirror."""
    runs = itertools.chain.from_iterable(part.query_rows(share, shares)[1:])
    return sum(end - start for start, end in runs)


def cached(shape: ModelShape, options: Options, heads: HeadCount, tokens: float, rows: int, value_bytes: int) -> float:
    """Keys and values of the kv groups, for every token."""
    return 2 * heads.groups * shape.head_dim * value_bytes * tokens


FULL_ATTENTION = HeadKind(
    name="fa",
    label="FA",
    title="full attention",
    colour="#d1495b",
    branch="hydra_mcore.model.fa_heads:FullAttentionHeads",
    exported="convert/hf_model/fa_heads_hydra_head.py",
    options=FullAttentionOptions,
    check=check,
    parameters=parameters,
    gate=lambda options: options.fa_gate,
    core="attention",
    core_flops=lambda shape, options, length: causal_attention(shape.head_dim, length),
    decode_flops=decode_flops,
    work=work,
    kept=kept,
    working=working,
    decoding=decoding,
    sent=sent,
    cached=cached,
)
