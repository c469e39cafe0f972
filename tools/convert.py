#!/usr/bin/env python3
# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Convert a Hugging Face model to a checkpoint, a teacher to a student, and a checkpoint to a Hugging Face model.

import     makes a checkpoint from a Hugging Face directory, a teacher's (Qwen3, Qwen2/2.5, Llama) or a student's export
hybridize  makes a student's checkpoint from a teacher's checkpoint and a head map
export     makes a Hugging Face directory from a checkpoint: a teacher's own family, or HydraHead with its own code
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hydra_mcore.commands import check_inputs, one_line_errors
from hydra_mcore.config import CARD_NAME, HydraOptions, add_flags  # light, so that --help is quick
from hydra_mcore.corpus.hub import model_folder
from hydra_mcore.recipe import parse_with_recipe

IMPORT_EXAMPLES = """examples:
  python tools/convert.py import --hf Qwen/Qwen3-1.7B --out runs/a/teacher
  python tools/convert.py import --hf examples/tiny/teacher --out runs/demo/teacher
  python tools/convert.py import --config examples/qwen3-1.7b/recipe.yaml --skip-existing
"""
EXPORT_EXAMPLES = """examples:
  python tools/convert.py export --checkpoint runs/a/extend --out runs/a/hf --dtype bf16
  python tools/convert.py export --checkpoint runs/a/extend --out runs/a/hf --evaluation runs/a/evaluation/report.md
"""
HYBRIDIZE_EXAMPLES = """examples:
  python tools/convert.py hybridize --teacher runs/a/teacher --head-map runs/a/heads/head_map.json \\
      --text corpus.txt --out runs/a/student
  python tools/convert.py hybridize --teacher runs/a/teacher --head-map map.json --out runs/c/student \\
      --start fitted --scores runs/a/heads/scores.json --text corpus.txt
  python tools/convert.py hybridize --teacher runs/a/teacher --head-map map.json --out runs/b/student \\
      --fusion norm --fa-gate headwise
"""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    add_import(commands)
    add_hybridize(commands)
    add_export(commands)
    for name, command in commands.choices.items():
        sections = f"recipe: YAML files whose section {name} holds these flags"
        command.add_argument("--config", nargs="+", metavar="FILE", help=sections)
        command.add_argument("--skip-existing", action="store_true", help="do nothing if --out is complete already")
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in commands.choices:
        return parse_with_recipe(commands.choices[argv[0]], argv[0], argv[1:])
    return parser.parse_args(argv)


def add_import(commands: argparse._SubParsersAction) -> None:
    p = add_command(commands, "import", "make a checkpoint from a Hugging Face directory", IMPORT_EXAMPLES)
    what = "directory with config.json and *.safetensors, or a name on the hub"
    p.add_argument("--hf", required=True, metavar="NAME", help=what)
    add_result(p, "checkpoint", source="in the directory")
    p.set_defaults(command="import", seed=0, mark=CARD_NAME)


def add_hybridize(commands: argparse._SubParsersAction) -> None:
    usage = "%(prog)s --teacher DIR --head-map FILE --out DIR [options]"
    p = add_command(commands, "hybridize", "make a student from a teacher and a head map", HYBRIDIZE_EXAMPLES, usage)
    p.add_argument("--teacher", required=True, metavar="DIR", help="checkpoint folder that import wrote")
    p.add_argument("--head-map", required=True, metavar="FILE", help="head map (JSON, from tools/select_heads.py)")
    starts = (
        "what training starts from. 'inherited' takes the teacher's values. 'fitted' solves for the memories, value"
        " projections, fusion scales and output projections that imitate each of the teacher's layers best on the"
        " text (default inherited)"
    )
    p.add_argument("--start", choices=("inherited", "fitted"), default="inherited", help=starts)
    scales = (
        "where fusion scales start. 'calibrated' takes the size of the teacher's head outputs on the text,"
        " 'one' takes 1 (default calibrated)"
    )
    p.add_argument("--fusion-scale", choices=("calibrated", "one"), default="calibrated", help=scales)
    p.add_argument(
        "--text",
        metavar="FILE",
        help="UTF-8 text like that of training. Its first 4096 tokens are used, and 16384 for a fitted start",
    )
    known = (
        "scores.json of tools/select_heads.py, for --start fitted. Heads start with the memories that it holds, which"
        " takes a tenth of the time"
    )
    p.add_argument("--scores", metavar="FILE", help=known)
    p.add_argument("--seed", type=int, default=1234, metavar="N", help="seed of the output gates' random start")
    add_flags(p.add_argument_group("the layer"), HydraOptions)
    add_result(p, "checkpoint")
    p.set_defaults(command="hybridize", mark=CARD_NAME)


def add_export(commands: argparse._SubParsersAction) -> None:
    p = add_command(commands, "export", "make a Hugging Face directory from a checkpoint", EXPORT_EXAMPLES)
    p.add_argument("--checkpoint", required=True, metavar="DIR", help="checkpoint folder of a teacher or of any stage")
    largest = "largest safetensors file (default: %(default)s)"
    p.add_argument("--max-shard-size", type=float, default=5.0, metavar="GB", help=largest)
    p.add_argument("--evaluation", metavar="FILE", help="report.md of tools/evaluate.py, for the model card")
    base = "the pretrained model's name on the hub, for the model card (default: as the import noted it)"
    p.add_argument("--base-model", default="", metavar="USER/NAME", help=base)
    terms = "licence of this model, as the hub names it, for the model card (default: the pretrained model's)"
    p.add_argument("--license", default="", metavar="NAME", help=terms)
    add_result(p, "Hugging Face", source="at the source")
    p.set_defaults(command="export", seed=0, mark="config.json")


def add_command(
    commands: argparse._SubParsersAction, name: str, what: str, examples: str, usage: str | None = None
) -> argparse.ArgumentParser:
    layout = argparse.RawDescriptionHelpFormatter
    return commands.add_parser(name, help=what, usage=usage, epilog=examples, formatter_class=layout)


def add_result(p: argparse.ArgumentParser, result: str, source: str | None = None) -> None:
    """Add ``--dtype``, by default that of the ``source`` or float32, and ``--out``."""
    what = "dtype of the weights written"
    if source:
        what += f" (default: as {source}, so nothing is rounded)"
    default = None if source else "float32"
    p.add_argument("--dtype", choices=("float32", "bf16"), default=default, help=what)
    p.add_argument("--out", required=True, metavar="DIR", help=f"new {result} folder")


@one_line_errors("convert")
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.skip_existing and (Path(args.out) / args.mark).exists():  # a folder gets its name when it is complete
        print(f"{args.out}: is there already")
        return
    if args.command == "import":
        args.hf = model_folder(args.hf)
    else:
        read = ("teacher", "head_map", "text", "scores", "checkpoint", "evaluation")
        check_inputs(**{name: vars(args).get(name) for name in read})
    warnings.filterwarnings("ignore", module=r"megatron\.")
    from tools.commands.convert import run  # takes seconds: not for --help

    run(args)


if __name__ == "__main__":
    main()
