#!/usr/bin/env python3
# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""What HydraHead costs beside what one would use instead, measured in one run. Markdown tables on stdout."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hydra_mcore.commands import one_line_errors
from hydra_mcore.errors import InputError
from tools.benchmarks.report import markdown, save_json

# The modules of tools/benchmarks: those that give a figure, and those whose results are no curve.
DRAWN = ("delta_rule", "attention", "layer", "step", "decode")
TABLES = ("communication", "balance", "memory", "selection", "data", "evaluation", "start_up")
# Sections that install what hydra_mcore changes in the process by themselves, once they measured others without it.
PLAIN = ("delta_rule",)


def parser() -> argparse.ArgumentParser:
    layout = argparse.RawDescriptionHelpFormatter
    sections = {name: importlib.import_module(f"tools.benchmarks.{name}") for name in DRAWN + TABLES}
    epilog = "examples:\n" + "".join(section.EXAMPLES for section in sections.values())
    p = argparse.ArgumentParser(prog="benchmark", description=__doc__, epilog=epilog, formatter_class=layout)
    commands = p.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, section in sections.items():
        examples = "examples:\n" + section.EXAMPLES
        command = commands.add_parser(
            name.replace("_", "-"),
            help=section.HELP,
            description=section.__doc__,
            epilog=examples,
            formatter_class=layout,
        )
        section.add_options(command)
        command.add_argument("--json", type=Path, metavar="FILE", help="write the tables and every measured time there")
        if name in DRAWN:
            command.add_argument(
                "--figure",
                type=Path,
                metavar="FILE",
                help="PNG of time against length, and memory where it is measured",
            )
        command.set_defaults(run=section.run, figure=None, plain=name in PLAIN)
    return p


@one_line_errors("benchmark")
def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(argv)
    if not args.plain:
        from hydra_mcore.compat import install

        install()
    for flag, path in (("--json", args.json), ("--figure", args.figure)):
        if path and not path.absolute().parent.is_dir():
            raise InputError(f"{flag} {path}: no such folder; make it first")
    report = args.run(args)
    print(markdown(report))
    if args.json:
        save_json(args.json, argv, report)
    if args.figure:
        from tools.benchmarks.figure import save_figure

        save_figure(args.figure, report)
    if report.failure:
        sys.exit(f"benchmark: {report.failure}")


if __name__ == "__main__":
    main()
