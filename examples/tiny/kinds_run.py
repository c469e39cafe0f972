# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Students of every kind of linear heads made, trained and evaluated, from the flags of ``examples/tiny/kinds.py``."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from tqdm import tqdm

from examples.tiny.data_run import write_data
from examples.tiny.students import RECIPE, Student, evaluate, folder, make_and_train, prepare, side_by_side, slug
from examples.tiny.summary import Values, accuracy_lines, means_table, read_accuracies, read_perplexities
from hydra_mcore import figures
from hydra_mcore.commands import sole_writer
from hydra_mcore.errors import InputError
from hydra_mcore.evaluation.report import RESULTS_NAME
from hydra_mcore.figures import short
from hydra_mcore.files import read_json, write_json
from hydra_mcore.kinds import KINDS
from hydra_mcore.recipe import Recipe
from hydra_mcore.ruler.prompts import TASKS
from hydra_mcore.stages import STAGES

# Name, ratio of linear to full-attention heads, strategy. The last layer of four is what layer-wise 3:1 keeps.
CHOICES = (
    ("selected 3:1", "3:1", "global_c"),
    ("random 3:1", "3:1", "global_random"),
    ("layer-wise 3:1", "3:1", "hybrid"),
    ("selected 7:1", "7:1", "global_c"),
    ("random 7:1", "7:1", "global_random"),
)
LENGTHS = (512, 1024, 2048, 4096)
TEACHER = "teacher"
SETTINGS = "study.json"  # what all students of a folder have in common


def run(args: argparse.Namespace) -> None:
    """Make, train and examine what is not there yet, or say what that would be, or sum up.

    Raises:
        InputError: a recipe that cannot be read, a folder of another study, nothing to sum up.
    """
    if args.summary:
        return summarise(args.summary, args.kinds)
    recipes = [RECIPE, args.recipe]
    settings = {"seed": args.seed, "prompts": args.prompts, "stages": budget(recipes)}
    students = [student for student in students_of(args.kinds) if not examined(args.out, slug(student))]
    if args.dry_run:
        return announce(args, settings, students)
    with (
        sole_writer(args.out),
        tqdm(total=4 + len(students), desc=f"kinds, seed {args.seed}", unit="step", position=0) as steps,
    ):
        check_settings(args.out, settings)
        write_data(args.out, args.seed, steps)
        prepare(args.out, args.seed, steps)
        if not examined(args.out, TEACHER):
            examine(args, TEACHER, TEACHER, args.out / TEACHER)  # it makes the prompts of all
        steps.update()
        side_by_side([partial(finish, args, recipes, student) for student in students], steps)
    summarise([args.out], args.kinds)


def students_of(kinds: Sequence[str]) -> list[Student]:
    """Every choice of heads with each kind, in the order of the tables."""
    return [
        Student(f"{KINDS[kind].label} {name}", ratio, strategy, tuple(STAGES), kind)
        for kind, (name, ratio, strategy) in itertools.product(kinds, CHOICES)
    ]


def finish(args: argparse.Namespace, recipes: Sequence[Path], student: Student, position: int) -> None:
    """A student from the choice of its heads to its answers."""
    make_and_train(args.out, student, args.seed, recipes, position)
    examine(args, slug(student), student.name, folder(args.out, student) / student.stages[-1])


def examine(args: argparse.Namespace, place: str, name: str, model: Path) -> None:
    asked = ("--prompts", args.prompts, "--lengths", *LENGTHS)
    evaluate(args.out, f"{place}-evaluate", [f"{name}={model}"], args.seed, evaluation(args.out, place), *asked)


def evaluation(out: Path, place: str) -> Path:
    return out / "evaluation" / place


def examined(out: Path, place: str) -> bool:
    """Whether a model has given all its answers; the file is written last."""
    return (evaluation(out, place) / RESULTS_NAME).exists()


