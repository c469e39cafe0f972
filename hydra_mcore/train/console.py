# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""What a stage prints before its first step: less than a screen, with all arguments in a file."""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os

from megatron.training.arguments import validate_args

ARGUMENTS = "arguments.txt"
_TABLE = "------------------------ arguments"  # how Megatron's table of a thousand lines begins


def validated(args: argparse.Namespace) -> str:
    """Let Megatron validate and complete ``args``; what it remarks is printed.

    Returns:
        The table of all arguments that it would print; empty on all ranks but the first.
    """
    with contextlib.redirect_stdout(io.StringIO()) as said:
        validate_args(args)
    remarks, begin, rest = said.getvalue().partition(_TABLE)
    print(remarks, end="", flush=True)
    return begin + rest


def leave_out_details(args: argparse.Namespace) -> None:
    """Keep what Megatron-Core logs as information off the console, times apart: every parameter's place in a buffer,
    every index of the data.

    With ``logging-level``, or MEGATRON_LOGGING_LEVEL, it is as asked for.
    """
    if args.logging_level is None and "MEGATRON_LOGGING_LEVEL" not in os.environ:
        logging.getLogger("megatron.core").setLevel(logging.WARNING)
        logging.getLogger("megatron.core.timers").setLevel(logging.INFO)
