# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Students made, trained and evaluated far beyond the native length, from the flags of
``examples/tiny/long_context.py``.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from tqdm import tqdm

from examples.tiny.data_run import write_data
from examples.tiny.students import RECIPE, Student, evaluate, folder, make_and_train, prepare, side_by_side
from examples.tiny.summary import Values, accuracy_lines, means_table, read_accuracies
from hydra_mcore import figures, stages
from hydra_mcore.commands import sole_writer

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
        accuracies = read_accuracies(run / "evaluation" for run in args.summary)
        summary_figure(args.summary[0] / "long_context.png", accuracies)
        print("\n\n".join(means_table(group, models) for group, models in accuracies.items()))
        return
    with (
        sole_writer(args.out),
        tqdm(total=3 + len(STUDENTS) + len(PROMPTS), desc="long context", unit="step", position=0) as steps,
    ):
        write_data(args.out, args.seed, steps)
        prepare(args.out, args.seed, steps)
        side_by_side([partial(make_and_train, args.out, student, args.seed, [RECIPE]) for student in STUDENTS], steps)
        examine(args.out, args.seed, steps)
    print(f"report: {args.out / 'evaluation' / 'report.md'}")


def examine(out: Path, seed: int, steps: tqdm) -> None:
    """All lengths into one report; pieces that are there already are not run again."""
    models = [
        f"teacher={out / 'teacher'}",
        *(f"{student.name}={folder(out, student) / STAGES[-1]}" for student in STUDENTS),
    ]
    for prompts, lengths in PROMPTS.items():
        steps.set_postfix_str(f"evaluating at {lengths[-1]}")
        asked = ("--yarn", YARN, "--prompts", prompts, "--lengths", *lengths)
        evaluate(out, "evaluate", models, seed, out / "evaluation", *asked)
        steps.update()


def summary_figure(path: Path, accuracies: dict[str, Values]) -> None:
    """A panel a task group: a line through each model's means over runs, a small mark for every run."""
    figure = figures.empty(11, 4.4)
    panels = figure.subplots(1, len(accuracies), sharey=True, squeeze=False)[0]
    for axes, (group, models) in zip(panels, accuracies.items(), strict=True):
        accuracy_lines(axes, models)
        axes.set(xlabel="prompt length (tokens)", title=group)
    panels[0].set_ylabel("exact match (%)")
    handles, labels = panels[0].get_legend_handles_labels()
    figures.legend_below(figure, dict(zip(labels, handles, strict=True)), 3, fontsize=10)
    figures.save(figure, path)
