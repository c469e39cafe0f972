# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""A plan as text; its tables are markdown."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence

from hydra_mcore.config import ModelCard, teacher_card
from hydra_mcore.costs.activations import Run
from hydra_mcore.costs.flops import one_head
from hydra_mcore.costs.machine import MEMORY_SHARE, Machine
from hydra_mcore.costs.parameters import PARTS, rank_parameters
from hydra_mcore.costs.step_communication import fa_imbalances, layer_cp_bytes
from hydra_mcore.costs.training_memory import stage_parameters
from hydra_mcore.kinds import DEFAULT_LINEAR, FA, KINDS
from hydra_mcore.model.imitation import READS
from hydra_mcore.selection.replaceability import ROW_LENGTH, replaceability_flops
from tools.plan.estimate import Estimate
from tools.plan.layouts import Changes, as_flags

LENGTHS = (2048, 16_384, 65_536, 262_144)
GIB = 2**30


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A markdown table, its first column to the left."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def model_section(card: ModelCard, source: str, config: Sequence[str]) -> str:
    """Parameters of student and teacher, and what a token costs in a head of each kind."""
    layers = range(card.shape.num_layers)
    student, teacher = rank_parameters(card, layers), rank_parameters(teacher_card(card.shape, ""), layers)
    rows = [[part, f"{student[part]:,}", f"{teacher[part]:,}"] for part in PARTS if student[part] or teacher[part]]
    rows.append(["all", f"{student.total():,}", f"{teacher.total():,}"])
    shape, options = card.shape, card.options
    kinds = [kind for name, kind in KINDS.items() if name == FA or any(layer[name] for layer in card.head_map.layers)]
    heads = []
    for length in LENGTHS:
        cores = [kind.core_flops(shape, options, length).forward for kind in kinds]
        whole = [one_head(kind, shape, options, length).forward for kind in kinds]
        ratios = [f"{cores[0] / core:.1f}" for core in cores[1:]]
        heads.append([f"{length:,}", *(f"{value / 1e6:.2f}" for value in (*cores, *whole)), *ratios])
    columns = ["tokens a row", *(kind.core for kind in kinds), *(f"{kind.label} head" for kind in kinds)]
    columns += [f"{kinds[0].core} / {kind.core}" for kind in kinds[1:]]
    return "\n\n".join([
        f"# Plan of {' + '.join(config)}\n{source}\n"
        f"{card.head_map.num_fa} FA heads of {shape.num_layers} x {shape.num_heads}",
        table(["parameters", "student", "teacher"], rows),
        "Forward MFLOPs a token of one head: its core alone, and with its projections (an FA head without the keys "
        "and values of its kv group).",
        table(columns, heads),
    ])  # fmt: skip


def imitation_line(card: ModelCard, machine: Machine) -> str:
    """How long ``select_heads.py`` takes to let linear heads imitate every head."""
    linear = [name for name in KINDS if name in READS and any(layer[name] for layer in card.head_map.layers)]
    kinds = linear or [DEFAULT_LINEAR]
    flops = replaceability_flops(card.shape, ROW_LENGTH, kinds)
    seconds = flops / (machine.gpus * machine.gpu.float32_tflops * 1e12 * machine.efficiency)
    gpus = f"{machine.gpus} GPU" + ("s" if machine.gpus > 1 else "")
    return (
        f"How well a linear head imitates each head (select_heads.py --replaceable-by {' '.join(kinds)}): {flops:.1e}"
        f" operations in float32, {seconds:.0f} s of {gpus}."
    )


def layout_name(run: Run) -> str:
    """TP 2 x PP 1 x CP 4 x DP 8, micro-batch 1, what is recomputed."""
    sizes = (
        f"TP {run.tp_size}{' SP' if run.sequence_parallel else ''} x PP {run.pp_size} x CP {run.cp_size} x DP"
        f" {run.dp_size}"
    )
    again = "all layers" if run.recompute_layers else " and ".join(run.recompute)
    return f"{sizes}, micro-batch {run.rows}" + (f", recomputes {again}" if again else "")


