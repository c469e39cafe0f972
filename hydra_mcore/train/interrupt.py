# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C while a stage trains."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Iterator

from megatron.training.global_vars import get_signal_handler

from hydra_mcore.commands import INTERRUPTED


@contextlib.contextmanager
def saved_at_ctrl_c(args: argparse.Namespace) -> Iterator[None]:
    """While open, a Ctrl-C is what the exit signal (SIGTERM) is: the stage saves after its step and ends; a second one
    ends it at once.

    Needs Megatron's global variables. Processes that load data inherit the handler: there it does nothing, they end
    with their trainer.
    """
    if not args.exit_signal_handler or signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        yield
        return
    handler, trainer, pressed = get_signal_handler(), os.getpid(), []

    def press(_number: int, _frame: object) -> None:
        if os.getpid() != trainer:
            return
        handler._signal_received = True
        if args.rank == 0:
            end = (
                "ended at once"
                if pressed
                else "the step under way, then a save, then the end; Ctrl-C again ends it at once"
            )
            os.write(sys.__stderr__.fileno(), f"train: Ctrl-C: {end}\n".encode())
        if pressed:
            os._exit(INTERRUPTED)
        pressed.append(True)

    before = signal.signal(signal.SIGINT, press)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
