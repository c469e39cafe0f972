# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""What the layers of a micro-batch keep for their backward pass, worked out without running them.

Every term is a tensor that autograd saves, in bytes a token. p is the size of an activation, d of a head, m of the
model, C the rows of a chunk. Found by listing saved tensors; ``tests/unit/costs/test_activations.py`` compares
with them.

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
from hydra_mcore.heads import HeadLayout
from hydra_mcore.kinds import KINDS
from hydra_mcore.kinds.kind import FLOAT, norm_kept
from hydra_mcore.sequence import SequencePart


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
        """The run that a stage's parsed flags describe (train/arguments.py)."""
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


@dataclass(frozen=True)
class LayerKept:
    """Bytes of one layer on one rank, of what its forward pass made, in the order in which it was made.

    ``before``: up to the inputs of the cores (attention, recurrences). ``core``: what these keep beside their inputs.
    ``after``: fusion, output projection, the MLP's norm and input. ``mlp``: inside the MLP. ``core_workspace``: what
    the backward pass of one of the cores needs at most beyond all that.
    """

    before: float
    core: float
    after: float
    mlp: float
    core_workspace: float


def layer_bytes(card: ModelCard, layer_idx: int, tp_rank: int, run: Run) -> LayerKept:
    """What one student layer keeps when nothing is recomputed."""
    shape, options, p = card.shape, card.options, run.value_bytes
    layout = run.layout(card, layer_idx)
    counts = {kind: layout.count(kind, tp_rank) for kind in layout.layer}
    kept = [KINDS[kind].kept(shape, options, run, count) for kind, count in counts.items()]
    before = p * shape.hidden_size + sum(kind.inputs for kind in kept)
    computed = sum(count.computed for count in counts.values())
    after = computed * (_fusion(shape, options, run) + p * shape.head_dim)
    norm = norm_kept(shape.hidden_size, run)
    return LayerKept(
        before=run.tokens * before + run.tokens_between * norm,
        core=run.tokens * sum(kind.core for kind in kept),
        after=run.tokens * after + run.tokens_between * (norm + p * shape.hidden_size),
        mlp=run.tokens * (3 if run.fused else 5) * p * shape.ffn_hidden_size / run.tp_size,
        core_workspace=run.tokens * max(kind.workspace for kind in kept),
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
