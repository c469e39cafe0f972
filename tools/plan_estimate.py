# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Time of a stage by arithmetic, and the layouts in which it fits.

    seconds of a step = model FLOPs / (GPUs x peak x efficiency)                      computing
                      + FLOPs of what is recomputed, likewise
                      + what the busiest tensor-parallel rank does more than the mean, in attention
                      + (pipeline stages - 1) / micro-batches of all that               the pipeline's bubble
                      + bytes sent / (bandwidth x LINK_SHARE)                            communication, nothing
                      overlapped

but gradients and weights of the distributed optimizer count only without overlap-grad-reduce and overlap-param-gather.
The efficiency is an input and the greatest uncertainty of all: measure it in the first hundred steps (log-throughput).
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from hydra_mcore.config import ConfigError, ModelCard, teacher_card
from hydra_mcore.costs.activations import Run
from hydra_mcore.costs.communication import cp_bytes, imbalance
from hydra_mcore.costs.communication import total as layer_sent
from hydra_mcore.costs.flops import model_flops, step_flops
from hydra_mcore.costs.training_memory import TrainingMemory, fullest_rank, stage_parameters, trained_parameters
from hydra_mcore.errors import InputError
from hydra_mcore.kinds import FA, KINDS
from hydra_mcore.kinds.kind import Sent
from hydra_mcore.stages import STAGES
from hydra_mcore.train.arguments import check_settings
from tools.plan_gpus import GPUS_PER_NODE, Gpu

MEMORY_SHARE = (
    0.92  # of a GPU's memory; the rest for the CUDA context, NCCL's buffers and the allocator's waste [assumed]
)
LINK_SHARE = 0.7  # of a link's published bandwidth that collectives reach [assumed]
Changes = dict[str, Any]  # parsed flag -> value

