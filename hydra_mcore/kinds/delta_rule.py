# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Heads of the delta rule with decay: a state of constant size, written by the delta rule and decayed by a gate
(``model/gdn_heads.py``). They differ in what has a decay of its own, a head or each of its key channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

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
from hydra_mcore.kinds.recurrent import (
    CHUNK,
    keys_values_by_head,
    option,
    padding,
    rotary_kept,
    segment_share,
    states_kept,
)
from hydra_mcore.sequence import SequencePart
from hydra_mcore.shape import ModelShape

# Of a state entry and token: 1 to decay it, 2 each to read it with k, to write beta (v - S k) k^T, to read it with q.
RECURRENT_FLOPS = 7

# The same objects for all such kinds: tables of heads have a row for each name.
STATISTICS = (Statistic("half-life", lambda mean: math.log(2.0) / -mean, log_scale=True), Statistic("write gate"))


def chunked_flops(d: int, length: int, per_channel: bool = False) -> Flops:
    """The chunked delta rule of one head, for each token (ops/chunked_delta_rule.py), keys and values of one size d.

    Of r rows of a chunk: queries and keys times keys (2 r r d; by channel r (r - 1) d, the pairs of rows that there
    are), both read the state (2 r d d), an inverse (r r r) and scores are applied to what is written (2 r r d), which
    goes into the state (r d d). What backward makes anew is not counted. A last chunk is filled up with padding.
    """
    scores = product(CHUNK * (CHUNK - 1), d) if per_channel else 2 * product(CHUNK * CHUNK, d)
    products = scores + 2 * product(CHUNK * CHUNK, d) + 3 * product(CHUNK * d, d)
    return padding(length) / CHUNK * (products + Flops(float(CHUNK**3), 0.0))


