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
from hydra_mcore.commands import one_line_errors
from hydra_mcore.recipe import parse_with_recipe  # light, so that --help is quick
from tools.layout_flags import add_dtype_flag, add_layout_flags

EXAMPLES = """\
How it works: RULER's prompts are made here, of exactly the lengths asked for; all models of a tokenizer get the same
ones. Where one text alone is right, teacher forcing scores what greedy decoding would; elsewhere the model decodes.
The loss on the text itself is taken by window length and by position. docs/evaluation.md says what is measured and how.

Written to --out: report.md (tables), accuracy.png, loss.png, results.json (every number), records/ (every finished
piece), prompts/. A piece that is there is not run again: a stopped evaluation goes on when the same command is given,
and more models, lengths, tasks or prompts are added to the report by asking for them.

examples:
  a teacher and its student, at the teacher's native length and beyond
      python tools/evaluate.py --models teacher=runs/teacher student=runs/a/extend --lengths 512 1024 \\
          --haystack book.txt --out runs/evaluation
  one more row: the teacher with its positions stretched by YaRN, by longest / native length
      python tools/evaluate.py --models teacher=runs/teacher student=runs/a/extend --yarn teacher --lengths 512 1024 \\
          --haystack book.txt --out runs/evaluation
  all of RULER's synthetic tasks, to 512K tokens, on eight GPUs that share each prompt
      torchrun --nproc-per-node 8 tools/evaluate.py --models student=runs/a/extend --tasks all --prompts 100 \\
          --lengths 4096 8192 16384 32768 65536 131072 262144 524288 --haystack books.txt \\
          --context-parallel-size 8 --out runs/evaluation
  an export through the server that people use (docs/serving.md)
      python tools/evaluate.py --models served=http://127.0.0.1:8000/v1 --lengths 4096 131072 --haystack books.txt \\
          --out runs/evaluation
  what that would run, and what is there already
      python tools/evaluate.py --models student=runs/a/extend --lengths 512 --haystack book.txt \\
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
        "--out", type=Path, required=True, metavar="DIR", help="folder for the report; an earlier one there is added to"
    )
    p.add_argument(
        "--skip-existing", action="store_true", help="do nothing where the report in --out has every piece already"
    )
    p.add_argument(
        "--dry-run", action="store_true", help="make the prompts, say what would be run and what is there, and stop"
    )
    models = p.add_argument_group("models")
    both = "checkpoints, Hugging Face directories or servers (NAME=http://HOST:PORT/v1), in the order of rows"
    models.add_argument("--models", nargs="+", required=True, metavar="[NAME=]DIR", help=both)
    stretched = (
        "one more row for a model of --models, positions stretched by YaRN (factor: longest / native length,"
        " rounded up)"
    )
    models.add_argument("--yarn", nargs="+", default=[], metavar="NAME[=FACTOR]", help=stretched)
    models.add_argument(
        "--reference", metavar="NAME", help="whose likeliest tokens others are compared with (default: the first row)"
    )
    add_exam_flags(p)
    machine = p.add_argument_group("machine")
    add_dtype_flag(machine)
    add_layout_flags(machine, "the prompts", "each prompt")
    return p


def add_exam_flags(p: argparse.ArgumentParser) -> None:
    exam = p.add_argument_group("what is asked")
    exam.add_argument(
        "--lengths", nargs="+", type=int, required=True, metavar="N", help="tokens of a prompt or text window"
    )
    groups = (
        "RULER's tasks by name or group: single-key, multi-key, multi-answer, tracking, counting, all (default: the"
        " first two)"
    )
    exam.add_argument("--tasks", nargs="+", default=["single-key", "multi-key"], metavar="NAME", help=groups)
    exam.add_argument("--prompts", type=int, default=200, metavar="N", help="for each task and length (default 200)")
    text = "UTF-8 text that the models were not trained on, to hide needles in and for perplexity"
    exam.add_argument("--haystack", type=Path, metavar="FILE", help=text)
    exam.add_argument(
        "--repeat-haystack", action="store_true", help="let prompts repeat a text that is shorter than they are"
    )
    exam.add_argument("--no-text", action="store_true", help="leave out the loss on the haystack")
    wording = (
        'wording of the prompts: "ruler", "chat" (in the tokenizer\'s chat template) or a JSON file (default: the'
        " model's own, else ruler)"
    )
    exam.add_argument("--template", metavar="NAME", help=wording)
    day = "YYYY-MM-DD, the day that chat templates take for today (default: that of the first run into --out)"
    exam.add_argument("--date", type=date.fromisoformat, metavar="DAY", help=day)
    scoring = "of all tasks (default: teacher-forced where that is exact, else generation)"
    exam.add_argument("--scoring", choices=["teacher-forced", "generation"], help=scoring)
    exam.add_argument(
        "--cache",
        type=Path,
        metavar="DIR",
        help="folder for the prompts, shared by any evaluations (default: OUT/prompts)",
    )
    exam.add_argument(
        "--seed",
        type=int,
        default=1_000_000,
        help=(
            "of the prompts, 1000000 or above: smaller ones belong to training and head selection, "
            "and no model is judged on prompts it was made with (default 1000000)"
        ),
    )


@one_line_errors("evaluate")
def main(argv: list[str] | None = None) -> None:
    args = parse_with_recipe(parser(), "evaluate", argv)
    flags = vars(args)
    del flags["config"]
    hydra_mcore.evaluate(**flags)


if __name__ == "__main__":
    main()
