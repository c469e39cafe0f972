# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""What a kind of heads says of itself, so that everything else can loop over kinds and name none.

One file of this package describes one kind: its options, and pure functions of a model's shape and options. None of
them builds anything or needs torch. Shapes and letters are those of ``hydra_mcore/heads.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, Self

from hydra_mcore.sequence import SequencePart
from hydra_mcore.shape import ModelShape

FLOAT = 4  # bytes of what is computed in float32 whatever the model's type
GATE = "gates"  # the section of output gates in tables of parameters

Options = Any  # config.HydraOptions, which is made of all kinds' options
Mean = Any  # a float or an array of floats


@dataclass(frozen=True)
class HeadParameter:
    """One Hugging Face tensor of a kind's heads in a layer, and where a checkpoint stores it.

    Args:
        stored: name below the branch in a checkpoint, where the blocks are stacked on a new first axis.
        hf: name below the branch in Hugging Face, where the blocks follow one another along axis 0.
        per: what has a block of its own: each head, each kv group that one of the heads reads, or the layer.
        block: shape of one block in Hugging Face; [rows, width] multiplies the layer's input, [channels, 1, taps] is a
            depthwise convolution.
        part: (index, number of parts) where it is one of several equal parts of every stored block.
        inherited: whether it starts as the teacher's tensor of the same name (a head that has keys and values of its
            own starts with a copy of its kv group's).
        section: its line in tables of parameters; empty for the kind's own.
    """

    stored: str
    hf: str
    per: Literal["head", "group", "layer"]
    block: tuple[int, ...]
    part: tuple[int, int] = (0, 1)
    inherited: bool = False
    section: str = ""

    @property
    def num_values(self) -> int:
        """Numbers of one block."""
        values = 1
        for size in self.block:
            values *= size
        return values

    def hf_shape(self, blocks: int) -> tuple[int, ...]:
        """Shape in Hugging Face of so many blocks."""
        if self.per == "layer":
            return self.block
        return (blocks * self.block[0], *self.block[1:]) if self.block else (blocks,)


def linear(
    stored: str,
    hf: str,
    per: Literal["head", "group"],
    rows: int,
    width: int,
    *,
    bias: bool,
    part: tuple[int, int] = (0, 1),
    inherited: bool = False,
    section: str = "",
) -> list[HeadParameter]:
    """The weight, and the bias if there is one, of a projection with so many ``rows`` a head or group."""
    facts = {"part": part, "inherited": inherited, "section": section}
    found = [HeadParameter(f"{stored}.weight", f"{hf}.weight", per, (rows, width), **facts)]
    return found + ([HeadParameter(f"{stored}.bias", f"{hf}.bias", per, (rows,), **facts)] if bias else [])


def queries_keys_values(shape: ModelShape, options: Options, kv: Literal["head", "group"]) -> list[HeadParameter]:
    """The teacher's projections, taken over head by head; without keys and values where all kinds share theirs."""
    facts = {"bias": shape.qkv_bias, "inherited": True}
    found = linear("linear_q", "q_proj", "head", shape.head_dim, shape.hidden_size, **facts)
    if options.qkv == "separate":
        for index, name in enumerate(("k_proj", "v_proj")):
            found += linear("linear_kv", name, kv, shape.head_dim, shape.hidden_size, part=(index, 2), **facts)
    return found


def qk_norms(shape: ModelShape) -> list[HeadParameter]:
    """The weights of RMSNorm on queries and keys, one for all heads of the layer."""
    names = ("q_norm.weight", "k_norm.weight")
    return [HeadParameter(name, name, "layer", (shape.head_dim,), inherited=True) for name in names]


def output_gate(shape: ModelShape, granularity: str) -> list[HeadParameter]:
    """An output gate's projection (``model/gates.py``)."""
    if granularity == "none":
        return []
    rows = gate_width(granularity, shape.head_dim)
    return linear("gate.linear", "gate_proj", "head", rows, shape.hidden_size, bias=True, section=GATE)


def gate_width(granularity: str, head_dim: int) -> int:
    """Values of an output gate for each token and head."""
    return {"none": 0, "headwise": 1, "elementwise": head_dim}[granularity]


@dataclass(frozen=True)
class PerPass:
    """An amount of a forward pass and of its backward pass."""

    forward: float
    backward: float

    def __add__(self, other: Self) -> Self:
        return type(self)(self.forward + other.forward, self.backward + other.backward)

    def __rmul__(self, times: float) -> Self:
        return type(self)(times * self.forward, times * self.backward)

    @property
    def total(self) -> float:
        return self.forward + self.backward


class Flops(PerPass):
    """Operations."""


class Sent(PerPass):
    """Bytes that one rank sends."""


NO_FLOPS = Flops(0.0, 0.0)


def product(inputs: float, outputs: float, input_gradient: bool = True) -> Flops:
    """One row through a matrix, and the gradients of the matrix and, unless it has none, of the row."""
    forward = 2.0 * inputs * outputs
    return Flops(forward, 2 * forward if input_gradient else forward)


