# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Run a stage: python -m hydra_mcore.train --stage align|distill|extend --config recipe.yaml [Megatron's flags].

It runs alone or under torchrun. A stage starts from the checkpoint of the stage before it in the run folder. If it has
a checkpoint of its own, it continues from that. Flags on the command line win over the recipe.

examples:
  python -m hydra_mcore.train --stage align --config examples/tiny/recipe.yaml
  torchrun --nproc-per-node 8 -m hydra_mcore.train --stage extend --config recipe.yaml --tensor-model-parallel-size 4
  python -m hydra_mcore.train --stage distill --config recipe.yaml --dry-run --world-size 64
  python -m hydra_mcore.train --stage distill --config recipe.yaml --profile
"""

from __future__ import annotations

import argparse
import sys

from hydra_mcore.commands import one_line_errors
from hydra_mcore.config import add_stage_flags


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
    from hydra_mcore.train.run import run_stage  # Megatron takes seconds to import: not for the help

    run_stage(argv)


if __name__ == "__main__":
    main()
