# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The choice of heads and its evidence, from the flags of ``tools/select_heads.py``."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import shutil
from pathlib import Path
from typing import Any

from hydra_mcore.commands import sole_writer
from hydra_mcore.config import ModelCard
from hydra_mcore.errors import InputError
from hydra_mcore.kinds import KINDS
from hydra_mcore.model.imitation import READS
from hydra_mcore.model.runtime import from_first_rank, process_groups
from hydra_mcore.selection.choose import SCORED, Choice, hybrid_budget, linear_words, parse_ratio
from hydra_mcore.selection.figures import heat_map
from hydra_mcore.selection.head_choice import chosen_heads
from hydra_mcore.selection.head_scoring import (
    KNOCK_OUT_FILE,
    announce,
    load_knock_out,
    save_findings,
    score_teacher,
)
from hydra_mcore.selection.probes import check_seed
from hydra_mcore.selection.report import write_report
from hydra_mcore.selection.score import HeadScores


def run(args: argparse.Namespace) -> None:
    """Score the teacher if need be, choose, write; raises InputError for what cannot be used."""
    layout = (args.tensor_model_parallel_size, args.pipeline_model_parallel_size)
    with process_groups(*layout, alone=False):
        select(args)


def select(args: argparse.Namespace) -> None:
    """Score the teacher if need be, choose, write."""
    check_seed(args.seed)
    card = ModelCard.load(args.teacher)
    trial, weights = check_request(args, card), parse_weights(args)
    budget, total = trial.head_map.num_fa, card.shape.num_layers * card.shape.num_heads
    findings: dict[str, Any] = {"scores": None, "knock_out": None, "by_length": {}}
    if args.scores:
        findings = known_findings(args, card, weights, trial)
    scored = args.strategy in SCORED and not args.scores
    if args.dry_run:
        if scored:
            announce(args, card, imitators(args, trial))
        said = f"would keep {budget} of {total} heads ({args.strategy}), the others become {linear_words(trial.linear)}"
        return from_first_rank(lambda: print(said if scored else f"{said}; the teacher is not run"))
    with contextlib.ExitStack() as stack:
        from_first_rank(lambda: stack.enter_context(sole_writer(args.out)))
        if scored:
            findings = score_teacher(args, card, weights, imitators(args, trial), trial.linear)
        scores: HeadScores | None = findings["scores"]
        from_first_rank(
            lambda: write(args, chosen_heads(args, card.shape, card.fingerprint, budget, scores), **findings)
        )


def check_request(args: argparse.Namespace, card: ModelCard) -> Choice:
    """The choice without scores: its budget and kinds are right, its heads are not.

    Raises:
        InputError: all that can be wrong before the teacher is run.
    """
    total = card.shape.num_layers * card.shape.num_heads
    if card.head_map.num_fa != total:
        kept = f"only {card.head_map.num_fa} of {total} heads are full attention"
        raise InputError(f"{args.teacher}: {kept}; give the teacher, not a student")
    if (args.out / "head_map.json").exists():
        raise InputError(f"{args.out}: already holds a head_map.json; choose another folder or remove it")
    for flag, strategy in (("kv_groups", "kv_groups"), ("ranks", "tp"), ("every", "hybrid")):
        if getattr(args, flag) is not None and args.strategy != strategy:
            raise InputError(f"--{flag.replace('_', '-')} belongs to --strategy {strategy}, not to {args.strategy}")
    if args.strategy == "tp" and args.ranks is None:
        raise InputError("--strategy tp needs --ranks, the tensor-parallel size that the student will run with")
    if args.budget is not None:
        budget = args.budget
    elif args.every is not None and args.ratio is None:
        budget = hybrid_budget(card.shape, args.every)
    else:
        args.ratio = args.ratio or "3:1"
        budget = parse_ratio(args.ratio, total)
    return chosen_heads(
        args, card.shape, card.fingerprint, budget, None
    )  # a budget that does not fit shows before the scoring


