#!/usr/bin/env python3
# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""RULER's tasks and the loss on held-out text for any number of models, side by side, to any length."""

from __future__ import annotations

import argparse
import sys
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hydra_mcore.evaluation.evaluate import Exam
    from hydra_mcore.evaluation.models import ModelFacts
    from hydra_mcore.evaluation.records import Contestant, Piece, Records

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hydra_mcore.commands import one_line_errors
from hydra_mcore.recipe import parse_with_recipe  # light, so that --help is quick
from tools.layout_flags import add_layout_flags

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
    both = "checkpoints or Hugging Face directories, in the order of rows"
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
    machine.add_argument(
        "--dtype", choices=["bf16", "float32"], help="of the parameters (default: bf16 on a GPU, else float32)"
    )
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
    from hydra_mcore.compat import install

    install()
    from hydra_mcore.model.runtime import process_groups

    layout = {
        "tp_size": args.tensor_model_parallel_size,
        "pp_size": args.pipeline_model_parallel_size,
        "cp_size": args.context_parallel_size,
    }
    with process_groups(**layout, alone=False):
        evaluate(args)


def evaluate(args: argparse.Namespace) -> None:
    """Check all input, let the models answer what they have not answered yet, write the report; called alike on all
    ranks.
    """
    import torch

    from hydra_mcore.evaluation.evaluate import Papers, take_exam
    from hydra_mcore.evaluation.records import Records
    from hydra_mcore.evaluation.report import RESULTS_NAME, write_report
    from hydra_mcore.model.runtime import from_first_rank

    records = Records(args.out)
    papers = Papers(parse_exam(args, records))
    models = from_first_rank(lambda: check_request(args, records))
    dtype = args.dtype or ("bf16" if torch.cuda.is_available() else "float32")
    asked = dict(papers.enter(name, facts, dtype) for name, facts in models.items())
    todo = from_first_rank(lambda: missing(records, asked))
    first = torch.distributed.get_rank() == 0
    if args.dry_run:
        if first:
            announce(asked, todo)
        return
    if args.skip_existing and not any(todo.values()) and (args.out / RESULTS_NAME).exists():
        if first:
            print(f"{args.out}: holds a report with every piece already")
        return
    from_first_rank(lambda: records.register(list(asked)))
    take_exam(papers, todo, records)
    report = from_first_rank(lambda: write_report(args.out, args.reference))
    if first:
        print(report)
        print(f"\nreport: {args.out / 'report.md'}")


def parse_exam(args: argparse.Namespace, records: Records) -> Exam:
    from hydra_mcore.evaluation.evaluate import Exam, named_tasks

    return Exam(
        tasks=named_tasks(args.tasks),
        lengths=tuple(args.lengths),
        prompts=args.prompts,
        seed=args.seed,
        scoring=args.scoring,
        haystack=args.haystack,
        repeat_haystack=args.repeat_haystack,
        template=args.template,
        today=lambda: records.today(args.date),
        text=not args.no_text,
        cache=args.cache or args.out / "prompts",
    )


def check_request(args: argparse.Namespace, records: Records) -> dict[str, ModelFacts]:
    """The models by name; raises InputError for all that can be wrong before prompts are made."""
    from hydra_mcore.errors import InputError
    from hydra_mcore.evaluation.records import check_folder
    from hydra_mcore.evaluation.report import check_report

    check_folder(args.out)
    check_report(args.out)
    models = described(args.models, args.yarn, max(args.lengths))
    names = [*models, *(row.contestant.name for row in records.rows())]
    if args.reference is not None and args.reference not in names:
        raise InputError(f"--reference {args.reference}: no such model; there are {', '.join(dict.fromkeys(names))}")
    return models


def missing(records: Records, asked: dict[Contestant, list[Piece]]) -> dict[Contestant, list[Piece]]:
    """What each model has not answered yet; raises InputError where the folder is one of other models or wordings."""
    records.check_names(list(asked))
    records.check_wording([piece for pieces in asked.values() for piece in pieces])
    return {who: [piece for piece in pieces if not records.holds(who, piece)] for who, pieces in asked.items()}


def described(models: list[str], yarn: list[str], longest: int) -> dict[str, ModelFacts]:
    """Facts by name, a folder's own name where none is given; a model with YaRN stands behind the model itself.

    Raises:
        InputError: a name used twice, one model named twice, YaRN for a name that is not there or with no factor.
    """
    from hydra_mcore.errors import InputError
    from hydra_mcore.evaluation.loading import describe
    from hydra_mcore.files import is_name, shown

    found: dict[str, ModelFacts] = {}
    factors = dict(parse_yarn(text) for text in yarn)
    for model in models:
        name, named, folder = model.partition("=")
        if not named:
            name, folder = Path(model).resolve().name, model
        if not is_name(name):
            raise InputError(f"--models {shown(model)}: a name is one short line; give another with NAME=DIR")
        if name in found:
            raise InputError(f"--models: two are named {name!r}; name them apart with NAME=DIR")
        found[name] = describe(folder)
        if name in factors:
            factor = factors.pop(name) or float(-(-longest // found[name].native_length))
            if not factor > 1:
                raise InputError(
                    f"--yarn {name}: factor {factor:g} stretches nothing; the longest prompt has {longest} tokens"
                )
            found[f"{name} + YaRN x{factor:g}"] = describe(folder, factor)
    if factors:
        raise InputError(f"--yarn {next(iter(factors))}: no such name in --models; there are {', '.join(found)}")
    by_fingerprint: dict[str, str] = {}
    for name, facts in found.items():
        if (other := by_fingerprint.setdefault(facts.fingerprint, name)) != name:
            raise InputError(f"--models: {other!r} and {name!r} are one and the same model; leave one out")
    return found


def parse_yarn(text: str) -> tuple[str, float | None]:
    """The name and the factor, None where it is left open, of ``NAME[=FACTOR]``."""
    from hydra_mcore.errors import InputError

    name, given, factor = text.partition("=")
    try:
        return name, float(factor) if given else None
    except ValueError:
        raise InputError(f"--yarn {text}: the factor is no number; write NAME or NAME=4") from None


def announce(asked: dict[Contestant, list[Piece]], todo: dict[Contestant, list[Piece]]) -> None:
    """A line for each model, and the sum."""
    tokens = {who: sum(piece.count * piece.length for piece in pieces) for who, pieces in todo.items()}
    for who, pieces in asked.items():
        print(
            f"{who.name}: {len(todo[who])} of {len(pieces)} pieces to run, {tokens[who]:,} tokens to read ({who.dtype})"
        )
    there = sum(len(pieces) - len(todo[who]) for who, pieces in asked.items())
    print(f"would read {sum(tokens.values()):,} tokens; {there} pieces are there already")


if __name__ == "__main__":
    main()