@dataclass(frozen=True)
class DeltaRuleHeads:
    """What such heads say of themselves; an option is the kind's name and one of position, qk_norm, conv_kernel,
    conv_activation, write_max, half_life, gate, kv.

    Args:
        name: of the kind.
        per_channel: whether every key channel has a decay, from a low-rank projection of the layer's input.
    """

    name: str
    per_channel: bool

    def kind(self, *, label: str, title: str, colour: str, branch: str, exported: str, options: type) -> HeadKind:
        """The description, with these facts."""
        return HeadKind(
            name=self.name, label=label, title=title, colour=colour, branch=branch, exported=exported, options=options,
            check=self.check, parameters=self.parameters, gate=lambda options: option(options, self.name, "gate"),
            core="delta rule by channel" if self.per_channel else "delta rule", core_flops=self.core_flops,
            decode_flops=lambda head_dim, seen: RECURRENT_FLOPS * head_dim**2, kept=self.kept, working=self.working,
            sent=self.sent, cached=self.cached,
            looks_back=self.looks_back,
            statistics=STATISTICS,
        )  # fmt: skip

    def check(self, options: Options) -> None:
        """Raise ConfigError for options that cannot be used."""
        taps, write_max, half_life = (
            option(options, self.name, name) for name in ("conv_kernel", "write_max", "half_life")
        )
        if not 0 <= taps <= 2**12:
            raise ConfigError(f"{self.name}_conv_kernel is {taps}; it counts taps, 0 for no convolution")
        if not 0.0 < write_max <= 2.0:
            raise ConfigError(f"{self.name}_write_max is {write_max}; the delta rule is stable for 0 < max <= 2")
        if not half_life > 0.0:  # so written, NaN is refused too
            raise ConfigError(f"{self.name}_half_life must exceed 0")

    def parameters(self, shape: ModelShape, options: Options) -> list[HeadParameter]:
        """Decay is -exp(A_log) softplus(W_a x + dt), write W_b x + b; the convolution runs over q, k and v.

        By channel, W_a is a product of two: up to the channels of a head, from as many values that all heads share.
        """
        d, taps = shape.head_dim, option(options, self.name, "conv_kernel")
        by_head = keys_values_by_head(options, self.name)
        found = queries_keys_values(shape, options, "head" if by_head else "group")
        found += qk_norms(shape) if option(options, self.name, "qk_norm") == "rms" else []
        if taps:
            found.append(HeadParameter("conv.weight", "conv.weight", "head", (3 * d, 1, taps), section="convolution"))
        if self.per_channel:
            down = ("linear_decay_down.weight", "decay_down_proj.weight")
            found.append(HeadParameter(*down, "layer", (d, shape.hidden_size)))
            found += linear("linear_decay", "decay_proj", "head", d, d, bias=True)
        else:
            found += linear("linear_decay", "decay_proj", "head", 1, shape.hidden_size, bias=True)
        found += linear("linear_write", "write_proj", "head", 1, shape.hidden_size, bias=True)
        found.append(HeadParameter("A_log.weight", "A_log", "head", ()))
        return found + output_gate(shape, option(options, self.name, "gate"))

    def core_flops(self, shape: ModelShape, options: Options, length: int) -> Flops:
        """``chunked_flops`` of one head."""
        return chunked_flops(shape.head_dim, length, self.per_channel)

    def kept(self, shape: ModelShape, options: Options, load: Workload, heads: HeadCount) -> Kept:
        """Convolution, norms, rotary and gates, the inputs of the delta rule; what ``chunked_delta_rule`` or the kernel
        keeps; gradients inside its backward pass, and what that makes anew of a segment.
        """
        d, p, rms = shape.head_dim, load.value_bytes, option(options, self.name, "qk_norm") == "rms"
        inputs = 3 * d * p if option(options, self.name, "conv_kernel") else 0  # its input, padded
        inputs += 3 * d * p  # q, k and v in one tensor, of which the norms' inputs and the values are views
        # Decay and write gate; log decays are made anew of their logits, with kernels from two steps on the way.
        inputs += (3 * FLOAT if load.fused else p + FLOAT) * self._decays(shape) + 2 * FLOAT
        inputs += gate_kept(option(options, self.name, "gate"), d, load) + 2 * p * d  # queries and keys
        if load.fused:  # the L2 norm and 1 / rms of queries and keys; elsewhere they are made anew
            inputs += 2 * (FLOAT * d + 2 * FLOAT) + rms * 2 * FLOAT
        common = rotary_kept(shape, option(options, self.name, "position"), load)
        common += p * d if self.per_channel else 0  # the low rank of the decays
        core, workspace = self._rule_kept(shape, heads.own, load), self._rule_workspace(shape, heads.own, load)
        return Kept(heads.own * inputs + common, heads.own * core, heads.own * workspace)

    def _decays(self, shape: ModelShape) -> int:
        """Log decays of each token and head."""
        return shape.head_dim if self.per_channel else 1

    def _rule_kept(self, shape: ModelShape, heads: int, load: Workload) -> float:
        """For each head and token, beside the inputs."""
        d, p = shape.head_dim, load.value_bytes
        if load.fused:
            return p * d + p * CHUNK  # contiguous values, and the inverse of 1 + L
        return FLOAT * padding(load.length // load.cp_size) * (CHUNK + d) + states_kept(shape, heads, load)

    def _rule_workspace(self, shape: ModelShape, heads: int, load: Workload) -> float:
        """For each head and token. The kernel's: states, their gradients and ten values of size d."""
        d, p = shape.head_dim, load.value_bytes
        if load.fused:
            return 2 * p * d * d / CHUNK + 10 * p * d + (FLOAT * 2 * d if self.per_channel else 0)
        if self.per_channel:  # readers and keys as they are decayed in steps
            segment = FLOAT * (32 * d + 4 * CHUNK + 2.5 * d * d / CHUNK)
        else:
            segment = FLOAT * (18 * d + 7 * CHUNK + 2 * d * d / CHUNK)
        gradients = 4 * p * d + FLOAT * (self._decays(shape) + 1)  # the output's too
        return gradients + segment * segment_share(shape, heads, load)

    def working(self, shape: ModelShape, options: Options, load: Workload, heads: HeadCount) -> float:
        """The short convolution, or inside the delta rule; with kernels rotary or norms may be most."""
        d, p = shape.head_dim, load.value_bytes
        convolves = bool(option(options, self.name, "conv_kernel"))
        decays = FLOAT * self._decays(shape)
        if load.fused:
            mixing, rotary, normalised = (16 if convolves else 6) * d * p, 9 * d * p, 6 * d * p + 2 * FLOAT * d
            # q, k and the tensor that holds v; v alone; the kernel's w, u, new values, outputs; its states, C x C
            # matrices
            rule = 10 * d * p + p * d * d / CHUNK + CHUNK * (FLOAT + p) + 2 * FLOAT + 2 * decays
            return load.tokens * heads.own * max(mixing, rotary, normalised, rule)
        # q, k, the tensor that holds v, the result; in float32 what is made of so many tokens at a time. In the search
        # for the state before a part, values and results are twice as wide.
        wider = 3 if load.cp_size > 1 else 0
        made = (13 + wider) * d + 3 * CHUNK if self.per_channel else (10 + wider) * d + 4 * CHUNK
        rule = (6 + wider) * d * p + segment_share(shape, heads.own, load) * FLOAT * made + decays
        return load.tokens * heads.own * max((9 if convolves else 6) * d * p, rule)

    def sent(
        self, shape: ModelShape, options: Options, part: SequencePart, heads: HeadCount, rows: int, value_bytes: int
    ) -> dict[str, Sent]:
        """What a part does to a state, and the convolution's last inputs.

        The states of all parts are gathered, [b, h, d, d + v] float32 with v = d, and backward reduce-scattered
        (``state_from_previous``); flash-linear-attention gathers as much forward and, instead of the reduce-scatter,
        backward (fla/ops/cp/chunk_delta_h.py). q, k and v of the last taps - 1 tokens go to the next rank, their
        gradients back.
        """
        d, others = shape.head_dim, part.cp_size - 1
        states = others * rows * heads.own * d * 2 * d * FLOAT
        halo = self.looks_back(options) * heads.own * 3 * rows * d * value_bytes
        to_next, from_next = halo if part.cp_rank < others else 0, halo if part.cp_rank > 0 else 0
        return {"states": Sent(states, states), "halo": Sent(to_next, from_next)}

    def cached(
        self, shape: ModelShape, options: Options, heads: HeadCount, tokens: float, rows: int, value_bytes: int
    ) -> float:
        """A float32 state a head, and the convolution's last taps - 1 inputs."""
        d = shape.head_dim
        return rows * heads.own * (FLOAT * d * d + 3 * d * self.looks_back(options) * value_bytes)

    def looks_back(self, options: Options) -> int:
        """The taps of the convolution before a token's own."""
        return max(0, option(options, self.name, "conv_kernel") - 1)
