# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""What the layers of a micro-batch keep for their backward pass, worked out without running them.

Every term is a tensor that autograd saves, in bytes a token. p is the size of an activation, d of a head, m of the
model, C the rows of a chunk. Found by listing saved tensors; ``tests/unit/test_activations.py`` compares with them.

There are two sets of kernels. Without a GPU, torch's own: RMSNorm keeps float32 copies of its input and of its result
before the weight, SwiGLU five values for each of its width, and the delta rule five C x C matrices a chunk. On a GPU
(``fused``): RMSNorm and SwiGLU keep their input, and flash-linear-attention's kernel its inputs and one C x C matrix,
the rest is made again in its backward. The second set is an estimate from the kernels' design, not yet measured on a
GPU.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from hydra_mcore.config import HydraOptions, ModelCard, ModelShape
from hydra_mcore.costs.flops import CHUNK
from hydra_mcore.heads import HeadLayout
from hydra_mcore.ops.chunked_delta_rule import segment_tokens
from hydra_mcore.ops.sequence import SequencePart

FLOAT = 4  # bytes of what is computed in float32 whatever the model's type


@dataclass(frozen=True)
class Run:
    """What memory and time depend on, of a stage's flags and the number of its ranks.

    Args:
        length: tokens of a row over all context-parallel ranks; ``rows`` of them are a micro-batch.
        value_bytes, gradient_bytes: of an activation or a weight; of a gradient while it accumulates.
        recompute: modules that Megatron's selective recompute names.
        recompute_layers: of full recompute, ("uniform", layers recomputed together) or ("block", layers of a stage that
            are).
        fused: a GPU's kernels.
    """

    stage: str
    length: int
    rows: int
    global_rows: int
    steps: int
    value_bytes: int
    gradient_bytes: int
    ranks: int = 1
    tp_size: int = 1
    pp_size: int = 1
    cp_size: int = 1
    sequence_parallel: bool = False
    distributed_optimizer: bool = True
    recompute: tuple[str, ...] = ()
    recompute_layers: tuple[str, int] | None = None
    fa_balance: str = "heads"
    fused: bool = False

    @classmethod
    def from_flags(cls, known: argparse.Namespace, ranks: int, fused: bool) -> Run:
        """Of a stage's parsed flags (train/arguments.py)."""
        granularity = known.recompute_granularity or ("selective" if known.recompute_activations else None)
        return cls(
            stage=known.stage,
            length=known.seq_length,
            rows=known.micro_batch_size,
            global_rows=known.global_batch_size,
            steps=known.train_iters,
            value_bytes=2 if known.bf16 else FLOAT,
            gradient_bytes=2 if known.bf16 and known.grad_reduce_in_bf16 else FLOAT,
            ranks=ranks,
            tp_size=known.tensor_model_parallel_size,
            pp_size=known.pipeline_model_parallel_size,
            cp_size=known.context_parallel_size,
            sequence_parallel=known.sequence_parallel and known.tensor_model_parallel_size > 1,
            distributed_optimizer=known.use_distributed_optimizer,
            recompute=tuple(known.recompute_modules or ("core_attn",)) if granularity == "selective" else (),
            recompute_layers=(known.recompute_method, known.recompute_num_layers) if granularity == "full" else None,
            fa_balance=known.fa_balance,
            fused=fused,
        )

    @property
    def dp_size(self) -> int:
        return self.ranks // (self.tp_size * self.pp_size * self.cp_size)

    @property
    def micro_batches(self) -> int:
        """Micro-batches of one step on a rank."""
        return self.global_rows // (self.rows * self.dp_size)

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch on a rank."""
        return self.length // self.cp_size * self.rows

    @property
    def tokens_between(self) -> float:
        """Tokens of the hidden state between layers, which sequence parallelism shards."""
        return self.tokens / self.tp_size if self.sequence_parallel else self.tokens

    def layout(self, card: ModelCard, layer_idx: int) -> HeadLayout:
        return HeadLayout(
            card.head_map.layers[layer_idx], card.shape.num_kv_groups, self.tp_size, layer_idx, self.fa_balance
        )

    def layers(self, card: ModelCard, pp_rank: int) -> range:
        """The layers of one pipeline stage."""
        per_stage = card.shape.num_layers // self.pp_size
        return range(pp_rank * per_stage, (pp_rank + 1) * per_stage)

    def part(self, cp_rank: int = 0) -> SequencePart:
        return SequencePart(self.length, self.cp_size, cp_rank)

    def norm(self, width: int) -> int:
        """Kept by RMSNorm of one row: its input and 1 / rms; without fused kernels also the row before the weight, in
        float32.
        """
        return (self.value_bytes * width if self.fused else 2 * FLOAT * width) + FLOAT


@dataclass(frozen=True)
class Kept:
    """Bytes of one layer on one rank, of what its forward pass made, in the order in which it was made.

    ``before``: up to the inputs of the delta rule and of attention. ``core``: what these two keep beside their inputs.
    ``after``: fusion, output projection, the MLP's norm and input. ``mlp``: inside the MLP. ``core_workspace``: what
        the
    delta rule's backward pass needs at most beyond all that.
    """

    before: float
    core: float
    after: float
    mlp: float
    core_workspace: float


def layer_bytes(card: ModelCard, layer_idx: int, tp_rank: int, run: Run) -> Kept:
    """What one student layer keeps when nothing is recomputed."""
    shape, options, p = card.shape, card.options, run.value_bytes
    layout = run.layout(card, layer_idx)
    owned, shared = layout.ranks[tp_rank], len(layout.shared_fa)
    num_gdn, num_fa = (
        len(owned.gdn),
        len(owned.fa) + shared / run.tp_size,
    )  # shared heads: each rank its part of the queries
    before, core, workspace = p * shape.hidden_size, 0.0, 0.0
    if layout.layer.fa:
        groups = len({layout.group_of(h) for h in owned.fa + layout.shared_fa})
        before += _fa(shape, options, run, num_fa, groups)
        before += (
            2 * (len(owned.fa) + shared) * run.cp_size * p * shape.head_dim
        )  # keys and values of the whole row, by head
        core += num_fa * (p * shape.head_dim + FLOAT)  # attention's result, the logarithm of its softmax's sum
    if layout.layer.gdn:
        before += _gdn(shape, options, run, num_gdn)
        core += num_gdn * _delta_rule(shape.head_dim, num_gdn, run)
        workspace = num_gdn * _delta_rule_workspace(shape.head_dim, num_gdn, run)
    after = (num_fa + num_gdn) * (_fusion(shape, options, run) + p * shape.head_dim)
    norm = run.norm(shape.hidden_size)
    return Kept(
        before=run.tokens * before + run.tokens_between * norm,
        core=run.tokens * core,
        after=run.tokens * after + run.tokens_between * (norm + p * shape.hidden_size),
        mlp=run.tokens * (3 if run.fused else 5) * p * shape.ffn_hidden_size / run.tp_size,
        core_workspace=run.tokens * workspace,
    )


def _fusion(shape: ModelShape, options: HydraOptions, run: Run) -> float:
    """For each head: what it is given; with kernels, also 1 / rms and the input of the scale; the competition's input
    and share.
    """
    d, p, kind = shape.head_dim, run.value_bytes, options.fusion
    kept = p * d if kind != "none" else 0
    if run.fused:
        kept += (FLOAT if kind != "none" else 0) + p * d * (kind in ("scale", "competition"))
    return kept + p * (d + 1) * (kind == "competition")


def _fa(shape: ModelShape, options: HydraOptions, run: Run, heads: float, groups: int) -> float:
    """For each token: norms, rotary, scale and gates of FA heads, and their queries."""
    d, p = shape.head_dim, run.value_bytes
    kept = heads * (p * d + _gate(options.fa_gate, d, p, run))
    if shape.qk_norm:
        kept += (heads + groups) * run.norm(d)
        if run.fused or p == FLOAT:
            kept += groups * p * d  # the norm's input is the keys, in one tensor with the values
    if options.fa_position == "rope":
        kept += 4 * p * d  # cosines and sines, of queries and of keys
    return kept + p  # the log-position scale


def _gdn(shape: ModelShape, options: HydraOptions, run: Run, heads: int) -> float:
    """For each token: convolution, norms, rotary and gates of GDN heads, and the inputs of the delta rule."""
    d, p, rms = shape.head_dim, run.value_bytes, options.gdn_qk_norm == "rms"
    kept = 3 * d * p if options.gdn_conv_kernel else 0  # its input, padded
    kept += 3 * d * p  # q, k and v in one tensor, of which the norms' inputs and the values are views
    kept += 3 * FLOAT + 2 * FLOAT  # decay and write gate
    kept += _gate(options.gdn_gate, d, p, run) + 2 * p * d  # queries and keys
    if run.fused:  # the L2 norm and 1 / rms of queries and keys; elsewhere they are made anew
        kept += 2 * (FLOAT * d + 2 * FLOAT) + rms * 2 * FLOAT
    return heads * kept + (4 * p * d if run.fused and options.gdn_position == "rope" else 0)


def _gate(granularity: str, d: int, p: int, run: Run) -> int:
    """The gate; with kernels also the output that it multiplies, which elsewhere the fusion keeps."""
    return 0 if granularity == "none" else p * ((d if granularity == "elementwise" else 1) + d * run.fused)


def _delta_rule(d: int, heads: int, run: Run) -> float:
    """For each head and token: what chunked_delta_rule, or the kernel, keeps beside its inputs."""
    p = run.value_bytes
    if run.fused:
        return p * d + p * CHUNK  # contiguous values, and the inverse of 1 + L
    part = run.length // run.cp_size
    padding = -(-part // CHUNK) * CHUNK / part
    return FLOAT * (padding * (CHUNK + d) + d * d / min(part, segment_tokens(heads * run.rows, d)))


def _delta_rule_workspace(d: int, heads: int, run: Run) -> float:
    """For each head and token: gradients inside the delta rule's backward pass, and what it makes anew of a segment.

    The kernel's: states, their gradients and ten values of size d.
    """
    p, part = run.value_bytes, run.length // run.cp_size
    if run.fused:
        return 2 * p * d * d / CHUNK + 10 * p * d
    segment = FLOAT * (18 * d + 9 * CHUNK + 3 * d * d / CHUNK)
    return 3 * p * d + 2 * FLOAT + segment * min(1.0, segment_tokens(heads * run.rows, d) / part)
