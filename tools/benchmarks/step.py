# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Measure seconds and peak memory of one micro-batch of align, distill and extend.

Beside them stand the teacher's forward pass and the student's step, which distill cannot do without.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from collections.abc import Callable, Iterator
from functools import partial

from hydra_mcore.config import ModelCard, teacher_card
from hydra_mcore.costs.flops import model_flops, step_flops
from hydra_mcore.model.precision import DTYPES
from hydra_mcore.model.runtime import process_groups
from hydra_mcore.stages import STAGES
from tools.benchmarks.measure import Point, chosen_machine, gemm_speed, measured
from tools.benchmarks.micro_batch import TeacherAndStudent, student_card
from tools.benchmarks.profile_table import parts_report
from tools.benchmarks.report import Report
from tools.benchmarks.shapes import QWEN3, SMALL, STEP_SIZES
from tools.benchmarks.transformers_step import FORWARD, STEP, TransformersTeacher

SHAPES = {"cpu": SMALL, "cuda": QWEN3}
LENGTHS = {"cpu": [512, 2048, 8192], "cuda": [2048, 8192, 32_768]}
TEACHER, REFERENCE, WHOLE = "teacher forward", "teacher forward + student step", "distill, whole logits"
COLUMNS = (
    "one micro-batch",
    "tokens",
    "s (least..most)",
    "limit, s",
    "tokens/s",
    "of reference",
    "predicted",
    "peak MiB",
)
NOTES = (
    "One row of random tokens, forward and backward, {dtype} on {device}: {shape}, {fa_heads} FA heads a layer. Median"
    " (least..most) of {repeats}, all in turn. Reference: the teacher's forward pass with its logits and the student's"
    " own step (extend), added up round by round. Limit and predicted: by counting operations, elementwise ones left"
    " out, at the speed of large matrix products ({speed:.0f} GFLOP/s). The optimizer is left out, as its step comes"
    " once for many micro-batches. Peak: beyond weights and gradients. Goals: distill at most 1.20 of the reference,"
    " align not above distill."
)


def run(args: argparse.Namespace) -> Report:
    """Every stage and its reference at every length.

    Raises:
        InputError: no such device, or more FA heads than heads.
    """
    device, dtype = chosen_machine(args)
    shape = dataclasses.replace(
        SHAPES[device], **{field: getattr(args, name) for name, field in STEP_SIZES.items() if getattr(args, name)}
    )
    fa_heads = shape.num_heads // 4 if args.fa_heads is None else args.fa_heads
    card = student_card(shape, fa_heads)
    points, rows, speed = [], [], gemm_speed(device, dtype)
    with process_groups():
        pair = TeacherAndStudent(card, DTYPES[dtype])
        other = TransformersTeacher(shape, DTYPES[dtype]) if args.transformers else None
        for length in sorted(args.lengths or LENGTHS[device]):
            found = _with_reference(
                measured(_contestants(pair, other, length, args.whole_logits), length, args.repeats, device)
            )
            points += found
            rows += _rows(card, found, speed)
        parts = _parts(pair, length) if args.profile else []
    sizes = (
        f"{shape.num_layers} layers of width {shape.hidden_size}, {shape.num_heads} heads x {shape.head_dim},"
        f" {shape.vocab_size} words"
    )
    notes = NOTES.format(
        dtype=dtype, device=device, shape=sizes, fa_heads=fa_heads, repeats=args.repeats, speed=speed / 1e9
    )
    limits = {
        name: {p.length: _operations(card, name, p.length) / speed for p in points if p.name == name}
        for name in (*STAGES, TEACHER)
    }
    return Report("A training step", notes, COLUMNS, rows, points, limits, more=parts)


def _parts(pair: TeacherAndStudent, length: int) -> list[Report]:
    batch = pair.batch(length)
    return [
        parts_report(stage, length, partial(pair.step, stage, batch), [pair.student], [pair.teacher])
        for stage in STAGES
    ]


def _contestants(
    pair: TeacherAndStudent, other: TransformersTeacher | None, length: int, whole_logits: int
) -> dict[str, Callable[[], None]]:
    batch = pair.batch(length)
    calls = {stage: partial(pair.step, stage, batch) for stage in STAGES} | {
        TEACHER: partial(pair.teacher_forward, batch)
    }
    if other is not None:
        calls |= {FORWARD: partial(other.forward, batch), STEP: partial(other.step, batch)}
    return calls | ({WHOLE: partial(pair.distill_whole_logits, batch)} if length <= whole_logits else {})


def _with_reference(found: list[Point]) -> list[Point]:
    """The points, and the two that make the reference added up round by round."""
    by_name = {point.name: point for point in found}
    teacher, student = by_name[TEACHER], by_name["extend"]
    seconds = tuple(map(sum, zip(teacher.seconds, student.seconds, strict=True)))
    return [*found, Point(REFERENCE, student.length, seconds, max(teacher.peak_bytes, student.peak_bytes))]


def _rows(card: ModelCard, found: list[Point], speed: float) -> Iterator[list[str]]:
    reference = found[-1]
    for point in found:
        ratio = statistics.median(mine / theirs for mine, theirs in zip(point.seconds, reference.seconds, strict=True))
        counted = _operations(card, point.name, point.length)
        predicted = counted / _operations(card, REFERENCE, point.length)
        times = [point.spread, f"{counted / speed:.3g}", f"{point.length / point.median:.0f}"]
        yield [point.name, point.length, *times, f"{ratio:.2f}", f"{predicted:.2f}", f"{point.peak_bytes / 2**20:.0f}"]


def _operations(card: ModelCard, name: str, length: int) -> float:
    if name in (TEACHER, FORWARD, STEP):
        flops = model_flops(teacher_card(card.shape, ""), length)
        return (flops.total if name == STEP else flops.forward) * length
    return step_flops(
        card, name if name in STAGES else "distill", length, 1
    )  # the reference counts what distill counts