def parse_weights(args: argparse.Namespace) -> dict[str, float]:
    weights = {}
    for text in args.weight:
        name, _, value = text.partition("=")
        try:
            weights[name] = float(value)
        except ValueError:
            weights[name] = -1.0
        if not 0 <= weights[name] < float("inf"):
            raise InputError(f"--weight {text}: write a capability and a number from 0 on, as in retrieval=2")
        known = [*args.capabilities, *(probe.partition("=")[0] for probe in args.probe)]
        if name not in known and not args.scores:
            raise InputError(f"--weight {text}: no such capability; scored are {', '.join(known)}")
    return weights


def imitators(args: argparse.Namespace, trial: Choice) -> list[str]:
    """The kinds that are to imitate heads, in the order of KINDS; raises InputError for one that cannot."""
    wanted = {*args.replaceable_by, *(trial.linear if args.score != "causal" else ())}
    for kind in wanted - READS.keys():
        raise InputError(f"{kind} heads cannot imitate: name {' or '.join(READS)} in --replaceable-by and --linear")
    return [kind for kind in KINDS if kind in wanted]


def known_findings(
    args: argparse.Namespace, card: ModelCard, weights: dict[str, float], trial: Choice
) -> dict[str, Any]:
    """What an earlier call found: scores, and the curves and scores of other lengths that lie beside them."""

    def load(file: Path) -> HeadScores:
        scores = HeadScores.load(file)
        scores.check_teacher(card)
        if args.roles == "both" and scores.settings.get("roles") == "receiver":
            raise InputError(f"{file}: holds no effects of senders; score the teacher with --roles both")
        return dataclasses.replace(
            scores,
            weights=scores.weights | weights,
            roles=args.roles or scores.roles,
            score=args.score,
            become=trial.linear,
        )

    folder = args.scores.parent
    scores = load(args.scores)
    known = sorted({probe.capability for probe in scores.probes.values()})
    if unknown := sorted(set(weights) - set(known)):
        raise InputError(f"--weight {unknown[0]}: no such capability; scored are {', '.join(known)}")
    lengths = {file.stem.removeprefix("scores_"): file for file in folder.glob("scores_*.json")}
    others = {int(length): load(file) for length, file in lengths.items() if length.isdecimal()}
    return {"scores": scores, "knock_out": load_knock_out(folder / KNOCK_OUT_FILE), "by_length": others}


def write(
    args: argparse.Namespace,
    choice: Choice,
    scores: HeadScores | None,
    knock_out: Any,
    by_length: dict[int, HeadScores],
) -> None:
    """All files, the head map last: a folder without it is not finished."""
    (args.out / "figures").mkdir(parents=True, exist_ok=True)
    head_map, name = choice.head_map, args.teacher.resolve().name
    if scores is None:
        heat_map(args.out / "figures" / "heads.png", head_map, None, name)
    else:
        save_findings(args.out, scores, knock_out, by_length)
        write_report(args.out, scores, choice, model_name=name, knock_out=knock_out, by_length=by_length)
    head_map.save(args.out / "head_map.json")
    shutil.rmtree(args.out / "unfinished", ignore_errors=True)
    by_layer = " ".join(str(len(layer["fa"])) for layer in head_map.layers)
    total = head_map.num_layers * head_map.num_heads
    print(f"{args.out / 'head_map.json'}: {head_map.num_fa} of {total} heads keep full attention, by layer: {by_layer}")
    print(f"the others become {linear_words(choice.linear)}")
    print(f"KV cache {choice.kv_fraction:.0%} of the teacher's ({choice.kv_groups} key/value groups)", end="")
    print(
        ""
        if scores is None
        else f"; {choice.kept:.0%} of the score kept, {choice.given_up:.1%} given up for the constraint"
    )
    if scores is not None:
        print(f"report: {args.out / 'report.html'}")
