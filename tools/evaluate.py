#!/usr/bin/env python3
# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Needle tasks and perplexity for any number of checkpoints, side by side."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hydra_mcore.evaluation.evaluate import Exam, Results

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hydra_mcore.recipe import parse_with_recipe  # light, so that --help is quick

EXAMPLES = """\
How it works: prompts hide values in a long text and ask for one of them (three single-key and two multi-key tasks in
the manner of RULER); an answer counts when greedy decoding would give it exactly. Perplexity is taken on the text
itself. All models get the same prompts, and so must have the same tokenizer. Needles are worded as the first model's
tokenizer/needles.json says, or as RULER words them.

Written to --out: results.json (every number), report.md (tables), accuracy.png (accuracy against length).

examples:
  a teacher and its student, at the teacher's native length and beyond
      python tools/evaluate.py --models teacher=runs/teacher student=runs/a/distill --lengths 512 1024 \\
          --haystack book.txt --out runs/evaluation
  the flags from a recipe's section evaluate, as jobs give them
      python tools/evaluate.py --config examples/qwen3-1.7b/recipe.yaml --skip-existing
  a quick look
      python tools/evaluate.py --models runs/a/align --lengths 512 --prompts 20 --haystack book.txt --out /tmp/look
"""


def parser() -> argparse.ArgumentParser:
    layout = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(prog="evaluate", description=__doc__, epilog=EXAMPLES, formatter_class=layout)
    p.add_argument("--config", nargs="+", metavar="FILE", help="recipe: YAML files whose section evaluate holds these flags")
    p.add_argument("--skip-existing", action="store_true", help="do nothing where --out holds a report already")
    p.add_argument("--models", nargs="+", required=True, metavar="[NAME=]DIR", help="checkpoints, in the order of rows")
    p.add_argument("--lengths", nargs="+", type=int, required=True, metavar="N", help="tokens of a prompt or text window")
    p.add_argument("--prompts", type=int, default=200, metavar="N", help="for each task and length (default 200)")
    p.add_argument(
        "--haystack",
        type=Path,
        required=True,
        metavar="FILE",
        help="UTF-8 text that the models were not trained on, to hide needles in and for perplexity",
    )
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the report, none in it yet")
    p.add_argument(
        "--seed",
        type=int,
        default=1_000_000,
        help="of the prompts, 1000000 or above: smaller ones belong to training and head selection, "
        "and no model is judged on prompts it was made with (default 1000000)",
    )
    return p


def main(argv: list[str] | None = None) -> None:
    args = parse_with_recipe(parser(), "evaluate", argv)
    if args.skip_existing and (args.out / "results.json").exists():
        print(f"{args.out}: holds a report already")
        return
    from hydra_mcore.compat import install

    install()
    from hydra_mcore.model.runtime import one_line_errors

    with one_line_errors("evaluate"):
        evaluate(args)


def evaluate(args: argparse.Namespace) -> None:
    """Check all input, make the exam, let the models take it one after the other, write the report."""
    from hydra_mcore.evaluation.evaluate import Exam
    from hydra_mcore.evaluation.report import check_out_dir, markdown, write_report
    from hydra_mcore.evaluation.scoring import check_seed
    from hydra_mcore.selection.probes import load_format, load_tokenizer, read_haystack

    check_seed(args.seed)
    check_out_dir(args.out)
    folders = named_folders(args.models)
    check_models(folders)
    first = next(iter(folders.values()))
    tokenizer, fmt = load_tokenizer(first), load_format(first)
    exam = Exam.build(tokenizer, fmt, read_haystack(tokenizer, args.haystack), args.lengths, args.prompts, args.seed)
    results = evaluate_all(folders, exam)
    settings = {
        "models": {name: str(folder) for name, folder in folders.items()},
        "lengths": args.lengths,
        "prompts": args.prompts,
        "haystack": str(args.haystack),
        "seed": args.seed,
        "needle": fmt.needle,
        "query": fmt.query,
        "intro": fmt.intro,
    }
    write_report(args.out, results, settings)
    print(markdown(results).split("\n\n")[1])
    print(f"report: {args.out / 'report.md'}")


def named_folders(models: list[str]) -> dict[str, Path]:
    """Checkpoint folders by name, a folder's own name where none is given; raises InputError for a name used twice."""
    from hydra_mcore.heads import InputError

    folders: dict[str, Path] = {}
    for model in models:
        name, named, folder = model.partition("=")
        if not named:
            name, folder = Path(model).resolve().name, model
        if name in folders:
            raise InputError(f"--models: two are named {name!r}; name them apart with NAME=DIR")
        folders[name] = Path(folder)
    return folders


def check_models(folders: dict[str, Path]) -> None:
    """Raise InputError unless all are complete checkpoints with one and the same tokenizer, which knows their words."""
    from hydra_mcore.config import ModelCard
    from hydra_mcore.heads import InputError
    from hydra_mcore.model.build import latest_iteration

    tokenizers = {}
    for name, folder in folders.items():
        ModelCard.load(folder)
        latest_iteration(folder)
        path = folder / "tokenizer" / "tokenizer.json"
        try:
            tokenizers[name] = path.read_bytes()
        except OSError:
            raise InputError(f"{name}: no {path}; copy the Hugging Face tokenizer files there") from None
    first, expected = next(iter(tokenizers.items()))
    for name, content in tokenizers.items():
        if content != expected:
            raise InputError(f"{name}: its tokenizer is not that of {first}; such models need reports of their own")


def evaluate_all(folders: dict[str, Path], exam: Exam) -> dict[str, Results]:
    """Each model's results; one model is in memory at a time."""

    from hydra_mcore.config import ModelCard
    from hydra_mcore.evaluation.evaluate import take_exam
    from hydra_mcore.model.build import load_model
    from hydra_mcore.model.runtime import process_groups

    for name, folder in folders.items():
        exam.check_vocabulary(ModelCard.load(folder), name)
    results = {}
    with process_groups():
        for name, folder in folders.items():
            card, model = load_model(folder)
            results[name] = take_exam(model, card, exam, name)
    return results


if __name__ == "__main__":
    main()
