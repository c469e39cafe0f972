# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Gated DeltaNet (GDN, Yang et al., arXiv 2412.06464): a state of constant size, written by the delta rule and decayed
by a gate (``model/gdn_heads.py``).
"""

from __future__ import annotations

import math
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
    Statistic,
    Workload,
    gate_kept,
    linear,
    output_gate,
    product,
    qk_norms,
    queries_keys_values,
)
from hydra_mcore.sequence import SequencePart
from hydra_mcore.shape import ModelShape

# Of ops/chunked_delta_rule.py (flash-linear-attention's kernel cuts into as many rows), which needs torch; a test
# compares.
CHUNK = 64
SEGMENT_VALUES = 2**18
# Of a state entry and token: 1 to decay it, 2 each to read it with k, to write beta (v - S k) k^T, to read it with q.
RECURRENT_FLOPS = 7


@dataclass(kw_only=True, frozen=True)
class GatedDeltaOptions:
    """The options of GDN heads."""

    gdn_position: Literal["rope", "nope"] = "rope"
    """Positions of GDN heads [paper: rope]."""
    gdn_qk_norm: Literal["rms", "none"] = "rms"
    """RMSNorm of GDN queries and keys before rotary and L2 norm [HALO: rms]."""
    gdn_conv_kernel: int = 4
    """Taps of the causal short convolution on q, k and v of GDN heads, identity at the start; 0 for none [paper keeps
    it; size ours].
    """
    gdn_conv_activation: Literal["none", "silu"] = "none"
    """Activation after the short convolution; silu gives up the identity start [ours: none]."""
    gdn_write_max: float = 1.0
    """The write gate is gdn_write_max * sigmoid; 2 allows negative eigenvalues [HALO: 2; ours: 1]."""
    gdn_half_life: float = 69.0
    """Tokens after which a GDN state has decayed to half at the start of training [ours: long memory]."""
    gdn_gate: Literal["none", "elementwise", "headwise"] = "none"
    """Output gate of GDN heads [HALO: optional]."""
    gdn_kv: Literal["per_head", "per_group"] = "per_head"
    """Keys and values of GDN heads: each its own copy, or shared in the group as in the teacher [paper: per_head]."""


def check(options: Options) -> None:
    if not 0 <= options.gdn_conv_kernel <= 2**12:
        raise ConfigError(f"gdn_conv_kernel is {options.gdn_conv_kernel}; it counts taps, 0 for no convolution")
    if not 0.0 < options.gdn_write_max <= 2.0:
        raise ConfigError(f"gdn_write_max is {options.gdn_write_max}; the delta rule is stable for 0 < max <= 2")
    if not options.gdn_half_life > 0.0:  # so written, NaN is refused too
        raise ConfigError("gdn_half_life must exceed 0")
    if options.qkv == "shared" and options.gdn_kv == "per_head":
        raise ConfigError("qkv 'shared' keeps the teacher's groups: set gdn_kv to 'per_group'")


def parameters(shape: ModelShape, options: Options) -> list[HeadParameter]:
    """Decay is -exp(A_log) softplus(W_a x + dt), write W_b x + b; the convolution runs over q, k and v."""
    found = queries_keys_values(shape, options, "head" if options.gdn_kv == "per_head" else "group")
    found += qk_norms(shape) if options.gdn_qk_norm == "rms" else []
    if options.gdn_conv_kernel:
        block = (3 * shape.head_dim, 1, options.gdn_conv_kernel)
        found.append(HeadParameter("conv.weight", "conv.weight", "head", block, section="convolution"))
    for stored, hf in (("linear_decay", "decay_proj"), ("linear_write", "write_proj")):
        found += linear(stored, hf, "head", 1, shape.hidden_size, bias=True)
    found.append(HeadParameter("A_log.weight", "A_log", "head", ()))
    return found + output_gate(shape, options.gdn_gate)


def delta_rule(head_dim: int, length: int) -> Flops:
    """The chunked delta rule of one head, for each token (ops/chunked_delta_rule.py), keys and values of one size d.

    Of r rows of a chunk: queries and keys times keys (2 r r d), both read the state (2 r d d), an inverse (r r r) and
    scores are applied to what is written (2 r r d), which goes into the state (r d d). What backward makes anew is not
    counted. A last chunk is filled up with padding.
    """
    chunks = -(-length // CHUNK)
    products = 4 * product(CHUNK * CHUNK, head_dim) + 3 * product(CHUNK * head_dim, head_dim)
    return (chunks / length) * (products + Flops(float(CHUNK**3), 0.0))


def decode_flops(head_dim: int, seen: float) -> float:
    """The recurrence, however many tokens were seen; chunked kernels trade some more for matrix products."""
    return RECURRENT_FLOPS * head_dim**2


def kept(shape: ModelShape, options: Options, load: Workload, heads: HeadCount) -> Kept:
    """Convolution, norms, rotary and gates, the inputs of the delta rule; what ``chunked_delta_rule`` or the kernel
    keeps; gradients inside its backward pass, and what that makes anew of a segment.
    """
    d, p, rms = shape.head_dim, load.value_bytes, options.gdn_qk_norm == "rms"
    inputs = 3 * d * p if options.gdn_conv_kernel else 0  # its input, padded
    inputs += 3 * d * p  # q, k and v in one tensor, of which the norms' inputs and the values are views
    inputs += 3 * FLOAT + 2 * FLOAT  # decay and write gate
    inputs += gate_kept(options.gdn_gate, d, load) + 2 * p * d  # queries and keys
    if load.fused:  # the L2 norm and 1 / rms of queries and keys; elsewhere they are made anew
        inputs += 2 * (FLOAT * d + 2 * FLOAT) + rms * 2 * FLOAT
    angles = 4 * p * d if load.fused and options.gdn_position == "rope" else 0
    core, workspace = _rule_kept(d, heads.own, load), _rule_workspace(d, heads.own, load)
    return Kept(heads.own * inputs + angles, heads.own * core, heads.own * workspace)


def _rule_kept(d: int, heads: int, load: Workload) -> float:
    """For each head and token, beside the inputs."""
    p = load.value_bytes
    if load.fused:
        return p * d + p * CHUNK  # contiguous values, and the inverse of 1 + L
    part = load.length // load.cp_size
    padding = -(-part // CHUNK) * CHUNK / part
    return FLOAT * (padding * (CHUNK + d) + d * d / min(part, segment_tokens(heads * load.rows, d)))


def _rule_workspace(d: int, heads: int, load: Workload) -> float:
    """For each head and token. The kernel's: states, their gradients and ten values of size d."""
    p, part = load.value_bytes, load.length // load.cp_size
    if load.fused:
        return 2 * p * d * d / CHUNK + 10 * p * d
    segment = FLOAT * (18 * d + 9 * CHUNK + 3 * d * d / CHUNK)
    return 3 * p * d + 2 * FLOAT + segment * min(1.0, segment_tokens(heads * load.rows, d) / part)


