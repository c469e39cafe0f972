#!/usr/bin/env python3
# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Choose the heads of a teacher that keep full attention, and show the evidence for the choice."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hydra_mcore.config import ModelCard
    from hydra_mcore.selection.choose import Choice
    from hydra_mcore.selection.score import HeadScores

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hydra_mcore.commands import one_line_errors, sole_writer
from hydra_mcore.recipe import parse_with_recipe  # light, so that --help is quick
from tools.layout_flags import add_layout_flags

EXAMPLES = """\
How it works: pairs of prompts differ in one thing, such as a value hidden in a long text, and ask for it. Both are
run. Then each attention head in turn is given its output of the second run within the first. A head that so pulls the
answer towards the other value carries it: either straight to the answer (a receiver), or to heads that do (a sender).
Heads with a high score should keep full attention; the others become gated-delta heads, which are cheap.

Written to --out:
  head_map.json           for tools/convert.py hybridize
  report.html, figures/   what was measured, how sure it is and what the choice costs: open it in a browser
  scores.json             the effect of every head on every pair; --scores chooses again from it in seconds
A run that was stopped goes on where it was when the same command is given again.

examples:
  keep one head in four, at least one a layer
      python tools/select_heads.py --teacher runs/teacher --out runs/heads --ratio 3:1
  how long would that take?
      python tools/select_heads.py --teacher runs/teacher --out runs/heads --ratio 3:1 --dry-run
  the same scores, a smaller budget (takes seconds)
      python tools/select_heads.py --teacher runs/teacher --out runs/heads16 --ratio 15:1 --strategy global \\
          --scores runs/heads/scores.json
  a large teacher on eight GPUs, in bf16
      torchrun --nproc-per-node 8 tools/select_heads.py --teacher runs/teacher --out runs/heads --bf16 \\
          --tensor-model-parallel-size 4
  the flags from a recipe's section select, as jobs give them
      python tools/select_heads.py --config examples/qwen3-1.7b/recipe.yaml --skip-existing
  a capability of your own: lines of {"clean": ..., "corrupt": ..., "answer": ..., "distractor": ...}
      python tools/select_heads.py --teacher runs/teacher --out runs/heads --probe law=my_pairs.jsonl
  a random map to compare with; no scores needed
      python tools/select_heads.py --teacher runs/teacher --out runs/random --ratio 3:1 \\
          --strategy global_random --seed 1
"""


def parser() -> argparse.ArgumentParser:
    from hydra_mcore.selection.choose import STRATEGIES

    layout = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(prog="select_heads", description=__doc__, epilog=EXAMPLES, formatter_class=layout)
    p.add_argument(
        "--teacher",
        type=Path,
        required=True,
        metavar="DIR",
        help="checkpoint of the pretrained model, from tools/convert.py",
    )
    p.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder for the results; must not hold a head map yet"
    )
    p.add_argument(
        "--config", nargs="+", metavar="FILE", help="recipe: YAML files whose section select holds these flags"
    )
    p.add_argument("--skip-existing", action="store_true", help="do nothing where --out holds a head map already")
    p.add_argument(
        "--seed", type=int, default=0, help="of the prompts and of random strategies, 0 to 999999 (default 0)"
    )
    p.add_argument("--dry-run", action="store_true", help="say what would be run and how long it may take, and stop")
    choice = p.add_argument_group("choice")
    budget = choice.add_mutually_exclusive_group()
    budget.add_argument("--ratio", metavar="GDN:FA", help="gated-delta heads to full-attention heads (default 3:1)")
    budget.add_argument("--budget", type=int, metavar="K", help="number of full-attention heads, instead of a ratio")
    named = "; ".join(f"{name}: {text}" for name, text in STRATEGIES.items())
    choice.add_argument("--strategy", choices=list(STRATEGIES), default="global_c", help=f"{named} (default global_c)")
    groups = (
        "strategy kv_groups: how many key/value groups may stay in the cache (default: the fewest that hold the heads)"
    )
    choice.add_argument("--kv-groups", type=int, metavar="N", help=groups)
    choice.add_argument(
        "--ranks", type=int, metavar="N", help="strategy tp: tensor-parallel ranks that the student will run on"
    )
    choice.add_argument(
        "--every",
        type=int,
        metavar="N",
        help="strategy hybrid: every N-th layer is full attention (instead of a ratio)",
    )
    add_scoring_flags(p)
    return p


