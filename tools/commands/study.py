# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Run a study or tell what it found, from the flags of ``tools/study.py``."""

from __future__ import annotations

import argparse
import shlex
import sys

from hydra_mcore.commands import sole_writer
from hydra_mcore.errors import InputError
from tools.studies.file import Study
from tools.studies.run import StepFailed, describe, write_recipe
from tools.studies.run import run as run_study
from tools.studies.steps import SHARED, check_recipes, shared_jobs, variant_jobs


def run(args: argparse.Namespace) -> None:
    """The command that was given; raises InputError for what cannot be used."""
    study = Study.load(args.study)
    if args.command == "table":
        return tell(args, study)
    check_recipes(study)
    if args.command == "run" or args.job == SHARED:  # not again for each job of an array
        from tools.studies.check import check_flags  # Megatron's parser takes seconds to import

        check_flags(study)
    if args.command == "steps":
        return print("\n".join(job_lines(study, args.job)))
    names = [variant.name for variant in study.variants]
    if unknown := [name for name in args.only if name not in names]:
        raise InputError(f"--only {unknown[0]}: no such variant; there are {', '.join(names)}")
    if min(args.jobs, args.ranks) < 1:
        raise InputError("--jobs and --ranks count from 1")
    if args.dry_run:
        print(describe(study, args.only))
        if args.gpus:
            from tools.studies.hours import planned  # as slow to import

            print(planned(study, variant_jobs(study, args.only), args.gpu, args.gpus))
        return None
    study.out.mkdir(parents=True, exist_ok=True)
    with sole_writer(study.out / "study"):
        try:
            run_study(study, args.only, args.ranks, args.jobs)
        except StepFailed as failure:
            sys.exit(f"study: {failure}")
    from tools.studies.table import read, tables

    print(tables(read(study)))
    return None


def job_lines(study: Study, which: str) -> list[str]:
    """How each command of a job is launched, and its words, as a shell reads them; the job's recipe is written.

    Raises:
        InputError: there is no such job, or its folder was made with other settings.
    """
    variants = variant_jobs(study)
    if which == SHARED:
        jobs = shared_jobs(study)
    elif which.isdecimal() and int(which) < len(variants):
        jobs = [variants[int(which)]]
    else:
        raise InputError(f"--job {which}: there are {SHARED} and 0 to {len(variants) - 1}")
    lines = []
    for job in jobs:
        write_recipe(job)
        lines += [f"{'ranks' if step.on_ranks else 'alone'} {shlex.join(step.words)}" for step in job.steps()]
    return lines


def tell(args: argparse.Namespace, study: Study) -> None:
    """Print the tables; write the CSV and the figure that were asked for."""
    from tools.studies.figure import write_figure
    from tools.studies.table import read, tables, write_csv  # torch takes seconds to import

    found = read(study)
    print(tables(found))
    if args.csv:
        write_csv(args.csv, found)
    if args.figure:
        write_figure(args.figure, found)
