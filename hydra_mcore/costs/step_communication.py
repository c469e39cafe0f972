# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Bytes that a rank sends in a training step, by kind of parallelism, and how unevenly attention lies on ranks."""

from __future__ import annotations

from hydra_mcore.config import ModelCard, teacher_card
from hydra_mcore.costs.activations import Run
from hydra_mcore.costs.communication import cp_bytes, imbalance
from hydra_mcore.costs.communication import total as layer_sent
from hydra_mcore.costs.training_memory import stage_parameters, trained_parameters
from hydra_mcore.kinds import FA
from hydra_mcore.kinds.kind import Sent
from hydra_mcore.stages import STAGES


def step_bytes(card: ModelCard, run: Run) -> dict[str, float]:
    """Bytes that the busiest rank sends in one step: by tensor, context, pipeline and data parallelism."""
    shape, p, micro_batches = card.shape, run.value_bytes, run.micro_batches
    layers = shape.num_layers / run.pp_size
    hidden = run.tokens * p * shape.hidden_size
    # Two sums over ranks forward and two backward, each an all-gather and a reduce-scatter; backward gathers the MLP's
    # input again under sequence parallelism. A teacher goes forward; of fitted layers only the attention has sums.
    stage = STAGES[run.stage]
    sums = (4 if stage.needs_teacher else 0) + (3 if stage.fits_layers else 8 + run.sequence_parallel)
    tensor = layers * sums * hidden * (run.tp_size - 1) / run.tp_size
    context = layers * layer_cp_bytes(card, run) if run.cp_size > 1 else 0.0
    pipeline = 2 * stage.streams * run.tokens_between * p * shape.hidden_size if run.pp_size > 1 else 0.0
    sharing = run.dp_size * run.cp_size
    trained = trained_parameters(stage_parameters(card, run, 0, 0), run)
    data = (run.gradient_bytes + p) * trained * (sharing - 1) / sharing
    return {
        "tensor": micro_batches * tensor,
        "context": micro_batches * context,
        "pipeline": micro_batches * pipeline,
        "data": data,
    }


def layer_cp_bytes(card: ModelCard, run: Run) -> float:
    """Bytes that a rank sends by context parallelism for a layer and micro-batch, forward and backward, mean over the
    layers.
    """
    teacher = teacher_card(card.shape, fingerprint="")
    total = 0.0
    for layer_idx in range(card.shape.num_layers):
        total += layer_sent(_cp_bytes(card, layer_idx, run)).total
        if STAGES[run.stage].needs_teacher:
            total += layer_sent(_cp_bytes(teacher, layer_idx, run)).forward
    return total / card.shape.num_layers


def _cp_bytes(card: ModelCard, layer_idx: int, run: Run) -> dict[str, dict[str, Sent]]:
    layout = run.layout(card, layer_idx)
    return cp_bytes(card.shape, card.options, layout, 0, run.part(), run.value_bytes, run.rows)


def fa_imbalances(card: ModelCard, run: Run) -> list[float]:
    """Attention work of the busiest tensor-parallel rank over the mean, layer by layer."""
    return [imbalance(run.layout(card, layer_idx), FA, run.part()) for layer_idx in range(card.shape.num_layers)]