def add_scoring_flags(p: argparse.ArgumentParser) -> None:
    from hydra_mcore.selection.capabilities import BUILT_IN
    from hydra_mcore.selection.score import ROLES

    scoring = p.add_argument_group("scores")
    scoring.add_argument(
        "--scores",
        type=Path,
        metavar="FILE",
        help="use the scores.json of an earlier call instead of running the teacher",
    )
    method = (
        "exact: patch every head; attribution: estimate all from one gradient, in a fraction of the time (default"
        " exact)"
    )
    scoring.add_argument("--method", choices=["exact", "attribution"], default="exact", help=method)
    scoring.add_argument(
        "--length", type=int, metavar="N", help="tokens a prompt (default: the teacher's native length, at most 4096)"
    )
    roles = (
        "what a head may score by: both: the larger of its effects as receiver and as sender (the paper's rule);"
        " receiver: its direct effect alone, far quicker; compare both where few heads are kept, see docs/selection.md"
        " (default both)"
    )
    scoring.add_argument("--roles", choices=ROLES, help=roles)
    longer = "score at these lengths too, to see in the report whether the ranking depends on it"
    scoring.add_argument("--also-lengths", type=int, nargs="+", default=[], metavar="N", help=longer)
    scoring.add_argument(
        "--pairs", type=int, default=8, metavar="N", help="pairs of prompts for each sub-probe (default 8)"
    )
    what = f"what heads are scored for: {', '.join(BUILT_IN)} (default: both)"
    scoring.add_argument(
        "--capabilities", nargs="*", choices=list(BUILT_IN), default=list(BUILT_IN), metavar="NAME", help=what
    )
    mine = "a capability of your own and its JSONL file of pairs; may be repeated"
    scoring.add_argument("--probe", action="append", default=[], metavar="NAME=FILE", help=mine)
    weight = "how much a capability counts (default 1 each); may be repeated"
    scoring.add_argument("--weight", action="append", default=[], metavar="NAME=W", help=weight)
    words = "JSON file with the wording of the needles (default: tokenizer/needles.json of the teacher, else RULER's)"
    scoring.add_argument("--format", type=Path, metavar="FILE", help=words)
    text = 'UTF-8 text to hide needles in, or "noise" for repeated sentences (default: the Python language reference)'
    scoring.add_argument("--haystack", metavar="FILE", help=text)
    silent = (
        "prompts a needle task for the knock-out curves, which silence heads by score and see when retrieval breaks; 0:"
        " none (default 8)"
    )
    scoring.add_argument("--knock-out", type=int, default=8, metavar="N", help=silent)
    machine = p.add_argument_group("machine")
    machine.add_argument("--bf16", action="store_true", help="run the teacher in bf16 (default: float32)")
    add_layout_flags(machine, "the pairs")


@one_line_errors("select_heads")
def main(argv: list[str] | None = None) -> None:
    args = parse_with_recipe(parser(), "select", argv)
    if args.skip_existing and (args.out / "head_map.json").exists():
        if os.environ.get("RANK", "0") == "0":
            print(f"{args.out}: holds a head map already")
        return
    from hydra_mcore.compat import install

    install()
    from hydra_mcore.model.runtime import process_groups

    layout = (args.tensor_model_parallel_size, args.pipeline_model_parallel_size)
    with process_groups(*layout, alone=False):
        select(args)


def select(args: argparse.Namespace) -> None:
    """Score the teacher if need be, choose, write."""
    from hydra_mcore.config import ModelCard
    from hydra_mcore.model.runtime import from_first_rank
    from hydra_mcore.selection.choose import SCORED
    from hydra_mcore.selection.probes import check_seed
    from tools.head_scoring import announce, score_teacher

    check_seed(args.seed)
    card = ModelCard.load(args.teacher)
    budget, weights = check_request(args, card), parse_weights(args)
    findings: dict[str, Any] = {"scores": None, "knock_out": None, "by_length": {}}
    if args.scores:
        findings = known_findings(args, card, weights)
    scored = args.strategy in SCORED and not args.scores
    if args.dry_run and scored:
        return announce(args, card)
    if args.dry_run:
        total = card.shape.num_layers * card.shape.num_heads
        print(f"would keep {budget} of {total} heads ({args.strategy}); the teacher is not run")
        return
    with contextlib.ExitStack() as stack:
        from_first_rank(lambda: stack.enter_context(sole_writer(args.out)))
        if scored:
            findings = score_teacher(args, card, weights)
        scores: HeadScores | None = findings["scores"]
        from_first_rank(lambda: write(args, choose(args, card, budget, scores), **findings))


