#!/usr/bin/env python3
# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Memory, time and cost of a recipe, worked out without a GPU, weights or data."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tools.plan_estimate import Machine

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hydra_mcore.commands import one_line_errors
from tools.plan_gpus import GPUS  # facts only, so that --help is quick

STAGES = ("align", "distill", "extend")
EVALUATE = "evaluate"
EXAMPLES = """\
Any flag of Megatron or of hydra_mcore.train may follow; it wins over the recipe, as it does in training. The formulas
and what they leave out: docs/planning.md.

The model is that of run-dir/student or of the teacher's folder, where they exist. Otherwise its shape comes from a
config.json (--hf, or beside the recipe), and its heads from --head-map, or, before they are selected, from an even
spread at --ratio.

examples:
  what does the recipe need on one node?
      python tools/plan.py --config examples/qwen3-1.7b/recipe.yaml --gpus 8
  on eight nodes, at 64K, with a price
      python tools/plan.py --config examples/qwen3-1.7b/recipe.yaml examples/qwen3-1.7b/extend-64k.yaml \\
          --stage extend --gpus 64 --gpu h200-141gb --price 2.5
  another layout
      python tools/plan.py --config recipe.yaml --stage extend --tensor-model-parallel-size 2 --sequence-parallel
  the fastest layouts that fit
      python tools/plan.py --config recipe.yaml --gpus 64 --layouts 5
  the evaluation at each of its lengths; flags are then those of tools/evaluate.py
      python tools/plan.py --config recipe.yaml --stage evaluate --lengths 131072 524288 --context-parallel-size 8
"""


def parser() -> argparse.ArgumentParser:
    layout = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(
        prog="plan", description=__doc__, epilog=EXAMPLES, formatter_class=layout, allow_abbrev=False
    )
    p.add_argument("--config", nargs="+", required=True, metavar="YAML", help="recipe files; a later one wins")
    p.add_argument("--stage", choices=(*STAGES, "all", EVALUATE), default="all", help="default: all three of training")
    p.add_argument("--gpus", type=int, default=8, metavar="N", help="how many (default 8)")
    p.add_argument("--gpu", default="h100-80gb", metavar="NAME", help=f"one of {', '.join(GPUS)} (default h100-80gb)")
    share = "share of the GPU's bf16 peak that computing reaches; communication and bubbles come on top (default 0.35)"
    p.add_argument("--efficiency", type=float, default=0.35, metavar="X", help=share)
    p.add_argument("--price", type=float, metavar="P", help="of one GPU for one hour, in any currency")
    p.add_argument("--hf", type=Path, metavar="DIR", help="folder with the model's config.json")
    p.add_argument("--head-map", type=Path, metavar="FILE", help="heads that tools/select_heads.py chose")
    p.add_argument(
        "--ratio",
        metavar="GDN:FA",
        help="heads to assume instead (default: that of the recipe's select section, else 3:1)",
    )
    p.add_argument(
        "--layouts", type=int, metavar="N", help="list the N fastest layouts that fit, instead of the recipe's own"
    )
    p.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there")
    return p


@one_line_errors("plan")
def main(argv: list[str] | None = None) -> None:
    args, flags = parser().parse_known_args(argv)
    from hydra_mcore.compat import install

    install()
    (run_evaluation if args.stage == EVALUATE else run)(args, ["--config", *args.config, *flags])


def run(args: argparse.Namespace, flags: list[str]) -> None:
    """Plan the stages and print; raises InputError for bad input."""
    from hydra_mcore.files import write_json
    from hydra_mcore.train.arguments import model_flags, recipe_flags
    from tools.plan_estimate import as_flags, as_json, estimate, layouts, mend
    from tools.plan_model import model_card
    from tools.plan_report import layout_table, model_section, stage_section, summary

    machine = machine_of(args)
    planned: dict[str, Any] = {}
    for stage in STAGES if args.stage == "all" else (args.stage,):
        argv = ["--stage", stage, *flags]
        flag_parser, given, options = recipe_flags(argv, with_gpu=True)
        card, source = model_card(args, options)
        known, _ = model_flags(flag_parser, given, argv, card, machine.gpus)
        if not planned:
            print(model_section(card, source, args.config))
        if args.layouts:
            found = layouts(card, known, machine)
            print(layout_table(stage, machine, found[: args.layouts]))
            planned[stage] = [{"flags": as_flags(change)} | as_json(at) for change, at in found[: args.layouts]]
            continue
        at = estimate(card, known, machine)
        change = None if at.fits else mend(card, known, machine)
        print(stage_section(card, at, machine, change))
        planned[stage] = at
    if not args.layouts:
        print(summary(planned, machine, args.price))
        planned = {stage: as_json(at) for stage, at in planned.items()}
    if args.json:
        write_json(args.json, {"gpu": args.gpu, "gpus": args.gpus, "efficiency": args.efficiency, "stages": planned})


def run_evaluation(args: argparse.Namespace, flags: list[str]) -> None:
    """Plan the recipe's evaluation and print; raises InputError for bad input."""
    from hydra_mcore.files import write_json
    from hydra_mcore.train.arguments import recipe_flags
    from tools.plan_evaluation import as_json, evaluation_section, examinations
    from tools.plan_model import model_card
    from tools.plan_report import model_section

    machine = machine_of(args)
    _, _, options = recipe_flags(["--stage", "extend", "--config", *args.config], with_gpu=True)
    card, source = model_card(args, options)
    found = examinations(card, flags, machine)
    print(model_section(card, source, args.config))
    print(evaluation_section(found, machine))
    if args.json:
        settings = {"gpu": args.gpu, "gpus": args.gpus, "efficiency": args.efficiency}
        write_json(args.json, settings | {EVALUATE: [as_json(at) for at in found]})


def machine_of(args: argparse.Namespace) -> Machine:
    from hydra_mcore.errors import InputError
    from tools.plan_estimate import Machine

    if args.gpu not in GPUS:
        raise InputError(f"unknown GPU {args.gpu!r}; choose one of {', '.join(GPUS)}")
    if args.gpus < 1 or not 0 < args.efficiency <= 1 or (args.layouts is not None and args.layouts < 1):
        raise InputError("--gpus and --layouts must be at least 1, --efficiency above 0 and at most 1")
    return Machine(GPUS[args.gpu], args.gpus, args.efficiency)


if __name__ == "__main__":
    main()
