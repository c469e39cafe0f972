#!/usr/bin/env python3
# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Choose the heads of a teacher that keep full attention, and show the evidence for the choice."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hydra_mcore.commands import check_inputs, one_line_errors
from hydra_mcore.kinds import DEFAULT_LINEAR, KINDS
from hydra_mcore.recipe import parse_with_recipe  # light, so that --help is quick
from hydra_mcore.selection.capabilities import BUILT_IN
from hydra_mcore.selection.choose import STRATEGIES, linear_kinds
from hydra_mcore.selection.score import ROLES, SCORES
from tools.layout_flags import add_dtype_flag, add_layout_flags

EXAMPLES = """\
How it works: the two prompts of a pair differ in one thing, such as a value hidden in a long text, and ask for it. The
teacher reads both. Then it reads the first prompt again for each attention head, and that head gets its output from the
second prompt. If this pulls the answer towards the other value, the head carries the value. A receiver carries it
straight to the answer, a sender to heads that do. Heads with a high score should keep full attention. The others become
linear heads, which are cheap.

Written to --out:
  head_map.json           the choice, for tools/convert.py hybridize
  report.html, figures/   a page for the browser: what was measured, how sure it is and what the choice costs
  scores.json             the effect of every head on every pair; with --scores, another choice takes seconds
After a stop, the same command continues where it was.

examples:
  keep one head in four, at least one a layer
      python tools/select_heads.py --teacher runs/teacher --out runs/heads --ratio 3:1
  how long would that take?
      python tools/select_heads.py --teacher runs/teacher --out runs/heads --ratio 3:1 --dry-run
  the same scores, a smaller budget (takes seconds)
      python tools/select_heads.py --teacher runs/teacher --out runs/heads16 --ratio 15:1 --strategy global \\
          --scores runs/heads/scores.json
  a large teacher on eight GPUs, in bf16
      torchrun --nproc-per-node 8 tools/select_heads.py --teacher runs/teacher --out runs/heads --dtype bf16 \\
          --tensor-model-parallel-size 4
  the flags from a recipe's section select, as jobs give them
      python tools/select_heads.py --config examples/qwen3-1.7b/recipe.yaml --skip-existing
  a capability of your own: lines of {"clean": ..., "corrupt": ..., "answer": ..., "distractor": ...}
      python tools/select_heads.py --teacher runs/teacher --out runs/heads --probe law=my_pairs.jsonl
  heads that matter and that no linear head can imitate
      python tools/select_heads.py --teacher runs/teacher --out runs/heads --ratio 15:1 --score product
  a random map to compare with; no scores needed
      python tools/select_heads.py --teacher runs/teacher --out runs/random --ratio 3:1 \\
          --strategy global_random --seed 1
"""


def parser() -> argparse.ArgumentParser:
    layout = argparse.RawDescriptionHelpFormatter
    epilog = "\n".join((explained("Strategies", STRATEGIES), explained("Scores", SCORES), EXAMPLES))
    p = argparse.ArgumentParser(prog="select_heads", description=__doc__, epilog=epilog, formatter_class=layout)
    p.add_argument(
        "--teacher",
        type=Path,
        required=True,
        metavar="DIR",
        help="checkpoint of the pretrained model, from tools/convert.py",
    )
    p.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder for the results; it must not hold a head map yet"
    )
    p.add_argument(
        "--config", nargs="+", metavar="FILE", help="recipe: YAML files whose section select holds these flags"
    )
    p.add_argument("--skip-existing", action="store_true", help="do nothing if --out holds a head map already")
    p.add_argument(
        "--seed", type=int, default=0, help="seed of the prompts and of random strategies, 0 to 999999 (default 0)"
    )
    p.add_argument("--dry-run", action="store_true", help="say what would be run and how long it may take, and stop")
    choice = p.add_argument_group("choice")
    budget = choice.add_mutually_exclusive_group()
    budget.add_argument("--ratio", metavar="LINEAR:FA", help="ratio of linear to full-attention heads (default 3:1)")
    budget.add_argument("--budget", type=int, metavar="K", help="number of full-attention heads, instead of a ratio")
    named = "which heads are kept; each strategy is explained below (default global_c)"
    choice.add_argument("--strategy", choices=list(STRATEGIES), default="global_c", help=named)
    choice.add_argument(
        "--score",
        choices=list(SCORES),
        default="causal",
        help="what makes a head good; each score is explained below (default causal)",
    )
    groups = (
        "for strategy kv_groups: the number of key/value groups that may stay in the cache (default: the fewest that"
        " hold the heads)"
    )
    choice.add_argument("--kv-groups", type=int, metavar="N", help=groups)
    choice.add_argument(
        "--ranks", type=int, metavar="N", help="for strategy tp: tensor-parallel ranks that the student will run on"
    )
    choice.add_argument(
        "--every",
        type=int,
        metavar="N",
        help="for strategy hybrid: every N-th layer is full attention (instead of a ratio)",
    )
    kinds, other = "; ".join(f"{name}: {KINDS[name].title}" for name in linear_kinds()), linear_kinds()[-1]
    linear = (
        f"kind of the heads that are not kept: {kinds}. Give one kind for all layers, then exceptions by layer, such as"
        f" {DEFAULT_LINEAR} 0-3={other} (default {DEFAULT_LINEAR})"
    )
    choice.add_argument("--linear", nargs="+", default=[], metavar=("KIND", "LAYERS=KIND"), help=linear)
    add_scoring_flags(p)
    return p


