# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Running a study on this machine: what all variants share first, then variants side by side."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from threading import Event

import yaml

from hydra_mcore.commands import python_command
from hydra_mcore.errors import InputError
from hydra_mcore.files import read_json, write_json, write_text
from hydra_mcore.progress import Progress
from hydra_mcore.recipe import Recipe, read_yaml
from hydra_mcore.stages import default_flags
from tools.studies.file import Study
from tools.studies.launch import end_of, environment, run_logged, side_by_side, trained
from tools.studies.steps import Job, Step, shared_jobs, variant_jobs, without_evaluation

DONE = "steps.json"  # in a job's folder: its finished commands, with their seconds


class StepFailed(Exception):
    """A command of the study that ended with an error; the message says where its output is, and shows the end."""


def run(study: Study, only: Sequence[str], ranks: int, jobs: int) -> None:
    """Run what is not finished.

    Raises:
        InputError: a variant whose settings are not those that its folder was made with.
        StepFailed: a command failed; jobs that had begun are finished, no other is begun.
    """
    shared, variants = shared_jobs(study), variant_jobs(study, only)
    for job in (*shared, *variants):
        write_recipe(job)
    total = sum(len(job.steps()) for job in (*shared, *variants))
    with Progress(total=total, desc=study.path.stem, unit="step") as progress:
        for job in shared:
            run_job(job, ranks * jobs, 1, progress, Event())
        side_by_side([partial(run_job, job, ranks, jobs, progress) for job in variants], jobs)


def write_recipe(job: Job) -> None:
    """The job's recipe into its folder; raises InputError where a student there was made by another."""
    over = job.overlay()
    if job.recipe.exists():
        before, now = (without_evaluation(raw) for raw in (read_yaml(job.recipe, "recipe"), over))
        if changed := sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key)):
            fix = "call the variant by another name, or remove the folder"
            raise InputError(f"{job.folder}: was made with another {changed[0]!r}; {fix}")
    job.folder.mkdir(parents=True, exist_ok=True)
    write_text(job.recipe, yaml.safe_dump(over, sort_keys=False))


def run_job(job: Job, ranks: int, beside: int, progress: Progress, stop: Event) -> None:
    """All steps that are not done yet; between two of them, ``stop`` ends the job.

    Args:
        beside: how many jobs share this machine's cores.
    """
    done = finished(job)
    for step in job.steps():
        if stop.is_set():
            return
        if step.name not in done or step.name == "evaluation":  # which may be asked for more, and knows what it has
            progress.set_postfix_str(f"{job.name}: {step.name}")
            start = time.monotonic()
            run_step(job, step, ranks if step.on_ranks else 1, beside)
            if step.name in job.study.stages and not trained(job.folder / step.name, job.recipes):
                raise StepFailed(f"{job.name}: {step.name} was stopped; give the same command to go on")
            done[step.name] = done.get(step.name, 0.0) + round(time.monotonic() - start, 1)
            write_json(job.folder / DONE, done)
        progress.update()


def finished(job: Job) -> dict[str, float]:
    """Seconds of the steps that have ended well."""
    path = job.folder / DONE
    return read_json(path) if path.exists() else {}


def run_step(job: Job, step: Step, ranks: int, beside: int) -> None:
    """One command, its output added to the job's log."""
    words = python_command([*step.words, *batch_size(job, step, ranks)], ranks)
    own = environment(ranks * beside) | {"WANDB_RUN_GROUP": job.study.path.stem}
    log = job.folder / "log.txt"
    if code := run_logged(words, own, log):
        raise StepFailed(f"{job.name}: {step.name} ended with exit status {code}; the end of {log}:\n{end_of(log)}")


def batch_size(job: Job, step: Step, ranks: int) -> tuple[str, ...]:
    """A rank's share of a step's rows, where the recipe leaves it open and no GPU is to be filled."""
    if step.name not in job.study.stages:
        return ()
    values = Recipe.load(job.recipes, step.name).values
    rows, given = values.get("global-batch-size"), values.get("micro-batch-size")
    return ("--micro-batch-size", str(rows // ranks)) if given is None and rows and rows % ranks == 0 else ()


def describe(study: Study, only: Sequence[str]) -> str:
    """What a run would do: its jobs, their steps and tokens; the time, where a student has been made."""
    students = variant_jobs(study, only)
    lines = []
    for job in (*shared_jobs(study), *students):
        left = [step.name for step in job.steps() if step.name not in finished(job)]
        lines.append(f"{job.name}: {', '.join(left) if left else 'finished'}")
    lines.append(f"on a cluster: the shared job, then an array of {len(variant_jobs(study))} (slurm/study.sh)")
    trained = {stage: tokens(study, stage) for stage in study.stages}
    lines.append("tokens of each student: " + ", ".join(f"{stage} {count:,}" for stage, count in trained.items()))
    open_students = [job for job in students if len(finished(job)) < len(job.steps())]
    known = [sum(finished(job).values()) for job in students if job not in open_students]
    if known:
        minutes = sum(known) / len(known) / 60
        rest = len(open_students) * minutes / 60
        lines.append(
            f"a finished student took {minutes:.0f} minutes; {len(open_students)} are left, {rest:.1f} hours one by one"
        )
    return "\n".join(lines)


def tokens(study: Study, stage: str) -> int:
    """The number of tokens that a student sees in a stage, by the recipes; variants may differ."""
    values = default_flags(stage) | Recipe.load(study.recipes, stage).values
    values |= {key: value for key, value in study.over.items() if not isinstance(value, dict)}
    values |= study.over.get(stage, {})
    return values["train-iters"] * values["global-batch-size"] * values["seq-length"]
