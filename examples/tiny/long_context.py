# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Far beyond the native length, 512 to 32K tokens: the tiny teacher, the teacher with YaRN, and three kinds of
students.

All students keep 8 of 32 heads and go through all three stages. They differ in which heads: those with the highest
    causal
scores, random ones, or all heads of one layer, as layer-wise hybrids have it. Runs the project's own commands, in half
an hour to an hour on two cores; a run that was stopped goes on with its evaluation.

examples:
  python -m examples.tiny.long_context
  python -m examples.tiny.long_context --out runs/long1 --seed 1
  several seeds as one table and one figure
      python -m examples.tiny.long_context --summary runs/long runs/long1 runs/long2
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from examples.tiny.demo import EVALUATION_SEED, ROOT, Student, door, folder, make_students, train_all, write_data
from hydra_mcore import stages
from hydra_mcore.commands import one_line_errors, sole_writer

STAGES = tuple(stages.STAGES)  # in their order
STUDENTS = (
    Student("selected 3:1", "3:1", "global_c", STAGES),
    Student("random 3:1", "3:1", "global_random", STAGES),
    Student("layer-wise 3:1", "3:1", "hybrid", STAGES),
)
YARN = "teacher=64"  # 32K tokens over the native 512
# Prompts of each task -> lengths: fewer where one takes a minute for all models.
PROMPTS = {20: (512, 1024, 2048, 4096), 6: (8192,), 4: (16384,), 2: (32768,)}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="long_context", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "runs" / "long", metavar="DIR", help="folder of the run (default runs/long)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of data, head selection, random map and prompts (default 0)"
    )
    summary = "print the table of finished runs and write DIR/long_context.png of the first, instead of a run"
    parser.add_argument("--summary", nargs="+", type=Path, metavar="DIR", help=summary)
    return parser.parse_args(argv)


@one_line_errors("long_context")
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
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
        door(out, "evaluate", "tools/evaluate.py", "--models", *models, *asked, *size, "--out", str(out / "evaluation"))
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
    from hydra_mcore.evaluation.report import table
    from hydra_mcore.figures import short

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
    from hydra_mcore import figures

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


if __name__ == "__main__":
    main()
