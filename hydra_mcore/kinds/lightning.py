# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Lightning attention (arXiv 2401.04658), the linear layers of HypeNet (HALO, arXiv 2601.22156): linear attention whose
state decays at a rate that is fixed for each head (``model/lightning_heads.py``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

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
    output_gate,
    product,
    qk_norms,
    queries_keys_values,
)
from hydra_mcore.kinds.recurrent import CHUNK, keys_values_by_head, padding, rotary_kept, segment_share, states_kept
from hydra_mcore.sequence import SequencePart
from hydra_mcore.shape import ModelShape

# Of a state entry and token: 1 to decay it, 2 each to write k v^T and to read it with q.
RECURRENT_FLOPS = 5

Rate = Any  # a float or an array of floats


@dataclass(kw_only=True, frozen=True)
class LightningOptions:
    """The options of Lightning heads."""

    lightning_slope: float = 2.0**-8
    """Decay rate of the last head of a layer. Head h of H decays by lightning_slope^((h + 1) / H) a token. 2^-8 gives
    ALiBi's slopes [HALO].
    """
    lightning_position: Literal["rope", "nope"] = "rope"
    """Positions of Lightning heads [HALO: rope]."""
    lightning_qk_norm: Literal["rms", "none"] = "rms"
    """RMSNorm of Lightning queries and keys before rotary [HALO: rms]."""
    lightning_gate: Literal["none", "elementwise", "headwise"] = "elementwise"
    """Output gate of Lightning heads. The fusion norm replaces HALO's output norm [HALO: elementwise]."""
    lightning_kv: Literal["per_head", "per_group"] = "per_head"
    """Keys and values of Lightning heads: one copy a head, or shared in a group as in the teacher [HALO: per_head]."""


def decay_rate(options: Options, head_idx: Rate, num_heads: int) -> Rate:
    """-ln(lambda) of a head of a layer, by its index among all heads of whichever kind [HALO: all are Lightning].

    Args:
        head_idx: a float, or an array of floats.
    """
    return options.lightning_slope ** ((head_idx + 1) / num_heads)


def check(options: Options) -> None:
    if not 0.0 < options.lightning_slope <= 1.0:
        raise ConfigError(f"lightning_slope is {options.lightning_slope}; choose 0 < slope <= 1, ALiBi's is 2^-8")


def parameters(shape: ModelShape, options: Options) -> list[HeadParameter]:
    by_head = keys_values_by_head(options, "lightning")
    found = queries_keys_values(shape, options, "head" if by_head else "group")
    found += qk_norms(shape) if options.lightning_qk_norm == "rms" else []
    return found + output_gate(shape, options.lightning_gate)


def core_flops(shape: ModelShape, options: Options, length: int) -> Flops:
    """Chunked linear attention of one head, for each token (ops/chunked_linear_attention.py): of r rows of a chunk,
    queries times keys and scores times values (2 r r d), the state read and written (2 r d d). What backward makes anew
    is not counted.
    """
    d = shape.head_dim
    return padding(length) / CHUNK * (2 * product(CHUNK * CHUNK, d) + 2 * product(CHUNK * d, d))


def kept(shape: ModelShape, options: Options, load: Workload, heads: HeadCount) -> Kept:
    """Norms, rotary and gate, the inputs of linear attention; one state a segment; gradients inside its backward pass,
    and what that makes anew of a segment.
    """
    d, p = shape.head_dim, load.value_bytes
    inputs = 3 * d * p + 2 * d * p  # queries; keys and values in one tensor; queries and keys normed and turned
    inputs += gate_kept(options.lightning_gate, d, load)
    if load.fused:
        inputs += p * d + (2 * FLOAT if options.lightning_qk_norm == "rms" else 0)  # rotary's input; 1 / rms
        core, workspace = p * d, 2 * FLOAT * d * d / CHUNK + 6 * p * d  # contiguous values; states, gradients
    else:
        segment = FLOAT * (10 * d + 2 * CHUNK + 2 * d * d / CHUNK)
        core, workspace = states_kept(shape, heads.own, load), 4 * p * d  # gradients, the output's too
        workspace += segment * segment_share(shape, heads.own, load)
    common = rotary_kept(shape, options.lightning_position, load)
    return Kept(heads.own * inputs + common, heads.own * core, heads.own * workspace)


def working(shape: ModelShape, options: Options, load: Workload, heads: HeadCount) -> float:
    """Inside linear attention, or before it, where it is made what this part adds to the next one's state; with kernels
    rotary or norms may be most.
    """
    d, p = shape.head_dim, load.value_bytes
    if load.fused:
        core = 7 * d * p + FLOAT * d * d / CHUNK
        return load.tokens * heads.own * max(9 * d * p, 6 * d * p + 2 * FLOAT * d, core)
    states = d * d / CHUNK
    # Of so many tokens at a time: their inputs, with the scores and outputs or with the states as these are made.
    made = max(4 * d + states + CHUNK, 3 * d + 3 * states)
    core = 5 * d * p + segment_share(shape, heads.own, load) * FLOAT * made  # queries, keys, both with values, results
    adds = 4 * d * p + (FLOAT if p == FLOAT else 2 * FLOAT) * d if load.cp_size > 1 else 0
    return load.tokens * heads.own * max(core, adds)


def sent(
    shape: ModelShape, options: Options, part: SequencePart, heads: HeadCount, rows: int, value_bytes: int
) -> dict[str, Sent]:
    """What a part adds to a state, and a factor: [b, h, d, 1 + v] float32 of all parts gathered, with v = d, and
    backward reduce-scattered (``state_from_previous``).
    """
    d = shape.head_dim
    states = (part.cp_size - 1) * rows * heads.own * d * (1 + d) * FLOAT
    return {"states": Sent(states, states)}


def cached(shape: ModelShape, options: Options, heads: HeadCount, tokens: float, rows: int, value_bytes: int) -> float:
    """A float32 state a head."""
    return rows * heads.own * FLOAT * shape.head_dim**2


LIGHTNING = HeadKind(
    name="lightning",
    label="Lightning",
    title="Lightning attention",
    colour="#b8860b",
    branch="hydra_mcore.model.lightning_heads:LightningHeads",
    exported="convert/hf_model/lightning_heads_hydra_head.py",
    options=LightningOptions,
    check=check,
    parameters=parameters,
    gate=lambda options: options.lightning_gate,
    core="linear attention",
    core_flops=core_flops,
    decode_flops=lambda head_dim, seen: RECURRENT_FLOPS * head_dim**2,
    kept=kept,
    working=working,
    sent=sent,
    cached=cached,
)
