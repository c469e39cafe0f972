# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""tools/benchmark.py step: what is compared is the same work, and the table says what was measured."""

import pytest
import torch

from hydra_mcore.config import ModelShape
from hydra_mcore.model.runtime import process_groups
from tools.benchmark import parser
from tools.benchmarks import measure
from tools.benchmarks.micro_batch import TeacherAndStudent, student_card
from tools.benchmarks.step import REFERENCE, TEACHER, WHOLE, run
from tools.benchmarks.transformers_step import FORWARD, STEP, TransformersTeacher

SHAPE = ModelShape(
    num_layers=2, hidden_size=24, num_heads=4, num_kv_groups=2, head_dim=8, ffn_hidden_size=20, vocab_size=96,
    native_length=64
)  # fmt: skip
SMALL = [
    "--layers",
    "2",
    "--hidden",
    "24",
    "--heads",
    "4",
    "--kv-groups",
    "2",
    "--head-dim",
    "8",
    "--ffn",
    "20",
    "--vocabulary",
    "96",
]


def test_a_row_for_every_stage_and_the_reference_that_adds_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(measure.GEMM_ROWS, "cpu", 64)
    report = run(
        parser().parse_args(
            ["step", "--device", "cpu", "--lengths", "16", "80", "--repeats", "2", "--whole-logits", "16", *SMALL]
        )
    )
    names = ["align", "distill", "extend", TEACHER, WHOLE, REFERENCE]
    assert [(row[0], row[1]) for row in report.rows] == [(name, 16) for name in names] + [
        (name, 80) for name in names if name != WHOLE
    ]
    points = {(point.name, point.length): point for point in report.points}
    for length in (16, 80):
        teacher, student, both = (points[name, length] for name in (TEACHER, "extend", REFERENCE))
        assert both.seconds == (teacher.seconds[0] + student.seconds[0], teacher.seconds[1] + student.seconds[1])
    cells = {(row[0], row[1]): dict(zip(report.columns, row, strict=True)) for row in report.rows}
    assert (
        cells["distill", 80]["predicted"]
        == cells[REFERENCE, 80]["predicted"]
        == cells[REFERENCE, 80]["of reference"]
        == "1.00"
    )
    parts = [float(cells[name, 80]["predicted"]) for name in (TEACHER, "extend")]
    assert abs(sum(parts) - 1) < 0.011 and float(cells["align", 80]["predicted"]) < 1
    assert "1 FA heads a layer" in report.notes and "{" not in report.notes
    assert list(report.limits) == ["align", "distill", "extend", TEACHER]
    distill, student, teacher = (report.limits[name][80] for name in ("distill", "extend", TEACHER))
    assert distill == pytest.approx(student + teacher)


def test_transformers_runs_the_teachers_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(measure.GEMM_ROWS, "cpu", 64)
    words = ["step", "--device", "cpu", "--lengths", "16", "--repeats", "1", "--whole-logits", "0", "--transformers"]
    rows = {row[0]: row for row in run(parser().parse_args([*words, *SMALL])).rows}
    assert rows[FORWARD][6] == rows[TEACHER][6] and 2.5 < float(rows[STEP][6]) / float(rows[FORWARD][6]) < 3.5
    with process_groups():
        pair, other = TeacherAndStudent(student_card(SHAPE, 1)), TransformersTeacher(SHAPE, torch.float32)
        batch = pair.batch(40)
        sizes = [sum(p.numel() for p in model.parameters()) for model in (pair.teacher, other.model)]
        other.step(batch)
    assert sizes[0] == sizes[1] and all(p.grad.any() for p in other.model.parameters())


def test_distill_from_whole_logits_is_the_same_work() -> None:
    with process_groups():
        pair = TeacherAndStudent(student_card(SHAPE, 1))
        batch = pair.batch(40)
        pair.step("distill", batch)
        fused = _taken_gradients(pair)
        pair.distill_whole_logits(batch)
        whole = _taken_gradients(pair)
    assert max(gradient.abs().max() for gradient in whole.values()) > 1e-3
    for name, gradient in whole.items():
        torch.testing.assert_close(fused[name], gradient, rtol=1e-4, atol=1e-5)


def test_align_trains_attention_alone() -> None:
    with process_groups():
        pair = TeacherAndStudent(student_card(SHAPE, 2))
        pair.step("align", pair.batch(16))
        moved = {name for name, gradient in _taken_gradients(pair).items() if gradient.any()}
    assert moved and all("self_attention." in name for name in moved)


def _taken_gradients(pair: TeacherAndStudent) -> dict[str, torch.Tensor]:
    """The gradients of every parameter, which are zero again."""
    found = {name: parameter.grad.clone() for name, parameter in pair.student.named_parameters()}
    for parameter in pair.student.parameters():
        parameter.grad.zero_()
    return found
