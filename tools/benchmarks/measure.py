# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Measure seconds and peak memory of calls, on a CPU or a GPU."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from hydra_mcore.errors import InputError
from hydra_mcore.model.precision import DTYPES
from tools.benchmarks.shapes import DEVICE_DTYPES
from tools.tracked_memory import tracked_peak

Call = Callable[[], object]

GEMM_ROWS = {"cpu": 1024, "cuda": 8192}
GEMM_REPEATS = 10


@dataclass(frozen=True)
class Point:
    """What one contestant showed at one length."""

    name: str
    length: int  # tokens
    seconds: tuple[float, ...]  # of each repeat
    peak_bytes: int | None = None  # beyond what was there before the call

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> str:
        """Seconds as tables show them: median (least..most)."""
        return f"{self.median:.3g} ({min(self.seconds):.3g}..{max(self.seconds):.3g})"


def chosen_machine(args: argparse.Namespace) -> tuple[str, str]:
    """Device ("cpu" or "cuda") and the dtype, a name of ``DTYPES``.

    Raises:
        InputError: cuda, and torch sees no GPU.
    """
    available = torch.cuda.is_available()
    if args.device == "cuda" and not available:
        raise InputError("--device cuda: torch sees no GPU; leave it out to measure on the CPU")
    device = args.device or ("cuda" if available else "cpu")
    return device, args.dtype or DEVICE_DTYPES[device]


def timed(call: Call, device: str) -> float:
    """Seconds of one call; a GPU is done before and after it."""
    _finish(device)
    start = time.perf_counter()
    call()
    _finish(device)
    return time.perf_counter() - start


def in_turn(
    contestants: Mapping[str, Call], repeats: int, device: str, warm_up: bool = True
) -> dict[str, tuple[float, ...]]:
    """Seconds of every contestant: A B C A B C ..., so that a slow moment of the machine does not fall on one of them.

    Args:
        contestants: what to call, by name.
        repeats: how often each is timed.
        device: "cpu" or "cuda".
        warm_up: call each once before, untimed.
    """
    if warm_up:
        for call in contestants.values():
            call()
    rounds = [{name: timed(call, device) for name, call in contestants.items()} for _ in range(repeats)]
    return {name: tuple(each[name] for each in rounds) for name in contestants}


def peak_bytes(call: Call, device: str) -> int:
    """Peak memory of a call beyond what was there: tensors that operators return on a CPU, the allocator's counter on a
    GPU.
    """
    if device == "cpu":
        with tracked_peak() as memory:
            call()
        return memory.peak_bytes
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - before


def measured(contestants: Mapping[str, Call], length: int, repeats: int, device: str) -> list[Point]:
    """The points of one length: memory first, which warms up, then time in turn."""
    peaks = {name: peak_bytes(call, device) for name, call in contestants.items()}
    seconds = in_turn(contestants, repeats, device, warm_up=False)
    return [Point(name, length, seconds[name], peaks[name]) for name in contestants]


def gemm_speed(device: str, dtype: str) -> float:
    """Operations a second of a large square matrix product, the best of several: what this machine can do at most.

    Args:
        dtype: a name of ``DTYPES``.
    """
    rows = GEMM_ROWS[device]
    a, b = torch.randn(2, rows, rows, device=device, dtype=DTYPES[dtype]).unbind()
    return 2 * rows**3 / min(in_turn({"": lambda: a @ b}, GEMM_REPEATS, device)[""])


def _finish(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