def segment_tokens(heads: int, d: int) -> int:
    """Tokens of a row that the torch path works on together, with so many ``heads`` of all rows."""
    return CHUNK * max(1, SEGMENT_VALUES // max(1, heads * d * CHUNK))


def working(shape: ModelShape, options: Options, load: Workload, heads: HeadCount) -> float:
    """The short convolution, rotary, norms, or inside the delta rule, whichever is most."""
    d, p = shape.head_dim, load.value_bytes
    mixing = 16 * d * p if options.gdn_conv_kernel else 6 * d * p
    rotary = 9 * d * p
    normalised = 6 * d * p + 2 * FLOAT * d
    if load.fused:
        # q, k and the tensor that holds v; v alone; the kernel's w, u, new values, outputs; its states, C x C matrices
        rule = 10 * d * p + p * d * d / CHUNK + CHUNK * (FLOAT + p) + 3 * FLOAT
    else:
        # q, k, the tensor that holds v, the result; in float32 what is made of so many tokens at a time. In the search
        # for the state before a part, values and results are twice as wide.
        wider = 3 if load.cp_size > 1 else 0
        together = min(1.0, segment_tokens(heads.own * load.rows, d) * load.cp_size / load.length)
        rule = (6 + wider) * d * p + together * FLOAT * ((10 + wider) * d + 4 * CHUNK)
    return load.tokens * heads.own * max(mixing, rotary, normalised, rule)


def sent(
    shape: ModelShape, options: Options, part: SequencePart, heads: HeadCount, rows: int, value_bytes: int
) -> dict[str, Sent]:
    """What a part does to a state, and the convolution's last inputs.

    The states of all parts are gathered, [b, h, d, d + v] float32 with v = d, and backward reduce-scattered
    (``state_from_previous``); flash-linear-attention gathers as much forward and, instead of the reduce-scatter,
    backward (fla/ops/cp/chunk_delta_h.py). q, k and v of the last taps - 1 tokens go to the next rank, their gradients
    back.
    """
    d, others = shape.head_dim, part.cp_size - 1
    states = others * rows * heads.own * d * 2 * d * FLOAT
    halo = max(options.gdn_conv_kernel - 1, 0) * heads.own * 3 * rows * d * value_bytes
    to_next, from_next = halo if part.cp_rank < others else 0, halo if part.cp_rank > 0 else 0
    return {"states": Sent(states, states), "halo": Sent(to_next, from_next)}


def cached(shape: ModelShape, options: Options, heads: HeadCount, tokens: float, rows: int, value_bytes: int) -> float:
    """A float32 state a head, and the convolution's last taps - 1 inputs."""
    d, taps = shape.head_dim, max(0, options.gdn_conv_kernel - 1)
    return rows * heads.own * (FLOAT * d * d + 3 * d * taps * value_bytes)


GATED_DELTA = HeadKind(
    name="gdn",
    label="GDN",
    title="Gated DeltaNet",
    colour="#2a6f9e",
    branch="hydra_mcore.model.gdn_heads:GatedDeltaHeads",
    exported="convert/hf_model/gdn_heads_hydra_head.py",
    options=GatedDeltaOptions,
    check=check,
    parameters=parameters,
    gate=lambda options: options.gdn_gate,
    core="delta rule",
    core_flops=lambda shape, options, length: delta_rule(shape.head_dim, length),
    decode_flops=decode_flops,
    kept=kept,
    working=working,
    sent=sent,
    cached=cached,
    looks_back=lambda options: max(0, options.gdn_conv_kernel - 1),
    statistics=(Statistic("half-life", lambda mean: math.log(2.0) / -mean, log_scale=True), Statistic("write gate")),
)
