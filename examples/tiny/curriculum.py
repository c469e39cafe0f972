# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Plan the tiny teacher's training: the data and the learning rate of each step (docs/LOG.md tells what was tried).

It begins with short sequences and dense needles, so that the retrieval circuit forms. Longer sequences follow, with
more text between the needles.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from examples.tiny import corpus

EVALUATION_SEED = 1_000_000  # the first of them: training has those below


@dataclass(frozen=True)
class Phase:
    """One step of the curriculum.

    Attributes:
        steps: Training steps.
        length: Tokens in a sequence.
        batch: Sequences in a batch.
        gaps: Mean filler tokens between needles, drawn for each sequence.
        prompts: Part of the sequences that are prompts of the evaluation's kind.
        plain: Part of the sequences that are real text without needles.
        text_weight: Weight of a text token in the loss; a repeated value weighs 1.
        pools: Different value pieces in a sequence (None: all), drawn for each sequence.
    """

    steps: int
    length: int
    batch: int
    gaps: tuple[float, ...]
    prompts: float
    plain: float
    text_weight: float
    pools: tuple[int | None, ...]


# Text weighs little until the retrieval circuit stands. Then most sequences use few different value
# pieces, so that a value's next piece must be found by the key, not by the last piece alone. (From
# the start, such sequences kept the circuit from forming.) A second cycle makes 512 tokens firm.
_ALL = (None,)
CURRICULUM = (
    Phase(1500, 64, 32, (0, 0, 0, 2, 4), 0.0, 0.0, 0.05, _ALL),
    Phase(1000, 128, 16, (0, 0, 2, 4, 8, 16), 0.0, 0.0, 0.05, _ALL),
    Phase(1250, 256, 10, (0, 0, 2, 8, 16, 32), 0.1, 0.2, 0.3, corpus.POOLS),
    Phase(1250, 512, 6, (0, 0, 0, 2, 8, 32, 64, 128), 0.2, 0.15, 0.15, corpus.POOLS),
    Phase(600, 256, 8, (0, 0, 0, 0, 2, 8, 32), 0.1, 0.05, 0.05, corpus.POOLS),
    Phase(900, 512, 5, (0, 0, 0, 2, 8, 32, 64, 128), 0.2, 0.1, 0.1, corpus.POOLS),
)
# First step, steps and highest learning rate of the two cycles.
CYCLES = ((0, 5000, 3e-3), (5000, 1500, 1.5e-3))
STEPS = sum(phase.steps for phase in CURRICULUM)


def phase_at(step: int) -> Phase:
    """Return the curriculum's phase at a step."""
    ends = np.cumsum([phase.steps for phase in CURRICULUM])
    return CURRICULUM[int(np.searchsorted(ends, step, side="right"))]


def learning_rate(step: int) -> float:
    """In each cycle, 100 steps of warm-up, then a cosine down to a twentieth."""
    first, steps, peak = next(cycle for cycle in reversed(CYCLES) if step >= cycle[0])
    done = step - first
    cosine = 0.5 * (1 + math.cos(math.pi * done / steps))
    return peak * min(1.0, (done + 1) / 100) * (0.05 + 0.95 * cosine)