@dataclass(frozen=True)
class HeadCount:
    """How many heads of a kind one tensor-parallel rank has in a layer.

    Args:
        own: whole heads.
        shared: heads that all ``tp_size`` ranks hold, each computing its part of the queries (``HeadLayout``).
        groups: kv groups that these heads read.
    """

    own: int
    shared: int = 0
    groups: int = 0
    tp_rank: int = 0
    tp_size: int = 1

    @property
    def held(self) -> int:
        return self.own + self.shared

    @property
    def computed(self) -> float:
        """Whole heads' worth of queries."""
        return self.own + self.shared / self.tp_size


class Workload(Protocol):
    """What the bytes of a pass depend on beside the model (``costs.activations.Run``, ``costs.evaluation_memory``)."""

    length: int  # tokens of a row over all context-parallel ranks
    rows: int  # of them, in one micro-batch
    cp_size: int
    value_bytes: int  # of an activation
    fused: bool  # a GPU's kernels

    @property
    def tokens(self) -> float: ...  # of a micro-batch on a rank


def norm_kept(width: int, load: Workload) -> float:
    """Bytes that RMSNorm of one row keeps: its input and 1 / rms; without fused kernels also the row before the weight,
    in float32.
    """
    return (load.value_bytes * width if load.fused else 2 * FLOAT * width) + FLOAT


def norm_working(load: Workload) -> int:
    """Bytes a value while RMSNorm works, its input and result included."""
    if load.fused:
        return 2 * load.value_bytes
    return 3 * FLOAT + (load.value_bytes if load.value_bytes < FLOAT else 0)


def gate_kept(granularity: str, head_dim: int, load: Workload) -> int:
    """Bytes that an output gate keeps of one head; with kernels also the output that it multiplies, which elsewhere the
    fusion keeps.
    """
    if granularity == "none":
        return 0
    return load.value_bytes * (gate_width(granularity, head_dim) + head_dim * load.fused)


@dataclass(frozen=True)
class Kept:
    """Bytes a token of one layer's heads of a kind, of what their forward pass keeps for backward.

    ``inputs``: up to the inputs of the core (attention, or the recurrence); ``core``: what the core keeps beside its
    inputs; ``workspace``: what the core's backward pass needs at most beyond all that.
    """

    inputs: float
    core: float
    workspace: float = 0.0


@dataclass(frozen=True)
class Statistic:
    """Something to watch of every head; ``of_mean`` makes its value of the mean over tokens.

    ``log_scale``: whether pictures show its logarithm.
    """

    name: str
    of_mean: Callable[[Mean], Mean] = lambda mean: mean
    log_scale: bool = False


@dataclass(frozen=True, kw_only=True)
class HeadKind:
    """A kind of heads; every function is pure.

    Args:
        name: in head maps, in the names of options and parameters.
        label, title: short in tables, long in prose.
        colour: in pictures.
        branch: module and class of its branch, resolved when a layer is built.
        exported: file of its branch in exported models, below the package.
        options: a dataclass of its options, each named after the kind and documented with its source.
        check: raises ConfigError for options that cannot be used.
        parameters: its tensors in one layer.
        gate: option -> the granularity of its output gate.
        core: what its core is called in profiles and tables.
        core_flops: of the core, for each token of a row of a length and each head.
        decode_flops: of the core, for one new token and head behind a number of tokens.
        work: how much a rank's core computes, in its own unit; the busiest rank is waited for. Where every token costs
            the same, the tokens of its heads.
        kept: what training keeps of a token.
        working: bytes of a pass without gradients at its fullest moment.
        decoding: bytes of one step of decoding behind so many cached tokens of all rows; none where the state is small.
        sent: bytes under context parallelism of one layer, by purpose.
        cached: bytes that decoding remembers of one layer, after ``tokens`` of all rows.
        looks_back: tokens of the previous context-parallel part that it needs to see; no part may be shorter.
        statistics: what is watched beside gate, scale and size; its branch says where they are read.
    """

    name: str
    label: str
    title: str
    colour: str
    branch: str
    exported: str
    options: type
    check: Callable[[Options], None]
    parameters: Callable[[ModelShape, Options], list[HeadParameter]]
    gate: Callable[[Options], str]
    core: str
    core_flops: Callable[[ModelShape, Options, int], Flops]
    decode_flops: Callable[[int, float], float]
    kept: Callable[[ModelShape, Options, Workload, HeadCount], Kept]
    working: Callable[[ModelShape, Options, Workload, HeadCount], float]
    sent: Callable[[ModelShape, Options, SequencePart, HeadCount, int, int], dict[str, Sent]]
    cached: Callable[[ModelShape, Options, HeadCount, float, int, int], float]
    work: Callable[[SequencePart, HeadCount], int] = lambda part, heads: heads.own * part.num_tokens
    decoding: Callable[[ModelShape, Workload, HeadCount, float], float] = lambda *_: 0.0
    looks_back: Callable[[Options], int] = lambda _: 0
    statistics: tuple[Statistic, ...] = ()
