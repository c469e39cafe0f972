# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The plan of a recipe, from the flags of ``tools/plan.py``."""

from __future__ import annotations

import argparse
from typing import Any

from hydra_mcore.costs.machine import EFFICIENCY, GPUS, Machine
from hydra_mcore.errors import InputError
from hydra_mcore.files import write_json
from hydra_mcore.stages import STAGES
from hydra_mcore.train.arguments import model_flags, recipe_flags
from hydra_mcore.train.recipe_model import model_card
from tools.plan import evaluation
from tools.plan.__main__ import EVALUATE
from tools.plan.estimate import as_json, estimate
from tools.plan.layouts import as_flags, layouts, smallest_change
from tools.plan.report import imitation_line, layout_table, model_section, stage_section, summary

OUT_OF_RANGE = "--gpus and --layouts must be at least 1, --efficiency above 0 and at most 1"


def run(args: argparse.Namespace, flags: list[str]) -> None:
    """Plan the stages, or the evaluation, and print; raises InputError for bad input."""
    (plan_evaluation if args.stage == EVALUATE else plan_stages)(args, flags)


def plan_stages(args: argparse.Namespace, flags: list[str]) -> None:
    """Plan the stages and print; raises InputError for bad input."""
    machine = machine_of(args.gpu, args.gpus, args.efficiency)
    if args.layouts is not None and args.layouts < 1:
        raise InputError(OUT_OF_RANGE)
    planned: dict[str, Any] = {}
    for stage in STAGES if args.stage == "all" else (args.stage,):
        argv = ["--stage", stage, *flags]
        flag_parser, given, options = recipe_flags(argv, with_gpu=True)
        card, source = model_card(args.config, options, args.hf, args.head_map, args.ratio)
        known, _ = model_flags(flag_parser, given, argv, card, machine.gpus)
        if not planned:
            print(model_section(card, source, args.config))
            print(f"\n{imitation_line(card, machine)}")
        if args.layouts:
            found = layouts(card, known, machine)
            print(layout_table(stage, machine, found[: args.layouts]))
            planned[stage] = [{"flags": as_flags(change)} | as_json(at) for change, at in found[: args.layouts]]
            continue
        at = estimate(card, known, machine)
        change = None if at.fits else smallest_change(card, known, machine)
        print(stage_section(card, at, machine, change))
        planned[stage] = at
    if not args.layouts:
        print(summary(planned, machine, args.price))
        planned = {stage: as_json(at) for stage, at in planned.items()}
    if args.json:
        write_json(args.json, {"gpu": args.gpu, "gpus": args.gpus, "efficiency": args.efficiency, "stages": planned})


def plan_evaluation(args: argparse.Namespace, flags: list[str]) -> None:
    """Plan the recipe's evaluation and print; raises InputError for bad input."""
    machine = machine_of(args.gpu, args.gpus, args.efficiency)
    _, _, options = recipe_flags(["--stage", "extend", "--config", *args.config], with_gpu=True)
    card, source = model_card(args.config, options, args.hf, args.head_map, args.ratio)
    found = evaluation.examinations(card, flags, machine)
    print(model_section(card, source, args.config))
    print(evaluation.evaluation_section(found, machine))
    if args.json:
        settings = {"gpu": args.gpu, "gpus": args.gpus, "efficiency": args.efficiency}
        write_json(args.json, settings | {EVALUATE: [evaluation.as_json(at) for at in found]})


def machine_of(gpu: str, gpus: int, efficiency: float = EFFICIENCY) -> Machine:
    """So many GPUs of a name; raises InputError where there is no such machine."""
    if gpu not in GPUS:
        raise InputError(f"unknown GPU {gpu!r}; choose one of {', '.join(GPUS)}")
    if gpus < 1 or not 0 < efficiency <= 1:
        raise InputError(OUT_OF_RANGE)
    return Machine(GPUS[gpu], gpus, efficiency)
