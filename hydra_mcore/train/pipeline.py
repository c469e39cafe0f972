# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Megatron's pipeline schedules with a teacher beside the student."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.training import training
from torch import Tensor

from hydra_mcore.stages import STAGES
from hydra_mcore.train.step import TransferStep

Report = dict[str, Tensor]


@contextlib.contextmanager
def teacher_in_the_pipeline(step: TransferStep) -> Iterator[None]:
    """While open, Megatron's training loop gets schedules that

    - carry the teacher's hidden state beside the student's (``Stage.streams`` of them along the batch axis), because
      schedules know the shape of what stages send from the micro-batch size alone;
    - end with the reports of all stages on the last one, because only that one's are logged.
    """
    stock, streams = training.get_forward_backward_func, STAGES[step.options.stage].streams

    def choose(*args: Any, **keywords: Any) -> Callable[..., list[Report]]:
        schedule = stock(*args, **keywords)

        def run(*, micro_batch_size: int, **rest: Any) -> list[Report]:
            reports = schedule(micro_batch_size=micro_batch_size * streams, **rest)
            return _with_whole_step(reports, step.finish())

        return run

    training.get_forward_backward_func = choose
    try:
        yield
    finally:
        training.get_forward_backward_func = stock


def _with_whole_step(reports: list[Report], whole: Report) -> list[Report]:
    """The last stage's reports, one a micro-batch; (sum, count) pairs of the whole step stand in the first."""
    nothing = {name: torch.zeros_like(pair) for name, pair in whole.items()}
    return [report | (nothing if index else whole) for index, report in enumerate(reports)]