def budget(recipes: Sequence[Path]) -> dict[str, dict[str, int]]:
    """Steps, sequences a step and tokens a sequence of every stage."""
    flags = {stage: Recipe.load(recipes, stage).values for stage in STAGES}
    keys = ("train-iters", "global-batch-size", "seq-length")
    return {stage: {key: values[key] for key in keys} for stage, values in flags.items()}


def check_settings(out: Path, settings: dict[str, object]) -> None:
    """Note what all students of the folder have in common; raises InputError where others were made otherwise."""
    path = out / SETTINGS
    if not path.exists():
        out.mkdir(parents=True, exist_ok=True)
        return write_json(path, settings)
    before = read_json(path)
    if changed := [key for key, value in settings.items() if before.get(key) != value]:
        key = changed[0]
        raise InputError(f"{out}: holds students of other {key} ({before.get(key)}); choose another --out")


# Processor seconds measured on the two cores of docs/results.md: tokens that a student trains on and answers in one,
# and how many pass while its six commands start, its heads are chosen and it reads the held-out text.
TOKENS_PER_S = {"align": 4_000, "distill": 2_900, "extend": 3_000}
ANSWERED_PER_S = 10_000
START_S = 70


def announce(args: argparse.Namespace, settings: dict[str, object], students: Sequence[Student]) -> None:
    """Say how many students are left to make, from how many tokens, and about how long that takes on two cores."""
    trained = {
        stage: steps["train-iters"] * steps["global-batch-size"] * steps["seq-length"]
        for stage, steps in settings["stages"].items()
    }
    asked = [task for task in TASKS.values() if task.group in ("single-key", "multi-key")]
    read = args.prompts * len(asked) * sum(LENGTHS)
    each = START_S + read / ANSWERED_PER_S + sum(tokens / TOKENS_PER_S[stage] for stage, tokens in trained.items())
    there = len(args.kinds) * len(CHOICES) - len(students)
    stages = ", ".join(f"{stage} {tokens:,}" for stage, tokens in trained.items())
    print(f"would make {len(students)} students in {args.out}; {there} are there already")
    said = f"{read:,} of prompts to answer, {len(asked)} tasks at {', '.join(map(short, LENGTHS))}"
    print(f"tokens of each: {stages}; {said}")
    print(f"about {len(students) * each / 60 / 2:.0f} minutes on two cores")


def summarise(runs: Sequence[Path], kinds: Sequence[str]) -> None:
    """Print the tables of all students that gave their answers, and draw them beside the first run.

    Raises:
        InputError: there is none.
    """
    places = [TEACHER, *map(slug, students_of(kinds))]
    there = [evaluation(out, place) for place, out in itertools.product(places, runs) if examined(out, place)]
    if not there:
        raise InputError(f"{', '.join(map(str, runs))}: no model has been evaluated there; run without --summary first")
    accuracies = read_accuracies(there)
    parts = [means_table(group, models) for group, models in accuracies.items()]
    print("\n\n".join([*parts, means_table("perplexity", read_perplexities(there), 1)]))
    figure(runs[0] / "kinds.png", accuracies, kinds)


def figure(path: Path, accuracies: dict[str, Values], kinds: Sequence[str]) -> None:
    """A row of panels a task group, a panel a kind: the teacher, and each choice of heads with that kind."""
    drawn = figures.empty(1 + 4.2 * len(kinds), 7.4)
    panels = drawn.subplots(len(accuracies), len(kinds), sharey=True, squeeze=False)
    for row, (group, models) in zip(panels, accuracies.items(), strict=True):
        for axes, kind in zip(row, kinds, strict=True):
            label = f"{KINDS[kind].label} "
            own = {name.removeprefix(label): model for name, model in models.items() if name.startswith(label)}
            accuracy_lines(axes, {TEACHER: models[TEACHER]} | own)
            axes.set_title(f"{KINDS[kind].label}, {group}")
        row[0].set_ylabel("exact match (%)")
    for axes in panels[-1]:
        axes.set_xlabel("prompt length (tokens)")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figures.legend_below(drawn, dict(zip(labels, handles, strict=True)), 4, fontsize=10)
    figures.save(drawn, path)
