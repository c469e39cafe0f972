# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""What a training step needs of one rank's memory, worked out without running it.

With N parameters on the rank (costs/parameters.py), T of them trained (all, in align those of the attention blocks), p
bytes a value (2 for bf16), s ranks that share the optimizer (data x context parallel, 1 without the distributed
optimizer):

    weights      p N
    gradients    4 T                     2 T with grad-reduce-in-bf16
    optimizer    8 T / s                 Adam's two moments; 4 T / s more for float32 weights where p is 2
    teacher      p N of the teacher      align builds it without an output layer, extend not at all
    activations  see below
    loss         costs/loss_memory.py   on the last pipeline stage of distill and extend
    workspace    gradients of activations at the fullest moment, hidden states on their way

The first four stay. The others are those of the fullest of these moments:

    the loss is made        what all layers of the micro-batches in flight keep (costs/activations.py), and the loss
    an MLP goes backward    what the layers up to it keep, gradients inside the MLP
    a delta rule goes       what the layers before it keep, its own inputs and what it keeps (made again, where
    recomputed),
      backward              gradients inside it
    align: a layer fits     one layer's attention block, and the gradients of those before it, in p bytes
    align: the teacher runs the inside of an MLP

Pipeline stage i of n holds min(n - i, micro-batches of a step) micro-batches in flight. Not counted: the CUDA context,
NCCL's buffers and the allocator's waste (tools/plan.py sets a part of the memory aside), a data loader's batches, and
what an optimizer step needs while no activation is there. ``tests/distributed/test_memory.py`` runs whole stages on a
CPU and measures; the formula stays within 10%.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from dataclasses import dataclass

from hydra_mcore.config import ModelCard, teacher_card
from hydra_mcore.costs.activations import LayerKept, Run, layer_bytes
from hydra_mcore.costs.loss_memory import peak_bytes
from hydra_mcore.costs.parameters import ATTENTION_PARTS, rank_parameters
from hydra_mcore.kinds.kind import FLOAT, norm_kept
from hydra_mcore.stages import STAGES

Moment = tuple[float, float, float]  # bytes of activations, loss, workspace


Layers = list[LayerKept]


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes of one rank at the fullest moment of a step, by part."""

    weights: float
    gradients: float
    optimizer: float
    teacher: float
    activations: float
    loss: float
    workspace: float

    @property
    def total(self) -> float:
        return sum(dataclasses.astuple(self))


def fullest_rank(card: ModelCard, run: Run) -> TrainingMemory:
    """The memory of the rank that needs most."""
    ranks = itertools.product(range(run.pp_size), range(run.tp_size))
    return max((rank_memory(card, run, *rank) for rank in ranks), key=lambda memory: memory.total)


def rank_memory(card: ModelCard, run: Run, pp_rank: int, tp_rank: int) -> TrainingMemory:
    """The memory of one pipeline- and tensor-parallel rank in the stage ``run`` of the student ``card``."""
    held, stage = stage_parameters(card, run, pp_rank, tp_rank), STAGES[run.stage]
    trained = trained_parameters(held, run)
    sharing = run.dp_size * run.cp_size if run.distributed_optimizer else 1
    states = 2 * FLOAT + (FLOAT if run.value_bytes < FLOAT else 0)
    teacher = 0
    if stage.needs_teacher:
        whole = stage_parameters(teacher_card(card.shape, fingerprint=""), run, pp_rank, tp_rank)
        teacher = whole.total() - (0 if stage.needs_teacher_logits else whole["output layer"])
    layers = [layer_bytes(card, layer_idx, tp_rank, run) for layer_idx in run.layers(card, pp_rank)]
    in_flight = min(run.pp_size - pp_rank, run.micro_batches)
    if stage.fits_layers:
        moments = _align_moments(card, run, layers, in_flight, run.value_bytes * trained)
    else:
        moments = _token_moments(card, run, layers, in_flight, last_stage=pp_rank == run.pp_size - 1)
    activations, loss, workspace = max(moments, key=sum)
    return TrainingMemory(
        weights=run.value_bytes * held.total(),
        gradients=run.gradient_bytes * trained,
        optimizer=states * trained / sharing,
        teacher=run.value_bytes * teacher,
        activations=activations,
        loss=loss,
        workspace=workspace,
    )


def stage_parameters(card: ModelCard, run: Run, pp_rank: int, tp_rank: int) -> Counter[str]:
    """Parameters of a model on one rank, by part."""
    ends = {"embedding": pp_rank == 0, "output": pp_rank == run.pp_size - 1}
    place = {"tp_size": run.tp_size, "tp_rank": tp_rank, "fa_balance": run.fa_balance}
    return rank_parameters(card, run.layers(card, pp_rank), **ends, **place)


def trained_parameters(held: Counter[str], run: Run) -> int:
    """How many of the parameters that ``stage_parameters`` counts the stage trains."""
    return sum(held[part] for part in ATTENTION_PARTS) if STAGES[run.stage].fits_layers else held.total()


def _align_moments(card: ModelCard, run: Run, layers: Layers, in_flight: int, gradients: float) -> list[Moment]:
    """``gradients``: bytes of one micro-batch's gradients, kept until backward. The teacher's hidden state, its
    attention's input and output are there too."""
    hidden = 3 * run.tokens_between * run.value_bytes * card.shape.hidden_size
    moments = []
    for index, layer in enumerate(layers):
        earlier = gradients * (in_flight - 1 + index / len(layers))
        moments.append((earlier + layer.before + layer.core + layer.after, 0.0, hidden))
        moments.append((earlier + layer.before + layer.core, 0.0, hidden + layer.core_workspace))
        moments.append((gradients * (in_flight - 1 + (index + 1) / len(layers)), 0.0, hidden + layer.mlp))
    return moments


