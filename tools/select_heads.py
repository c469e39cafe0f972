#!/usr/bin/env python3
# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Choose the heads of a teacher that keep full attention."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hydra_mcore.config import ModelCard
    from hydra_mcore.selection.probes import ProbeBatch
    from hydra_mcore.selection.score import HeadScores

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

EXAMPLES = """\
How it works: prompts hide a value in a long text and ask for it. Each is run twice, with the true value and with
another one in its place. A head that, given its output of the second run, pulls the answer towards the other value
carries retrieval: it should keep full attention. The others become gated-delta heads.

Written to --out: scores.json (a score for every head), head_map.json (for tools/convert.py hybridize), heads.png.

examples:
  keep one head in four, at least one a layer
      python tools/select_heads.py --teacher runs/teacher --out runs/heads --ratio 3:1
  the same scores, a smaller budget (takes seconds)
      python tools/select_heads.py --teacher runs/teacher --out runs/heads16 --ratio 15:1 --strategy global \\
          --scores runs/heads/scores.json
  a random map to compare with; no scores needed
      python tools/select_heads.py --teacher runs/teacher --out runs/random --ratio 3:1 --strategy global_random --seed 1
"""


def parser() -> argparse.ArgumentParser:
    from hydra_mcore.selection.choose import STRATEGIES

    layout = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(prog="select_heads", description=__doc__, epilog=EXAMPLES, formatter_class=layout)
    p.add_argument("--teacher", type=Path, required=True, metavar="DIR", help="checkpoint of the pretrained model, from tools/convert.py")
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the three files; must not hold a head map yet")
    budget = p.add_mutually_exclusive_group()
    budget.add_argument("--ratio", default="3:1", metavar="GDN:FA", help="gated-delta heads to full-attention heads (default 3:1)")
    budget.add_argument("--budget", type=int, metavar="K", help="number of full-attention heads, instead of a ratio")
    named = "; ".join(f"{name}: {text}" for name, text in STRATEGIES.items())
    p.add_argument("--strategy", choices=list(STRATEGIES), default="global_c", help=f"{named} (default global_c)")
    p.add_argument("--scores", type=Path, metavar="FILE", help="use the scores.json of an earlier call instead of running the teacher")
    p.add_argument("--seed", type=int, default=0, help="of the prompts and of random strategies, 0 to 999999 (default 0)")
    probe = p.add_argument_group("prompts")
    probe.add_argument("--length", type=int, metavar="N", help="tokens a prompt (default: the teacher's native length, at most 4096)")
    probe.add_argument("--pairs", type=int, default=8, metavar="N", help="prompts for each of the five needle tasks (default 8)")
    words = "wording of the needles (default: tokenizer/needles.json of the teacher, else RULER's)"
    probe.add_argument("--format", type=Path, metavar="FILE", help=words)
    text = "UTF-8 text to hide needles in (default: the Python language reference)"
    probe.add_argument("--haystack", type=Path, metavar="FILE", help=text)
    p.add_argument("--dry-run", action="store_true", help="say what would be run and how long it may take, and stop")
    return p


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    from hydra_mcore.compat import install

    install()
    from hydra_mcore.model.runtime import one_line_errors

    with one_line_errors("select_heads"):
        select(args)


def select(args: argparse.Namespace) -> None:
    """Score the teacher if need be, choose, write."""
    from hydra_mcore.config import ModelCard
    from hydra_mcore.heads import InputError
    from hydra_mcore.selection.choose import SCORED, choose_heads, parse_ratio
    from hydra_mcore.selection.probes import check_seed
    from hydra_mcore.selection.report import heat_map
    from hydra_mcore.selection.score import HeadScores

    check_seed(args.seed)
    card = ModelCard.load(args.teacher)
    total = card.shape.num_layers * card.shape.num_heads
    if card.head_map.num_fa != total:
        kept = f"only {card.head_map.num_fa} of {total} heads are full attention"
        raise InputError(f"{args.teacher}: {kept}; give the teacher, not a student")
    if (args.out / "head_map.json").exists():
        raise InputError(f"{args.out}: already holds a head_map.json; choose another folder or remove it")
    budget = args.budget if args.budget is not None else parse_ratio(args.ratio, total)
    every_head = [(layer, head) for layer in range(card.shape.num_layers) for head in range(card.shape.num_heads)]
    choose_heads(args.strategy, card.shape, budget, ranking=every_head)  # a bad budget shows before the scoring
    scores = None
    if args.scores:
        scores = HeadScores.load(args.scores)
        scores.check_teacher(card)
    elif args.strategy in SCORED:
        batches = prompts(args, card)
        if args.dry_run:
            return announce(card, batches)
        scores = score(args, card, batches)
    if args.dry_run:
        print(f"would keep {budget} of {total} heads ({args.strategy}); the teacher is not run")
        return
    made_by: dict[str, Any] = {"tool": "select_heads", "seed": args.seed}
    if args.budget is None:
        made_by["ratio"] = args.ratio
    if scores is not None and args.strategy in SCORED:
        made_by |= {"scores": scores.settings, "versions": scores.versions}
    ranking = scores.ranking() if scores else ()
    facts = {"fingerprint": card.fingerprint, "made_by": made_by}
    head_map = choose_heads(args.strategy, card.shape, budget, ranking=ranking, seed=args.seed, **facts)
    args.out.mkdir(parents=True, exist_ok=True)
    if scores is not None:
        scores.save(args.out / "scores.json")
    heat_map(args.out / "heads.png", head_map, scores, args.teacher.resolve().name)
    head_map.save(args.out / "head_map.json")
    by_layer = " ".join(str(len(layer.fa)) for layer in head_map.layers)
    print(f"{args.out / 'head_map.json'}: {budget} of {total} heads keep full attention, by layer: {by_layer}")


