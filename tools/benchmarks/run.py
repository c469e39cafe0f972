# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Run one section of ``tools/benchmark.py``, from its flags to its tables, JSON and figure."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from hydra_mcore.compat import accelerators, install, is_cpu_only
from tools.benchmarks.report import markdown, save_json
from tools.benchmarks.sections import SECTIONS


def run(args: argparse.Namespace, command: Sequence[str]) -> None:
    """Measure and print; exit status 1 where a result is not what it must be.

    Args:
        command: the command line, for the JSON.
    """
    if SECTIONS[args.section].plain:
        accelerators.choose(is_cpu_only())  # Megatron-Core is imported all the same
    else:
        install()
    # By name: a section brings in the code that it measures, which another must not find loaded.
    report = importlib.import_module(f"tools.benchmarks.{args.section}").run(args)
    print(markdown(report))
    if args.json:
        save_json(args.json, command, report)
    if args.figure:
        figure = importlib.import_module("tools.benchmarks.figure")  # likewise, after what is measured
        figure.save_figure(args.figure, report)
    if report.failure:
        sys.exit(f"benchmark: {report.failure}")
