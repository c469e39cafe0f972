#!/usr/bin/env python3
# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Compare any number of models by RULER's tasks and by the loss on held-out text, at any length."""

from __future__ import annotations

import argparse
import sys
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import hydra_mcore
from hydra_mcore.commands import check_inputs, one_line_errors
from hydra_mcore.recipe import parse_with_recipe  # light, so that --help is quick
from tools.layout_flags import add_dtype_flag, add_layout_flags

EXAMPLES = """\
How it works: this command makes RULER's prompts, with exactly the lengths asked for. All models of a tokenizer get the
same prompts. If only one text is right, teacher forcing gives the score of greedy decoding. Otherwise the model
decodes. The loss on the text is taken by window length and by position. docs/evaluation.md says what is measured.

Written to --out: report.md (tables), accuracy.png, loss.png, results.json (every number), records/ (every finished
piece), prompts/. A finished piece is never run again. So after a stop the same command continues. To add models,
lengths, tasks or prompts to the report, ask for them.

examples:
  a teacher and its student, at the teacher's native length and beyond
      python tools/evaluate.py --models teacher=runs/teacher student=runs/a/extend --lengths 512 1024 \\
          --text book.txt --out runs/evaluation
  one more row: the teacher with its positions stretched by YaRN, by longest / native length
      python tools/evaluate.py --models teacher=runs/teacher student=runs/a/extend --yarn teacher --lengths 512 1024 \\
          --text book.txt --out runs/evaluation
  all of RULER's synthetic tasks, to 512K tokens, on eight GPUs that share each prompt
      torchrun --nproc-per-node 8 tools/evaluate.py --models student=runs/a/extend --tasks all --prompts 100 \\
          --lengths 4096 8192 16384 32768 65536 131072 262144 524288 --text books.txt \\
          --context-parallel-size 8 --out runs/evaluation
  an export through the server that people use (docs/serving.md)
      python tools/evaluate.py --models served=http://127.0.0.1:8000/v1 --lengths 4096 131072 --text books.txt \\
          --out runs/evaluation
  what that would run, and what is there already
      python tools/evaluate.py --models student=runs/a/extend --lengths 512 --text book.txt \\
          --out runs/evaluation --dry-run
  the flags from a recipe's section evaluate, as jobs give them
      python tools/evaluate.py --config examples/qwen3-1.7b/recipe.yaml --skip-existing
"""


def parser() -> argparse.ArgumentParser:
    layout = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(prog="evaluate", description=__doc__, epilog=EXAMPLES, formatter_class=layout)
    p.add_argument(
        "--config", nargs="+", metavar="FILE", help="recipe: YAML files whose section evaluate holds these flags"
    )
    p.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder for the report; an earlier report in it is extended",
    )
    p.add_argument(
        "--skip-existing", action="store_true", help="do nothing if the report in --out has every piece already"
    )
    p.add_argument(
        "--dry-run", action="store_true", help="make the prompts, say what would be run and what is there, and stop"
    )
    models = p.add_argument_group("models")
    both = "checkpoints, Hugging Face directories or servers (NAME=http://HOST:PORT/v1), in the order of the rows"
    models.add_argument("--models", nargs="+", required=True, metavar="[NAME=]DIR", help=both)
    stretched = (
        "add a row for a model of --models with its positions stretched by YaRN (default factor: longest / native"
        " length, rounded up)"
    )
    models.add_argument("--yarn", nargs="+", default=[], metavar="NAME[=FACTOR]", help=stretched)
    models.add_argument(
        "--reference",
        metavar="NAME",
        help="model whose likeliest tokens the others' are compared with (default: the first row)",
    )
    add_exam_flags(p)
    machine = p.add_argument_group("machine")
    add_dtype_flag(machine)
    add_layout_flags(machine, "the prompts", "each prompt")
    return p


def add_exam_flags(p: argparse.ArgumentParser) -> None:
    exam = p.add_argument_group("what is asked")
    exam.add_argument(
        "--lengths", nargs="+", type=int, required=True, metavar="N", help="tokens of a prompt or a text window"
    )
    groups = (
        "RULER's tasks by name or group: single-key, multi-key, multi-answer, tracking, counting, all (default: the"
        " first two)"
    )
    exam.add_argument("--tasks", nargs="+", default=["single-key", "multi-key"], metavar="NAME", help=groups)
    exam.add_argument(
        "--prompts", type=int, default=200, metavar="N", help="prompts of each task and length (default 200)"
    )
    text = "UTF-8 text that the models were not trained on. Needles are hidden in it, and perplexity is measured on it"
    exam.add_argument("--text", type=Path, metavar="FILE", help=text)
    exam.add_argument("--repeat-text", action="store_true", help="let a prompt repeat the text if that is too short")
    exam.add_argument("--no-text-loss", action="store_true", help="leave out the loss on the text")
    wording = (
        'wording of the prompts: "ruler", "chat" (in the tokenizer\'s chat template) or a JSON file (default: the'
        " model's own, else ruler)"
    )
    exam.add_argument("--template", metavar="NAME", help=wording)
    day = "day that chat templates take for today, as YYYY-MM-DD (default: that of the first run into --out)"
    exam.add_argument("--date", type=date.fromisoformat, metavar="DAY", help=day)
    scoring = "how all tasks are scored (default: teacher-forced where that is exact, else generation)"
    exam.add_argument("--scoring", choices=["teacher-forced", "generation"], help=scoring)
    exam.add_argument(
        "--cache",
        type=Path,
        metavar="DIR",
        help="folder for the prompts; several evaluations may share it (default: OUT/prompts)",
    )
    exam.add_argument(
        "--seed",
        type=int,
        default=1_000_000,
        help=(
            "seed of the prompts, at least 1000000. Smaller seeds belong to training and head selection, because no"
            " model should be judged by prompts that it was made with (default 1000000)"
        ),
    )


@one_line_errors("evaluate")
def main(argv: list[str] | None = None) -> None:
    args = parse_with_recipe(parser(), "evaluate", argv)
    folders = [folder or name for name, _, folder in (model.partition("=") for model in args.models)]
    check_inputs(models=[folder for folder in folders if "://" not in folder], text=args.text)
    flags = vars(args)
    del flags["config"]
    hydra_mcore.evaluate(**flags)


if __name__ == "__main__":
    main()
