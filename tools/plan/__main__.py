# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Compute a recipe's memory, time and cost, without a GPU, weights or data."""

from __future__ import annotations

import argparse
from pathlib import Path

from hydra_mcore.commands import check_inputs, one_line_errors
from hydra_mcore.costs.machine import EFFICIENCY, GPUS  # facts only, so that --help is quick
from hydra_mcore.stages import STAGES

EVALUATE = "evaluate"
EXAMPLES = """\
You may add any flag of Megatron or of hydra_mcore.train. It wins over the recipe, as it does in training.
docs/planning.md has the formulas, and says what they leave out.

The model is that of run-dir/student or of the teacher's folder, if they exist. Otherwise its shape comes from a
config.json (--hf, or beside the recipe), and its heads come from --head-map. Before heads are selected, the plan
spreads them evenly at --ratio.

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
    stages = "what to plan: a stage, all three stages, or the evaluation (default: all)"
    p.add_argument("--stage", choices=(*STAGES, "all", EVALUATE), default="all", help=stages)
    p.add_argument("--gpus", type=int, default=8, metavar="N", help="number of GPUs (default 8)")
    kinds = f"kind of GPU: {', '.join(GPUS)} (default h100-80gb)"
    p.add_argument("--gpu", default="h100-80gb", metavar="NAME", help=kinds)
    share = (
        "share of the GPU's bf16 peak that computing reaches. The plan adds communication and bubbles"
        f" (default {EFFICIENCY})"
    )
    p.add_argument("--efficiency", type=float, default=EFFICIENCY, metavar="X", help=share)
    p.add_argument("--price", type=float, metavar="P", help="price of one GPU for one hour, in any currency")
    p.add_argument("--hf", type=Path, metavar="DIR", help="folder with the model's config.json")
    p.add_argument("--head-map", type=Path, metavar="FILE", help="head map that tools/select_heads.py wrote")
    p.add_argument(
        "--ratio",
        metavar="LINEAR:FA",
        help="ratio to assume without a head map (default: that of the recipe's section select, else 3:1)",
    )
    p.add_argument(
        "--layouts", type=int, metavar="N", help="list the N fastest layouts that fit, instead of the recipe's own"
    )
    p.add_argument("--json", type=Path, metavar="FILE", help="write all numbers to this file")
    return p


@one_line_errors("plan")
def main(argv: list[str] | None = None) -> None:
    args, flags = parser().parse_known_args(argv)
    check_inputs(recipe=args.config, hf=args.hf, head_map=args.head_map)
    from tools.commands.plan import run  # takes seconds: not for --help

    run(args, ["--config", *args.config, *flags])


if __name__ == "__main__":
    main()