SELECTIVE = {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
# Flags that change memory or time in ways that are not worked out here.
NOT_PLANNED = (
    "num_layers_per_virtual_pipeline_stage", "num_virtual_stages_per_pipeline_rank", "pipeline_model_parallel_layout",
    "decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers", "optimizer_cpu_offload",
    "use_precision_aware_optimizer",
)  # fmt: skip


@dataclass(frozen=True)
class Machine:
    """So many GPUs of a kind, of whose peak computing reaches ``efficiency``."""

    gpu: Gpu
    gpus: int
    efficiency: float

    @property
    def usable_bytes(self) -> float:
        return self.gpu.memory_gib * 2**30 * MEMORY_SHARE

    def bandwidth(self, span: int) -> float:
        """Bytes a second between ranks of which ``span`` stand side by side, from the first to the last of a group."""
        return (self.gpu.nvlink_gbs if span <= GPUS_PER_NODE else self.gpu.network_gbs) * 1e9 * LINK_SHARE


@dataclass(frozen=True)
class Estimate:
    """One stage in one layout.

    ``communication``: bytes that the busiest rank sends in a step, by purpose; ``seconds`` of a step, by cause.
    """

    run: Run
    memory: TrainingMemory
    fits: bool
    flops: float
    communication: dict[str, float]
    seconds: dict[str, float]

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def hours(self) -> float:
        return self.step_seconds * self.run.steps / 3600

    @property
    def gpu_hours(self) -> float:
        return self.hours * self.run.ranks

    @property
    def tokens(self) -> int:
        return self.run.steps * self.run.global_rows * self.run.length


def estimate(card: ModelCard, known: argparse.Namespace, machine: Machine) -> Estimate:
    """A stage's memory and time under its parsed flags.

    Raises:
        InputError: flags that do not fit the model or the number of GPUs, or that are not known here.
    """
    for name in NOT_PLANNED:
        if getattr(known, name, None):
            raise ConfigError(
                f"--{name.replace('_', '-')} is not planned for; leave it out, and expect other memory and time"
            )
    check_settings(known, card, machine.gpus)
    run = Run.from_flags(known, machine.gpus, fused=True)
    if run.global_rows % (run.rows * run.dp_size):
        raise ConfigError(
            f"global-batch-size {run.global_rows} does not divide by micro-batch-size {run.rows} x {run.dp_size}"
            " data-parallel ranks"
        )
    groups = card.shape.num_kv_groups
    if groups % run.tp_size and run.tp_size % groups:
        raise ConfigError(
            f"Megatron asks that tensor parallel size {run.tp_size} divides {groups} kv groups, or is a multiple of"
            " them"
        )
    for what, size in (("vocabulary", card.shape.vocab_size), ("MLP width", card.shape.ffn_hidden_size)):
        if size % run.tp_size:
            raise ConfigError(
                f"tensor parallel size {run.tp_size} does not divide the {what} of {size}; choose one that does"
            )
    memory = fullest_rank(card, run)
    flops = step_flops(card, run.stage, run.length, run.global_rows)
    sent = communication(card, run)
    return Estimate(
        run, memory, memory.total <= machine.usable_bytes, flops, sent, _seconds(card, known, run, machine, flops, sent)
    )


def communication(card: ModelCard, run: Run) -> dict[str, float]:
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


def balance(card: ModelCard, run: Run) -> list[float]:
    """Attention work of the busiest tensor-parallel rank over the mean, layer by layer."""
    return [imbalance(run.layout(card, layer_idx), FA, run.part()) for layer_idx in range(card.shape.num_layers)]


def _seconds(
    card: ModelCard, known: argparse.Namespace, run: Run, machine: Machine, flops: float, sent: dict[str, float]
) -> dict[str, float]:
    rate = machine.gpus * machine.gpu.bf16_tflops * 1e12 * machine.efficiency
    tokens = run.global_rows * run.length
    attention = KINDS[FA].core_flops(card.shape, card.options, run.length).total * tokens
    uneven = sum(
        len(heads[FA]) * attention * (factor - 1)
        for heads, factor in zip(card.head_map.layers, balance(card, run), strict=True)
    )
    busy = {
        "computing": flops / rate,
        "recomputing": _recomputed(card, run) * tokens / rate,
        "imbalance": uneven / rate,
    }
    busy["bubble"] = sum(busy.values()) * (run.pp_size - 1) / run.micro_batches
    overlapped = known.overlap_grad_reduce and known.overlap_param_gather
    spans = {
        "tensor": run.tp_size,
        "context": run.tp_size * run.cp_size,
        "pipeline": run.ranks,
        "data": run.ranks // run.pp_size,
    }
    counted = {name: 0.0 if name == "data" and overlapped else sent[name] for name in sent}
    return busy | {"communication": sum(counted[name] / machine.bandwidth(spans[name]) for name in counted)}


def _recomputed(card: ModelCard, run: Run) -> float:
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


def mend(card: ModelCard, known: argparse.Namespace, machine: Machine) -> tuple[Changes, Estimate] | None:
    """The smallest change of flags with which a stage fits: the fewest settings, then the least time; None if none of
    up to three.
    """
    knobs = list(_knobs(known))
    for count in (1, 2, 3):
        changes = (
            dict(itertools.chain.from_iterable(change.items() for change in chosen))
            for some in itertools.combinations(knobs, count)
            for chosen in itertools.product(*some)
        )
        if found := fitting(card, known, machine, changes):
            return found[0]
    return None


def layouts(card: ModelCard, known: argparse.Namespace, machine: Machine) -> list[tuple[Changes, Estimate]]:
    """Every layout of tensor, pipeline and context parallelism, micro-batch and recompute in which a stage fits,
    fastest first.
    """
    sizes = [2**power for power in range(machine.gpus.bit_length())]
    recompute: list[Changes] = [{"recompute_granularity": None}, SELECTIVE, FULL]
    changes = (
        {
            "tensor_model_parallel_size": tp, "sequence_parallel": tp > 1, "pipeline_model_parallel_size": pp,
            "context_parallel_size": cp, "micro_batch_size": rows, **again,
        }
        for tp, pp, cp, rows, again in itertools.product(
            [s for s in sizes if s <= GPUS_PER_NODE], sizes, sizes, (1, 2, 4, 8), recompute
        )
        if tp * pp * cp <= machine.gpus
    )  # fmt: skip
    return fitting(card, known, machine, changes)


def fitting(
    card: ModelCard, known: argparse.Namespace, machine: Machine, changes: Iterable[Changes]
) -> list[tuple[Changes, Estimate]]:
    """Of changes to the flags those with which the stage fits, fastest first; impossible ones are passed over."""
    found = []
    for change in changes:
        try:
            found.append((change, estimate(card, argparse.Namespace(**vars(known) | change), machine)))
        except InputError:
            continue
    return sorted(((change, at) for change, at in found if at.fits), key=lambda pair: pair[1].step_seconds)


def _knobs(known: argparse.Namespace) -> Iterator[list[Changes]]:
    """What may be turned to save memory, each with its settings."""
    tp_size = known.tensor_model_parallel_size
    if tp_size > 1 and not known.sequence_parallel:
        yield [{"sequence_parallel": True}]
    if not known.use_distributed_optimizer:
        yield [{"use_distributed_optimizer": True}]
    if known.micro_batch_size > 1:
        yield [
            {"micro_batch_size": rows}
            for rows in range(1, known.micro_batch_size)
            if known.micro_batch_size % rows == 0
        ]
    if known.recompute_granularity != "full":
        yield [FULL] if known.recompute_granularity else [SELECTIVE, FULL]
    yield [{"context_parallel_size": known.context_parallel_size * more} for more in (2, 4, 8)]
    yield [{"tensor_model_parallel_size": tp_size * more, "sequence_parallel": True} for more in (2, 4, 8)]
    yield [{"pipeline_model_parallel_size": known.pipeline_model_parallel_size * more} for more in (2, 4, 8)]


def as_flags(changes: Changes) -> str:
    """Changes as a command line has them."""
    words: list[str] = []
    for name, value in changes.items():
        if value is None or value is False:
            continue
        words.append("--" + name.replace("_", "-"))
        words += [] if value is True else [str(item) for item in (value if isinstance(value, list) else [value])]
    return " ".join(words)


def as_json(at: Estimate) -> dict[str, Any]:
    """An estimate as plain values: bytes, seconds, FLOPs."""
    own = {
        name: getattr(at, name)
        for name in ("fits", "flops", "communication", "seconds", "step_seconds", "hours", "gpu_hours", "tokens")
    }
    return own | {
        "run": dataclasses.asdict(at.run),
        "memory": dataclasses.asdict(at.memory) | {"total": at.memory.total},
    }
