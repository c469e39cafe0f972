# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Run a stage: python -m hydra_mcore.train --stage align|distill|extend --config recipe.yaml [Megatron's flags].

It runs alone or under torchrun. A stage starts from the checkpoint of the stage before it in the run folder. If it has
a checkpoint of its own, it continues from that. Flags on the command line win over the recipe.

examples:
  python -m hydra_mcore.train --stage align --config recipe.yaml
  torchrun --nproc-per-node 8 -m hydra_mcore.train --stage extend --config recipe.yaml --tensor-model-parallel-size 4
  python -m hydra_mcore.train --stage distill --config recipe.yaml --dry-run --world-size 64
  python -m hydra_mcore.train --stage distill --config recipe.yaml --profile
"""

from __future__ import annotations

import argparse
import sys

from hydra_mcore.commands import check_inputs, one_line_errors
from hydra_mcore.config import add_stage_flags
from hydra_mcore.recipe import Recipe, with_dashes
from hydra_mcore.stages import STAGES, check_named


@one_line_errors("train")
def main(argv: list[str] | None = None) -> None:
    """Run one stage, or print the help; exit status 2 with one line for bad input."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or "--help" in argv or "-h" in argv:
        print(__doc__)
        add_stage_flags(
            argparse.ArgumentParser(prog="python -m hydra_mcore.train", usage=argparse.SUPPRESS)
        ).print_help()
        return
    check_folders(argv)
    from hydra_mcore.train.run import run_stage  # Megatron takes seconds to import: not for the help

    run_stage(argv)


def check_folders(argv: list[str]) -> None:
    """Refuse a recipe, a run folder, a teacher or a start that is missing; bad flags are for the whole parser.

    Raises:
        InputError: such a file or folder is missing or not named, or the recipe is broken.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config", nargs="+", default=[])
    for flag in ("--stage", "--run-dir", "--teacher", "--start-from"):
        parser.add_argument(flag)
    parser.add_argument("--dry-run", action="store_true")
    try:
        given, _ = parser.parse_known_args(argv)
    except argparse.ArgumentError:
        return
    if given.stage not in STAGES:
        return
    recipe = with_dashes(Recipe.load(given.config, given.stage).values) if given.config else {}
    check_named(given.stage, given.run_dir or recipe.get("run-dir"), given.teacher or recipe.get("teacher"))
    if not (given.dry_run or recipe.get("dry-run")):
        if STAGES[given.stage].needs_teacher:
            check_inputs(teacher=given.teacher or recipe.get("teacher"))
        check_inputs(start_from=given.start_from or recipe.get("start-from"))


if __name__ == "__main__":
    main()
