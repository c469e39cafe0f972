# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""What must not go unnoticed: values that are not finite, loss spikes, data that does not come."""

from __future__ import annotations

import contextlib
import faulthandler
import math
import os
import socket
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from hydra_mcore.errors import InputError


class TrainingStopped(InputError):
    """Training met a value it must not go on with; the last complete checkpoint stays as it is."""


def nonfinite(step: int, where: str) -> str:
    """The line for a value that is NaN or infinite, naming the step (1-based) and where it was seen."""
    return (
        f"step {step}: {where} is not finite; the last complete checkpoint is kept, lower the learning rate or look at"
        " the data"
    )


def stop_together(reason: str | None) -> None:
    """Raise TrainingStopped on every rank when one of them has a reason, the first one's; called by all ranks.

    A rank that stopped alone would leave the others waiting for it in their next communication, and say nothing itself
    unless it is the first: with data parallelism a bad sample meets one rank of many.
    """
    flag = torch.tensor(float(reason is not None), device=torch.cuda.current_device())
    torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
    if not flag:
        return
    reasons: list[str | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(reasons, reason)
    raise TrainingStopped(next(found for found in reasons if found))


def first_nonfinite_layer(model: GPTModel, forward: Callable[[], object]) -> str:
    """Run ``forward`` once more and name the first layer whose output is not finite."""
    found: list[str] = []

    def look(name: str, module: torch.nn.Module, inputs: tuple, output: object) -> None:
        tensors = output if isinstance(output, tuple) else (output,)
        if not found and any(isinstance(t, Tensor) and not bool(torch.isfinite(t).all()) for t in tensors):
            found.append(name)

    modules = [(f"layer {layer.layer_number - 1}", layer) for layer in model.decoder.layers]
    if model.pre_process:
        modules.insert(0, ("the embedding", model.embedding))
    hooks = [module.register_forward_hook(partial(look, name)) for name, module in modules]
    try:
        with torch.no_grad():
            forward()
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else "the output layer"


class LossSpikes:
    """Says when a loss jumps above what the last steps make likely: once a spike, not once a step.

    The bound is the median of the last ``WINDOW`` losses plus ``WIDTH`` deviations (1.4826 x the median absolute
    deviation, which is a normal distribution's). Both are robust, so a spike does not raise its own bound; a loss that
    stays high becomes the new normal.
    """

    WINDOW, LEAST = 100, 20
    WIDTH = 8.0
    FLOOR = 0.01  # of the median: a loss that hardly moves at all makes no spike of every ripple

    def __init__(self) -> None:
        self.losses: deque[float] = deque(maxlen=self.WINDOW)
        self.above = False

    def __call__(self, loss: float) -> float | None:
        """The bound that ``loss`` breaks as the first of a spike, else None."""
        bound = math.inf
        if len(self.losses) >= self.LEAST:
            median = statistics.median(self.losses)
            deviation = 1.4826 * statistics.median(abs(other - median) for other in self.losses)
            bound = median + self.WIDTH * max(deviation, self.FLOOR * abs(median))
        starts, self.above = loss > bound and not self.above, loss > bound
        self.losses.append(loss)
        return bound if starts else None


class DataTimeout:
    """Ends the process when data does not come: a file system that hangs would otherwise keep a cluster waiting.

    Half of ``seconds`` late, it says so; after ``seconds`` it says where and exits with status 2, without clean-up,
    which would wait for the same data.

    Args:
        where: what is read, for the message.
        alert: told the message as well.
    """

    GRACE_S = 30.0

    def __init__(self, seconds: float, where: Callable[[], str], alert: Callable[[str], None]) -> None:
        self.seconds, self.where, self.alert = seconds, where, alert
        self.waited = 0.0  # seconds, of all waits so far

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        done = threading.Event()
        watch = threading.Thread(target=self._watch, args=(done,), daemon=True)
        # Where the wait holds Python's lock (a page of a memory map that never arrives) no thread of Python's can
        # speak: then this one, outside of it, shows the stack and exits with status 1.
        faulthandler.dump_traceback_later(self.seconds + self.GRACE_S, exit=True, file=sys.__stderr__)
        start = time.monotonic()
        watch.start()
        try:
            yield
        finally:
            done.set()
            faulthandler.cancel_dump_traceback_later()
            self.waited += time.monotonic() - start

    def _watch(self, done: threading.Event) -> None:
        for waited in (self.seconds / 2, self.seconds):
            if done.wait(self.seconds / 2):
                return
            self._say(f"no data for {waited:g} seconds: {self.where()} on {socket.gethostname()}")
        self._say(f"stopped: data-timeout is {self.seconds:g} seconds; look at that file system, or raise it")
        os._exit(2)

    def _say(self, line: str) -> None:
        print(f"train: {line}", file=sys.stderr, flush=True)
        self.alert(line)
