# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The demo's report: the table, the heat map of heads, the curves of the stages.

example: several runs (seeds) as one table
  python -m examples.tiny.report runs/seed0 runs/seed1 runs/seed2
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from examples.tiny.demo import Student

Curve = tuple[list[int], list[float]]


def write_report(out: Path, students: Sequence[Student], seconds: float) -> None:
    """Write <out>/report.md and the pictures beside it."""
    from examples.tiny.demo import folder

    main = students[0]
    shutil.copy(folder(out, main) / "heads" / "figures" / "heads.png", out / "heads.png")
    shutil.copy(out / "evaluation" / "accuracy.png", out / "accuracy.png")
    curves_figure(
        out / "losses.png",
        {f"{s.name}": {stage: read_losses(folder(out, s) / stage) for stage in s.stages} for s in students},
    )
    table = (out / "evaluation" / "report.md").read_text().partition("\n\n")[2].partition("![")[0]
    text = f"""# HydraHead on the tiny teacher

{table}
Made in {seconds / 60:.1f} minutes. "selected" keeps the heads with the highest causal scores, "random" as many at
random; a student's last stage stands behind its name. 3:1 keeps one head in four as full attention, 15:1 one in
sixteen.

## Which heads carry retrieval

![causal score of every head, kept heads framed](heads.png)

## Accuracy against length

![accuracy against prompt length](accuracy.png)

## Losses of the stages

![loss curves of the stages](losses.png)
"""
    beside = out / "report.md.partial"
    beside.write_text(text)
    beside.replace(out / "report.md")


def read_losses(stage_dir: Path) -> Curve:
    """Steps and losses of a stage, from its TensorBoard files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(stage_dir / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    points = events.Scalars(f"{stage_dir.name} loss")
    return [point.step for point in points], [point.value for point in points]


def curves_figure(path: Path, curves: dict[str, dict[str, Curve]]) -> None:
    """One panel a stage, one line a student."""
    from hydra_mcore import figures

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
                axes.plot(*by_stage[stage], label=name, linewidth=1.4)
        axes.set(title=stage, xlabel="step", ylabel=units[stage])
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8)
    figures.save(figure, path)


def seeds_table(runs: Sequence[Path]) -> str:
    """Markdown: a row for each model and run, then the model's mean over runs; percent, Wilson 95% intervals."""
    from examples.tiny.demo import EVALUATION_SEED

    results = [json.loads((run / "evaluation" / "results.json").read_text())["models"] for run in runs]
    columns = [(entry["group"], entry["length"]) for entry in next(iter(results[0].values()))["groups"]]
    header = ["model", "FA heads", "seed", *(f"{group} @{length}" for group, length in columns)]
    lines = [header, [":--"] + ["--:"] * (len(header) - 1)]
    for model in results[0]:
        entries = [result[model] for result in results]
        heads = f"{entries[0]['num_fa']} of {entries[0]['num_heads']}"
        for entry in entries:
            cells = (
                f"{100 * g['accuracy']:.1f} ({100 * g['interval'][0]:.0f}-{100 * g['interval'][1]:.0f})"
                for g in entry["groups"]
            )
            lines.append([model, heads, str(entry["tasks"][0]["seed"] - EVALUATION_SEED), *cells])
        means = (
            sum(entry["groups"][index]["accuracy"] for entry in entries) / len(entries) for index in range(len(columns))
        )
        lines.append([f"**{model}**", heads, "mean", *(f"**{100 * mean:.1f}**" for mean in means)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run of the demo")
    print(seeds_table(parser.parse_args().runs), end="")


if __name__ == "__main__":
    main()
