# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""How long a study's students train on GPUs, by the formulas of ``tools/plan.py``."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import yaml

from hydra_mcore.costs.machine import Machine
from hydra_mcore.train.arguments import model_flags, recipe_flags
from hydra_mcore.train.recipe_model import model_card
from tools.commands.plan import machine_of
from tools.plan.estimate import estimate
from tools.studies.file import Study
from tools.studies.steps import Job


def planned(study: Study, students: Sequence[Job], gpu: str, gpus: int) -> str:
    """One line for a reader; raises InputError as ``machine_of`` and ``student_hours`` do."""
    machine = machine_of(gpu, gpus)
    hours = [student_hours(study, job, machine) for job in students]
    return (
        f"training on {gpus} {gpu} by the plan: {sum(hours) / len(hours):.1f} hours a student,"
        f" {sum(hours) * gpus:,.0f} GPU hours for {len(hours)} (without scores and evaluation)"
    )


def student_hours(study: Study, job: Job, machine: Machine) -> float:
    """Of all stages of one student.

    Raises:
        InputError: flags that do not fit the model or the number of GPUs; no model can be found.
    """
    found = 0.0
    with tempfile.TemporaryDirectory() as folder:
        laid_over = Path(folder) / "recipe.yaml"
        laid_over.write_text(yaml.safe_dump(job.overlay()))
        config = [str(path) for path in (*study.recipes, laid_over)]
        for stage in study.stages:
            argv = ["--stage", stage, "--config", *config]
            parser, given, options = recipe_flags(argv, with_gpu=True)
            card, _ = model_card(config, options)
            known, _ = model_flags(parser, given, argv, card, machine.gpus)
            found += estimate(card, known, machine).hours
    return found
