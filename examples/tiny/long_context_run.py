# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Students made, trained and evaluated far beyond the native length, from the flags of
``examples/tiny/long_context.py``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from examples.tiny.data import write_data
from examples.tiny.students import EVALUATION_SEED, Student, folder, make_students, run_command, train_all
from hydra_mcore import figures, stages
from hydra_mcore.commands import sole_writer
from hydra_mcore.evaluation.report import table
from hydra_mcore.figures import short

STAGES = tuple(stages.STAGES)  # in their order
STUDENTS = (
    Student("selected 3:1", "3:1", "global_c", STAGES),
    Student("random 3:1", "3:1", "global_random", STAGES),
    Student("layer-wise 3:1", "3:1", "hybrid", STAGES),
)
YARN = "teacher=64"  # 32K tokens over the native 512
# Prompts of each task -> lengths: fewer where one takes a minute for all models.
PROMPTS = {20: (512, 1024, 2048, 4096), 6: (8192,), 4: (16384,), 2: (32768,)}


def run(args: argparse.Namespace) -> None:
    if args.summary:
        accuracies = read_accuracies(args.summary)
        summary_figure(args.summary[0] / "long_context.png", accuracies)
        print(summary_table(accuracies))
        return
    with tqdm(total=3 + len(STUDENTS) + len(PROMPTS), desc="long context", unit="step", position=0) as steps:
        if args.out.exists():
            steps.update(3 + len(STUDENTS))
        else:
            with sole_writer(args.out):
                train_students(args.out, args.seed, steps)
        evaluate(args.out, args.seed, steps)
    print(f"report: {args.out / 'evaluation' / 'report.md'}")


def train_students(out: Path, seed: int, steps: tqdm) -> None:
    """In a folder of another name first, so that ``out`` holds trained students or is not there."""
    beside = out.with_name(out.name + ".partial")
    beside.mkdir(parents=True)
    write_data(beside, seed, steps)
    make_students(beside, STUDENTS, seed, steps)
    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(train_all, beside, student, 1, place) for place, student in enumerate(STUDENTS, 1)]:
            done.result()
            steps.update()
    beside.rename(out)


def evaluate(out: Path, seed: int, steps: tqdm) -> None:
    """All lengths into one report; pieces that are there already are not run again."""
    models = [
        f"teacher={out / 'teacher'}",
        *(f"{student.name}={folder(out, student) / STAGES[-1]}" for student in STUDENTS),
    ]
    asked = ("--yarn", YARN, "--haystack", str(out / "held_out.txt"), "--seed", str(EVALUATION_SEED + seed))
    for prompts, lengths in PROMPTS.items():
        steps.set_postfix_str(f"evaluating at {lengths[-1]}")
        size = ("--prompts", str(prompts), "--lengths", *map(str, lengths))
        run_command(
            out, "evaluate", "tools/evaluate.py", "--models", *models, *asked, *size, "--out", str(out / "evaluation")
        )
        steps.update()


Accuracies = dict[str, dict[str, dict[int, list[float]]]]  # task group -> model -> length -> percent of each run


def read_accuracies(runs: Sequence[Path]) -> Accuracies:
    """The scores of finished runs."""
    found: Accuracies = {}
    for run in runs:
        for model, entry in json.loads((run / "evaluation" / "results.json").read_text())["models"].items():
            for score in entry["groups"]:
                by_length = found.setdefault(score["group"], {}).setdefault(model, {})
                by_length.setdefault(score["length"], []).append(100 * score["accuracy"])
    return found


def summary_table(accuracies: Accuracies) -> str:
    """Markdown, one table a task group: mean over runs (each run), in percent."""
    tables = []
    for group, models in accuracies.items():
        lengths = sorted(next(iter(models.values())))
        rows = []
        for model, by_length in models.items():
            runs = (by_length[length] for length in lengths)
            rows.append(
                [model, *(f"{sum(run) / len(run):.0f} ({', '.join(f'{each:.0f}' for each in run)})" for run in runs)]
            )
        tables.append(table([group, *map(short, lengths)], rows))
    return "\n\n".join(tables)


def summary_figure(path: Path, accuracies: Accuracies) -> None:
    """A panel a task group: a line through each model's means over runs, a small mark for every run."""
    figure = figures.empty(11, 4.4)
    panels = figure.subplots(1, len(accuracies), sharey=True, squeeze=False)[0]
    for axes, (group, models) in zip(panels, accuracies.items(), strict=True):
        for index, (model, by_length) in enumerate(models.items()):
            lengths, style = sorted(by_length), figures.style(index)
            places = [length * (1 + 0.03 * (index - (len(models) - 1) / 2)) for length in lengths]
            means = [sum(by_length[length]) / len(by_length[length]) for length in lengths]
            dashes = "--" if "YaRN" in model else "-"
            axes.plot(places, means, label=model, linewidth=1.7, markersize=6, linestyle=dashes, **style)
            for place, length in zip(places, lengths, strict=True):
                axes.plot(
                    [place] * len(by_length[length]), by_length[length], linestyle="", markersize=3, alpha=0.5, **style
                )
        axes.axvline(512, color="#888888", linestyle=":", linewidth=1.2, zorder=0, label="native length (512)")
        figures.length_axis(axes, lengths)
        axes.set(xlabel="prompt length (tokens)", title=group, ylim=(-4, 104))
        figures.plain(axes)
    panels[0].set_ylabel("exact match (%)")
    handles, labels = panels[0].get_legend_handles_labels()
    figures.legend_below(figure, dict(zip(labels, handles, strict=True)), 3, fontsize=10)
    figures.save(figure, path)