def explained(title: str, meanings: Mapping[str, str]) -> str:
    """A list of a flag's choices with what each means."""
    return f"{title}:\n" + "".join(f"  {name:14} {text}\n" for name, text in meanings.items())


def add_scoring_flags(p: argparse.ArgumentParser) -> None:
    scoring = p.add_argument_group("scores")
    scoring.add_argument(
        "--scores",
        type=Path,
        metavar="FILE",
        help="use the scores.json of an earlier call instead of running the teacher",
    )
    method = (
        "how heads are scored. 'exact' patches every head. 'attribution' estimates all of them from one gradient, in a"
        " fraction of the time (default exact)"
    )
    scoring.add_argument("--method", choices=["exact", "attribution"], default="exact", help=method)
    scoring.add_argument(
        "--length",
        type=int,
        metavar="N",
        help="tokens of a prompt (default: the teacher's native length, at most 4096)",
    )
    roles = (
        "the effects that count. 'both' takes the larger of a head's effects as receiver and as sender, which is the"
        " paper's rule. 'receiver' takes the direct effect alone, and is far quicker. Compare the two if few heads are"
        " kept, as docs/selection.md says (default both)"
    )
    scoring.add_argument("--roles", choices=ROLES, help=roles)
    tried = (
        "kinds of linear heads whose best imitation of each head is measured, in closed form (default: none with"
        " --score causal, else what --linear names)"
    )
    scoring.add_argument("--replaceable-by", nargs="+", choices=linear_kinds(), default=[], metavar="KIND", help=tried)
    longer = "score at these lengths too. The report then says whether the ranking depends on the length"
    scoring.add_argument("--also-lengths", type=int, nargs="+", default=[], metavar="N", help=longer)
    scoring.add_argument(
        "--pairs",
        type=int,
        default=8,
        metavar="N",
        help="pairs of prompts for each sub-probe, such as a task (default 8)",
    )
    what = f"capabilities that heads are scored for: {', '.join(BUILT_IN)} (default: both)"
    scoring.add_argument(
        "--capabilities", nargs="*", choices=list(BUILT_IN), default=list(BUILT_IN), metavar="NAME", help=what
    )
    mine = "a capability of your own and its JSONL file of pairs; repeat the flag for more"
    scoring.add_argument("--probe", action="append", default=[], metavar="NAME=FILE", help=mine)
    weight = "weight of a capability (default 1 each); repeat the flag for more"
    scoring.add_argument("--weight", action="append", default=[], metavar="NAME=W", help=weight)
    words = "JSON file with the wording of the needles (default: tokenizer/needles.json of the teacher, else RULER's)"
    scoring.add_argument("--template", type=Path, metavar="FILE", help=words)
    text = 'UTF-8 text to hide needles in, or "noise" for repeated sentences (default: the Python language reference)'
    scoring.add_argument("--text", metavar="FILE", help=text)
    silent = (
        "prompts of each needle task for the knock-out curves. They silence heads by score and show when retrieval"
        " breaks. 0 makes none (default 4)"
    )
    scoring.add_argument("--knock-out", type=int, default=4, metavar="N", help=silent)
    machine = p.add_argument_group("machine")
    add_dtype_flag(machine, "float32")
    add_layout_flags(machine, "the pairs")


@one_line_errors("select_heads")
def main(argv: list[str] | None = None) -> None:
    args = parse_with_recipe(parser(), "select", argv)
    if args.skip_existing and (args.out / "head_map.json").exists():
        if os.environ.get("RANK", "0") == "0":
            print(f"{args.out}: holds a head map already")
        return
    check_inputs(
        teacher=args.teacher,
        scores=args.scores,
        template=args.template,
        text=None if args.text == "noise" else args.text,
        probe=[file for _, _, file in (probe.partition("=") for probe in args.probe) if file],
    )
    from tools.commands.select_heads import run  # takes seconds: not for --help

    run(args)


if __name__ == "__main__":
    main()
