#!/usr/bin/env python3
# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Measure HydraHead and what one would use instead in one run, and print Markdown tables."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hydra_mcore.commands import check_inputs, one_line_errors
from hydra_mcore.errors import InputError
from tools.benchmarks.sections import SECTIONS


def parser() -> argparse.ArgumentParser:
    layout = argparse.RawDescriptionHelpFormatter
    epilog = "examples:\n" + "".join(section.examples for section in SECTIONS.values())
    p = argparse.ArgumentParser(prog="benchmark", description=__doc__, epilog=epilog, formatter_class=layout)
    commands = p.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, section in SECTIONS.items():
        command = commands.add_parser(
            name.replace("_", "-"),
            help=section.help,
            description=section.about,
            epilog="examples:\n" + section.examples,
            formatter_class=layout,
        )
        section.add_flags(command)
        command.add_argument(
            "--json", type=Path, metavar="FILE", help="write the tables and every measured time to this file"
        )
        if section.figure:
            curves = "draw time against length into this PNG, and memory where it is measured"
            command.add_argument("--figure", type=Path, metavar="FILE", help=curves)
        command.set_defaults(section=name, figure=None)
    return p


@one_line_errors("benchmark")
def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(argv)
    for flag, path in (("--json", args.json), ("--figure", args.figure)):
        if path and not path.absolute().parent.is_dir():
            raise InputError(f"{flag} {path}: no such folder; make it first")
    read = ("teacher", "text", "teacher_hf", "hf", "head_map", "tokenizers", "tokenizer")
    check_inputs(**{name: vars(args).get(name) for name in read})
    from tools.benchmarks.run import run  # takes seconds: not for --help

    run(args, argv)


if __name__ == "__main__":
    main()
