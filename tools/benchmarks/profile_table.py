# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Tell where a contestant's time goes, part by part: ``--profile`` adds these tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from hydra_mcore.train.profile import profiled
from tools.benchmarks.report import Report


def parts_report(
    name: str,
    length: int,
    call: Callable[[], object],
    models: Iterable[torch.nn.Module],
    teachers: Iterable[torch.nn.Module] = (),
) -> Report:
    """The table of one more call, which has been warmed up; see ``hydra_mcore.train.profile.profiled``."""
    table = profiled(call, models, teachers)
    notes = (
        f"Milliseconds of {table.device.upper()} time in one call of {1000 * table.wall_seconds:.2f} ms, the profiler's"
        " own included."
    )
    return Report(f"{name}, {length} tokens, by part", notes, *table.cells())