def _token_moments(card: ModelCard, run: Run, layers: Layers, in_flight: int, last_stage: bool) -> list[Moment]:
    shape, hidden = card.shape, run.tokens_between * run.value_bytes * card.shape.hidden_size
    groups = _recompute_groups(run, layers)
    stored = [hidden if again else sum(_stored(run, layer) for layer in group) for group, again in groups]
    others, moments, tied_gradient = (in_flight - 1) * sum(stored), [], 0.0
    if last_stage:
        with_teacher = STAGES[run.stage].needs_teacher
        loss = peak_bytes(
            run.tokens, shape.hidden_size, shape.vocab_size, run.tp_size, run.value_bytes, with_teacher=with_teacher
        )
        output = run.tokens * run.value_bytes * shape.hidden_size
        moments.append(
            (
                others + sum(stored) + run.tokens_between * norm_kept(shape.hidden_size, run),
                loss,
                (1 + with_teacher) * output,
            )
        )
        if shape.tied_embeddings and run.pp_size == 1:  # waits for the embedding's share, the last of the backward pass
            tied_gradient = run.value_bytes * shape.hidden_size * shape.vocab_size / run.tp_size
    inside_mlp = 2 * run.tokens * run.value_bytes * shape.ffn_hidden_size / run.tp_size
    for index, (group, _) in enumerate(groups):
        earlier = others + sum(stored[:index])
        for layer in group:
            moments.append((earlier + _stored(run, layer, with_mlp=True), tied_gradient, 2 * hidden + inside_mlp))
            moments.append((earlier + layer.before + layer.core, tied_gradient, 2 * hidden + layer.core_workspace))
            earlier += _stored(run, layer)
    return moments


def _stored(run: Run, layer: LayerKept, with_mlp: bool = False) -> float:
    """What a layer keeps from its forward pass under selective recompute; ``with_mlp``: once its MLP has been made
    again.
    """
    core = 0.0 if "core_attn" in run.recompute else layer.core
    mlp = 0.0 if "mlp" in run.recompute and not with_mlp else layer.mlp
    return layer.before + core + layer.after + mlp


def _recompute_groups(run: Run, layers: Layers) -> list[tuple[Layers, bool]]:
    """The layers that go forward together, and whether they keep their input only and run again in backward."""
    if run.recompute_layers is None:
        return [([layer], False) for layer in layers]
    method, count = run.recompute_layers
    if method == "uniform":
        return [(layers[start : start + count], True) for start in range(0, len(layers), count)]
    return [([layer], index < count) for index, layer in enumerate(layers)]
