# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Write the demo's report: the table, the heat map of heads, the curves of the stages."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from examples.tiny.students import Student, folder
from hydra_mcore import figures
from hydra_mcore.files import replacing, write_text

Curve = tuple[list[int], list[float]]


def write_report(out: Path, students: Sequence[Student], seconds: float) -> None:
    """Write <out>/report.md and the pictures beside it."""
    main = students[0]
    for picture in (folder(out, main) / "heads" / "figures" / "heads.png", out / "evaluation" / "accuracy.png"):
        with replacing(out / picture.name) as beside:
            shutil.copy(picture, beside)
    curves_figure(
        out / "losses.png",
        {f"{s.name}": {stage: read_losses(folder(out, s) / stage) for stage in s.stages} for s in students},
    )
    table = (out / "evaluation" / "report.md").read_text().partition("\n\n")[2].partition("![")[0]
    text = f"""# HydraHead on the tiny teacher

{table}
Made in {seconds / 60:.1f} minutes. "selected" keeps the heads with the highest causal scores, "random" as many at
random; a student's last stage stands behind its name. 3:1 keeps one head in four as full attention.

## Which heads carry retrieval

![causal score of every head, kept heads framed](heads.png)

## Accuracy against length

![accuracy against prompt length](accuracy.png)

## Losses of the stages

![loss curves of the stages](losses.png)
"""
    write_text(out / "report.md", text)


def read_losses(stage_dir: Path) -> Curve:
    """Steps and losses of a stage, from its TensorBoard files."""
    # Megatron's import shows the INFO records of every library; at the end of a folder TensorBoard writes one.
    logging.getLogger("tensorboard").setLevel(logging.WARNING)
    events = EventAccumulator(str(stage_dir / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    points = events.Scalars(f"{stage_dir.name} loss")
    return [point.step for point in points], [point.value for point in points]


def curves_figure(path: Path, curves: dict[str, dict[str, Curve]]) -> None:
    """One panel a stage, one line a student."""
    stages = ("align", "distill", "extend")
    figure = figures.empty(12, 3.6)
    units = {
        "align": "sum of relative errors of the layers",
        "distill": "KL + 0.1 CE (nats a token)",
        "extend": "cross-entropy (nats a token)",
    }
    for axes, stage in zip(figure.subplots(1, len(stages)), stages, strict=True):
        for name, by_stage in curves.items():
            if stage in by_stage:
                figures.training_curve(axes, *by_stage[stage], label=name)
        axes.set(title=stage, xlabel="step", ylabel=units[stage])
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8)
    figures.save(figure, path)