def stage_section(card: ModelCard, at: Estimate, machine: Machine, change: tuple[Changes, Estimate] | None) -> str:
    """One stage in its layout: memory, communication, balance, time, and what would make it fit when it does not."""
    run = at.run
    ranks = itertools.product(range(run.pp_size), range(run.tp_size))
    held = [stage_parameters(card, run, pp_rank, tp_rank).total() for pp_rank, tp_rank in ranks]
    memory = [[part, f"{value / GIB:.2f}"] for part, value in dataclasses.asdict(at.memory).items()]
    memory.append(["all", f"{at.memory.total / GIB:.2f}"])
    seconds = [[cause, f"{value:.2f}"] for cause, value in at.seconds.items()] + [["a step", f"{at.step_seconds:.2f}"]]
    usable = f"{machine.usable_bytes / GIB:.1f} GiB usable ({MEMORY_SHARE:.0%} of {machine.gpu.memory_gib:g})"
    lines = [
        f"\n## {run.stage}: {run.steps:,} steps of {run.global_rows} x {run.length:,} tokens = {at.tokens / 1e9:.2f}B",
        (
            f"{machine.gpus} GPUs as {layout_name(run)}; {run.micro_batches} micro-batches a step; "
            f"{min(held):,} to {max(held):,} parameters a rank; {at.flops:.3g} FLOPs a step"
        ),
        table(["memory of the fullest rank", "GiB"], memory),
        ("Fits: " if at.fits else "DOES NOT FIT: ") + usable + ("" if at.fits else _fix(change)),
        table(["time", "s"], seconds),
        _communication(card, at),
        f"{at.hours:.1f} h, {at.gpu_hours:,.0f} GPU-hours",
    ]
    return "\n\n".join(lines)


def _fix(change: tuple[Changes, Estimate] | None) -> str:
    if change is None:
        return "; no change of up to three settings fixes it: more GPUs, or larger ones"
    changes, at = change
    return (
        f"; smallest change that fits: {as_flags(changes)} ({at.memory.total / GIB:.1f} GiB, {at.step_seconds:.2f} s a"
        " step)"
    )


def _communication(card: ModelCard, at: Estimate) -> str:
    run = at.run
    sent = ", ".join(f"{name} {value / GIB:.2f} GiB" for name, value in at.communication.items() if value)
    lines = [f"Sent by a rank in a step: {sent or 'nothing'}"]
    if run.cp_size > 1:
        lines.append(f"context parallelism, a layer and micro-batch: {layer_cp_bytes(card, run) / 2**20:.1f} MiB")
    if run.tp_size > 1:
        factors = fa_imbalances(card, run)
        other = "queries" if run.fa_balance == "heads" else "heads"
        even = fa_imbalances(card, dataclasses.replace(run, fa_balance=other))
        lines.append(
            f"FA work of the busiest tensor-parallel rank over the mean: {sum(factors) / len(factors):.3f}, worst layer"
            f" {max(factors):.3f} (with --fa-balance {other}: {sum(even) / len(even):.3f}, {max(even):.3f})"
        )
    return "\n".join(lines)


SUMMARY = ["stage", "layout", "B tokens", "GiB of the fullest rank", "s a step", "hours", "GPU-hours"]


def summary_row(stage: str, at: Estimate) -> list[str]:
    memory = f"{at.memory.total / GIB:.1f}" + ("" if at.fits else " (too much)")
    return [
        stage,
        layout_name(at.run),
        f"{at.tokens / 1e9:.2f}",
        memory,
        f"{at.step_seconds:.2f}",
        f"{at.hours:.1f}",
        f"{at.gpu_hours:,.0f}",
    ]


def summary(planned: dict[str, Estimate], machine: Machine, price: float | None) -> str:
    """All stages, and their sum."""
    rows = [summary_row(stage, at) for stage, at in planned.items()]
    hours, gpu_hours = (sum(getattr(at, name) for at in planned.values()) for name in ("hours", "gpu_hours"))
    tokens = sum(at.tokens for at in planned.values())
    rows.append(["all", "", f"{tokens / 1e9:.2f}", "", "", f"{hours:.1f}", f"{gpu_hours:,.0f}"])
    cost = f"\n\n{gpu_hours * price:,.0f} at {price:g} a GPU-hour" if price else ""
    return f"\n## All stages, computing at {machine.efficiency:.0%} of the peak\n\n{table(SUMMARY, rows)}{cost}"


def layout_table(stage: str, machine: Machine, found: list[tuple[Changes, Estimate]]) -> str:
    """The fastest layouts of a stage, and their flags."""
    if not found:
        return f"\n## {stage}: no layout of {machine.gpus} GPUs fits"
    rows = [[*summary_row(stage, at)[1:], f"`{as_flags(change)}`"] for change, at in found]
    return (
        f"\n## {stage}: the fastest layouts that fit on {machine.gpus} GPUs\n\n{table([*SUMMARY[1:], 'flags'], rows)}"
    )
