# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Models examined side by side, from the settings of an evaluation to its report."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch

from hydra_mcore.errors import InputError
from hydra_mcore.evaluation.evaluate import Exam, Papers, named_tasks, take_exam
from hydra_mcore.evaluation.loading import describe
from hydra_mcore.evaluation.models import ModelFacts
from hydra_mcore.evaluation.records import Contestant, Piece, Records, check_folder
from hydra_mcore.evaluation.report import RESULTS_NAME, check_report, write_report
from hydra_mcore.evaluation.server import is_url
from hydra_mcore.files import is_name, shown
from hydra_mcore.model.precision import chosen_dtype
from hydra_mcore.model.runtime import from_first_rank, process_groups


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """The flags of tools/evaluate.py; its --help says what they mean."""

    models: Sequence[str]
    lengths: Sequence[int]
    out: Path
    yarn: Sequence[str] = ()
    reference: str | None = None
    tasks: Sequence[str] = ("single-key", "multi-key")
    prompts: int = 200
    text: Path | None = None
    repeat_text: bool = False
    no_text_loss: bool = False
    template: str | None = None
    date: date | None = None
    scoring: str | None = None
    cache: Path | None = None
    seed: int = 1_000_000
    skip_existing: bool = False
    dry_run: bool = False
    dtype: str | None = None
    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    context_parallel_size: int = 1


def run_evaluation(args: EvaluationSettings) -> None:
    """Examine the models; raises InputError for what cannot be used."""
    layout = {
        "tp_size": args.tensor_model_parallel_size,
        "pp_size": args.pipeline_model_parallel_size,
        "cp_size": args.context_parallel_size,
    }
    with process_groups(**layout, alone=False):
        evaluate(args)


def evaluate(args: EvaluationSettings) -> None:
    """Check all input, let the models answer what they have not answered yet, write the report; called alike on all
    ranks.
    """
    records = Records(args.out)
    papers = Papers(parse_exam(args, records))
    models = from_first_rank(lambda: check_request(args, records))
    dtype = chosen_dtype(args.dtype or ("bf16" if torch.cuda.is_available() else "float32"))
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


def parse_exam(args: EvaluationSettings, records: Records) -> Exam:
    return Exam(
        tasks=named_tasks(args.tasks),
        lengths=tuple(args.lengths),
        prompts=args.prompts,
        seed=args.seed,
        scoring=args.scoring,
        text=args.text and Path(args.text),
        repeat_text=args.repeat_text,
        template=args.template,
        today=lambda: records.today(args.date),
        text_loss=not args.no_text_loss,
        cache=args.cache or args.out / "prompts",
    )


def check_request(args: EvaluationSettings, records: Records) -> dict[str, ModelFacts]:
    """The models by name; raises InputError for all that can be wrong before prompts are made."""
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
    records.check_wording(list(itertools.chain.from_iterable(asked.values())))
    return {who: [piece for piece in pieces if not records.holds(who, piece)] for who, pieces in asked.items()}


def described(models: Sequence[str], yarn: Sequence[str], longest: int) -> dict[str, ModelFacts]:
    """Facts by name, a folder's own name where none is given; a model with YaRN stands behind the model itself.

    Raises:
        InputError: a name used twice, one model named twice, YaRN for a name that is not there or with no factor.
    """
    found: dict[str, ModelFacts] = {}
    factors = dict(parse_yarn(text) for text in yarn)
    for model in models:
        name, named, folder = model.partition("=")
        if not named:
            if is_url(model):
                raise InputError(f"--models {shown(model)}: give the server's model a name, as in NAME={model}")
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