def prompts(args: argparse.Namespace, card: ModelCard) -> dict[str, list[ProbeBatch]]:
    """The pairs of every needle task; by default as long as the teacher's native length, at most the paper's 4096."""
    from hydra_mcore.selection.needles import TASKS
    from hydra_mcore.selection.probes import load_format, load_tokenizer, probe_batches, read_haystack

    tokenizer = load_tokenizer(args.teacher)
    fmt, haystack_ids = load_format(args.teacher, args.format), read_haystack(tokenizer, args.haystack)
    length = min(card.shape.native_length, 4096) if args.length is None else args.length
    return {task: list(probe_batches(task, fmt, tokenizer, haystack_ids, length, args.pairs, args.seed)) for task in TASKS}


def score(args: argparse.Namespace, card: ModelCard, batches: dict[str, list[ProbeBatch]]) -> HeadScores:
    """Run the teacher over all pairs; says on the console what each sub-probe gave."""
    import hashlib

    from tqdm import tqdm

    from hydra_mcore.model.build import load_model
    from hydra_mcore.model.runtime import process_groups
    from hydra_mcore.selection.patching import DECAY, receiver_effects
    from hydra_mcore.selection.score import CRITICAL, MIN_GAP, HeadScores, ProbeScores

    digest, probes, forwards = hashlib.sha256(), {}, 0
    with process_groups():
        _, model = load_model(args.teacher)
        device, start = next(model.parameters()).device, time.monotonic()
        with tqdm(total=len(batches) * args.pairs, desc="pairs", unit="pair") as bar:
            for task, parts in batches.items():
                results = []
                for part in parts:
                    digest.update(part.clean_bs.numpy().tobytes() + part.corrupt_bs.numpy().tobytes())
                    clean_bs, corrupt_bs, answer_bp, distractor_bp = (
                        ids.to(device) for ids in (part.clean_bs, part.corrupt_bs, part.answer_bp, part.distractor_bp)
                    )
                    results.append(receiver_effects(model, clean_bs, corrupt_bs, part.answer_start, answer_bp, distractor_bp))
                    forwards += 2
                    bar.update(len(clean_bs))
                probes[task] = ProbeScores.from_pairs(results)
    seconds = round(time.monotonic() - start, 1)
    settings = {
        "role": "receiver", "length": parts[0].clean_bs.shape[1], "pairs": args.pairs, "seed": args.seed, "decay": DECAY,
        "critical": CRITICAL, "min_gap": MIN_GAP, "prompts_sha256": digest.hexdigest(), "forwards": forwards, "seconds": seconds,
    }  # fmt: skip
    scores = HeadScores.from_probes(card, probes, settings, library_versions())
    say(scores)
    return scores


def say(scores: HeadScores) -> None:
    """One line a sub-probe, and what the whole took."""
    from hydra_mcore.selection.score import CRITICAL

    for task, probe in scores.probes.items():
        critical = sum(abs(value) >= CRITICAL for row in probe.effects for value in row)
        reasons = ((probe.unsolved, "teacher wrong"), (probe.unmoved, "corruption without effect"))
        out = "".join(f", {count} left out ({why})" for count, why in reasons if count)
        print(f"{task}: {probe.used} of {probe.pairs} pairs{out}; {critical} heads with |effect| >= {CRITICAL}")
    total = scores.num_layers * scores.num_heads
    print(f"{scores.settings['forwards']} forward passes, {scores.settings['seconds']} s, for the exact scores of {total} heads")


def library_versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "megatron-core", "transformers", "numpy")}


def announce(card: ModelCard, batches: dict[str, list[ProbeBatch]]) -> None:
    """The cost of scoring, from operation counts and this machine's matrix-product speed."""
    import torch

    from hydra_mcore.selection.patching import patching_flops

    parts = [part for task in batches.values() for part in task]
    flops = sum(patching_flops(card.shape, part.clean_bs.shape[1], *part.answer_bp.shape) for part in parts)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    square, repeats = torch.randn(1024, 1024, device=device), 8
    float((square @ square).sum())
    start = time.monotonic()
    float(sum((square @ square).sum() for _ in range(repeats)))
    speed = repeats * 2 * 1024**3 / (time.monotonic() - start)
    pairs, length = sum(len(part.clean_bs) for part in parts), parts[0].clean_bs.shape[1]
    print(f"would run {2 * len(parts)} forward passes: {pairs} pairs of {length} tokens, and the MLPs again at the answers")
    print(f"about {flops:.1e} operations; at a third of this machine's matrix speed {3 * flops / speed:.0f} s, loading not counted")


if __name__ == "__main__":
    main()