def check_request(args: argparse.Namespace, card: ModelCard) -> int:
    """The number of heads to keep; raises InputError for all that can be wrong before the teacher is run."""
    from hydra_mcore.errors import InputError
    from hydra_mcore.selection.choose import hybrid_budget, parse_ratio

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
    choose(args, card, budget, None)  # a budget that does not fit shows before the scoring
    return budget


def parse_weights(args: argparse.Namespace) -> dict[str, float]:
    from hydra_mcore.errors import InputError

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


def known_findings(args: argparse.Namespace, card: ModelCard, weights: dict[str, float]) -> dict[str, Any]:
    """What an earlier call found: scores, and the curves and scores of other lengths that lie beside them."""
    import dataclasses

    from hydra_mcore.errors import InputError
    from hydra_mcore.selection.score import HeadScores
    from tools.head_scoring import KNOCK_OUT_FILE, load_knock_out

    def load(file: Path) -> HeadScores:
        scores = HeadScores.load(file)
        scores.check_teacher(card)
        if args.roles == "both" and scores.settings.get("roles") == "receiver":
            raise InputError(f"{file}: holds no effects of senders; score the teacher with --roles both")
        return dataclasses.replace(scores, weights=scores.weights | weights, roles=args.roles or scores.roles)

    folder = args.scores.parent
    scores = load(args.scores)
    known = sorted({probe.capability for probe in scores.probes.values()})
    if unknown := sorted(set(weights) - set(known)):
        raise InputError(f"--weight {unknown[0]}: no such capability; scored are {', '.join(known)}")
    lengths = {file.stem.removeprefix("scores_"): file for file in folder.glob("scores_*.json")}
    others = {int(length): load(file) for length, file in lengths.items() if length.isdecimal()}
    return {"scores": scores, "knock_out": load_knock_out(folder / KNOCK_OUT_FILE), "by_length": others}


def choose(args: argparse.Namespace, card: ModelCard, budget: int, scores: HeadScores | None) -> Choice:
    """The head map; without scores, one that only shows that the request can be met."""
    from hydra_mcore.selection.choose import SCORED, choose_heads

    layers, heads = card.shape.num_layers, card.shape.num_heads
    made_by: dict[str, Any] = {"tool": "select_heads", "seed": args.seed}
    for name in ("ratio", "kv_groups", "ranks", "every"):
        if getattr(args, name) is not None:
            made_by[name] = getattr(args, name)
    ranking, table = [(layer, head) for layer in range(layers) for head in range(heads)], None
    if scores is not None:
        ranking, table = scores.ranking(), scores.scores_lh.tolist()
        if args.strategy in SCORED:
            made_by |= {
                "scores": scores.settings,
                "roles": scores.roles,
                "weights": scores.weights,
                "versions": scores.versions,
            }
    elif args.strategy in SCORED:
        table = [[0.0] * heads] * layers
    options = {"kv_budget": args.kv_groups, "tp_size": args.ranks or 1, "every": args.every, "seed": args.seed}
    facts = {"fingerprint": card.fingerprint, "made_by": made_by}
    return choose_heads(args.strategy, card.shape, budget, scores=table, ranking=ranking, **options, **facts)


def write(
    args: argparse.Namespace,
    choice: Choice,
    scores: HeadScores | None,
    knock_out: Any,
    by_length: dict[int, HeadScores],
) -> None:
    """All files, the head map last: a folder without it is not finished."""
    import shutil

    from hydra_mcore.selection.figures import heat_map
    from hydra_mcore.selection.report import write_report
    from tools.head_scoring import save_findings

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
    print(f"KV cache {choice.kv_fraction:.0%} of the teacher's ({choice.kv_groups} key/value groups)", end="")
    print(
        ""
        if scores is None
        else f"; {choice.kept:.0%} of the score kept, {choice.given_up:.1%} given up for the constraint"
    )
    if scores is not None:
        print(f"report: {args.out / 'report.html'}")


if __name__ == "__main__":
    main()
