# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Time of a training step and of a prompt, by arithmetic.

    seconds of a step = model FLOPs / (GPUs x peak x efficiency)                      computing
                      + FLOPs of what is recomputed, likewise
                      + what the busiest tensor-parallel rank does more than the mean, in attention
                      + (pipeline stages - 1) / micro-batches of all that             the pipeline's bubble
                      + bytes sent / (bandwidth x LINK_SHARE)                         communication, nothing overlapped

but gradients and weights of the distributed optimizer count only without overlap-grad-reduce and overlap-param-gather.

    seconds of a prompt = forward FLOPs / (tensor x context-parallel ranks x peak x efficiency)

The efficiency is an input and the greatest uncertainty of all: measure it in the first hundred steps (log-throughput).
"""

from __future__ import annotations

from hydra_mcore.config import ModelCard
from hydra_mcore.costs.activations import Run
from hydra_mcore.costs.evaluation_memory import Forward
from hydra_mcore.costs.flops import model_flops
from hydra_mcore.costs.machine import Machine
from hydra_mcore.costs.step_communication import fa_imbalances
from hydra_mcore.kinds import FA, KINDS
from hydra_mcore.stages import STAGES


def step_seconds(
    card: ModelCard, run: Run, machine: Machine, flops: float, sent: dict[str, float], overlapped: bool
) -> dict[str, float]:
    """Seconds of a training step, by cause.

    Args:
        flops: model FLOPs of a step on all GPUs.
        sent: bytes of a step by kind of parallelism, from ``step_bytes``.
        overlapped: communication of gradients and weights is hidden behind computing.
    """
    rate = machine.gpus * machine.gpu.bf16_tflops * 1e12 * machine.efficiency
    tokens = run.global_rows * run.length
    attention = KINDS[FA].core_flops(card.shape, card.options, run.length).total * tokens
    uneven = sum(
        len(heads[FA]) * attention * (factor - 1)
        for heads, factor in zip(card.head_map.layers, fa_imbalances(card, run), strict=True)
    )
    busy = {
        "computing": flops / rate,
        "recomputing": recomputed_flops(card, run) * tokens / rate,
        "imbalance": uneven / rate,
    }
    busy["bubble"] = sum(busy.values()) * (run.pp_size - 1) / run.micro_batches
    spans = {
        "tensor": run.tp_size,
        "context": run.tp_size * run.cp_size,
        "pipeline": run.ranks,
        "data": run.ranks // run.pp_size,
    }
    counted = {name: 0.0 if name == "data" and overlapped else sent[name] for name in sent}
    return busy | {"communication": sum(counted[name] / machine.bandwidth(spans[name]) for name in counted)}


def recomputed_flops(card: ModelCard, run: Run) -> float:
    """FLOPs for each token that backward spends on making activations again."""
    fits_layers = STAGES[run.stage].fits_layers
    if fits_layers and run.recompute_layers:
        return 0.0  # each layer is fitted on the spot
    forward = model_flops(card, run.length, with_output=False).forward
    if run.recompute_layers:
        method, count = run.recompute_layers
        return forward * (1.0 if method == "uniform" else min(1.0, count * run.pp_size / card.shape.num_layers))
    core = 0.0
    for layer in card.head_map.layers:
        for kind, heads in layer.items():
            core += len(heads) * KINDS[kind].core_flops(card.shape, card.options, run.length).forward
    mlp = card.shape.num_layers * 6 * card.shape.hidden_size * card.shape.ffn_hidden_size
    return core * ("core_attn" in run.recompute) + mlp * ("mlp" in run.recompute and not fits_layers)


def prompt_seconds(card: ModelCard, run: Forward, machine: Machine) -> float:
    """Seconds in which one replica reads a prompt; pipeline stages wait for each other, so they save no time."""
    rate = run.tp_size * run.cp_size * machine.gpu.bf16_tflops * 1e12 * machine.efficiency
    return model_flops(card, run.length, with_output=False).forward * run.length / rate
