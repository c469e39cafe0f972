# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Which base a of the log-position scale ln(t + a) / ln(a) suits a trained model, and whether it should have any.

The scale sharpens the attention of FA heads as their context grows. Its base is not trained: HALO (arXiv 2601.22156)
chooses it after training by the loss on documents longer than those of training, and so does this file. The larger the
base, the flatter the scale; without it (``None`` below) is the limit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from hydra_mcore.errors import InputError
from hydra_mcore.evaluation.parallel import ParallelModel
from hydra_mcore.evaluation.perplexity import edges, window_losses
from hydra_mcore.model.fa_heads import set_log_scale
from hydra_mcore.progress import Progress

GRID = (50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0)
LIMITS = (2.0, 1e6)  # below, the scale is steep at the first tokens only; above, it is none up to 512K tokens
PRECISION = 1.1  # a base is known well enough when the bracket around it is no wider than this factor
GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0


class Trials:
    """The losses of one model on one set of windows under every base that was asked for, each run once.

    Args:
        model: on any layout; all ranks call alike and see the same losses.
        windows_bs: int64 windows of held-out text, each read from its own beginning.

    Raises:
        InputError: fewer than two windows, which would give no error of the mean.
    """

    def __init__(self, model: ParallelModel, windows_bs: Tensor) -> None:
        if len(windows_bs) < 2:
            raise InputError("one window tells nothing of the error: give a longer text, or a smaller --length")
        self.model, self.windows_bs = model, windows_bs
        self.bins = edges(windows_bs.shape[1])
        self._losses: dict[float | None, np.ndarray] = {}

    @property
    def bases(self) -> list[float | None]:
        """What has been tried: none first, then by size."""
        return sorted(self._losses, key=lambda base: base or 0.0)

    @property
    def best(self) -> float | None:
        return min(self.bases, key=self.loss)

    def loss(self, base: float | None) -> float:
        """Mean negative log likelihood in nats a token over all windows, run on demand."""
        if base not in self._losses:
            self._losses[base] = self._run(base)
        return float(self._of_windows(base).mean())

    def difference(self, base: float | None, to: float | None) -> tuple[float, float]:
        """By how many nats a token ``base`` loses more than ``to``, and the standard error of that over the windows.

        Windows differ far more among each other than two bases do on one window, so the error is that of the
        differences.
        """
        gap_w = self._of_windows(base) - self._of_windows(to)
        return float(gap_w.mean()), float(gap_w.std(ddof=1) / math.sqrt(len(gap_w)))

    def by_position(self, base: float | None) -> list[float]:
        """Mean loss of the tokens in each of ``bins``."""
        return self._losses[base].mean(axis=0).tolist()

    def _of_windows(self, base: float | None) -> np.ndarray:
        return np.average(self._losses[base], axis=1, weights=[end - start for start, end in self.bins])

    def _run(self, base: float | None) -> np.ndarray:
        """Mean losses [windows, bins]."""
        for chunk in self.model.chunks:
            set_log_scale(chunk, base)
        found: list[tuple[float, ...]] = []
        hidden = torch.distributed.get_rank() != 0
        with Progress(
            total=len(self.windows_bs), desc=name_of(base), unit="window", disable=hidden, leave=False
        ) as bar:
            for batch in window_losses(self.model, self.windows_bs):
                found += [means for means, _ in batch]
                bar.update(len(batch))
        return np.array(found)


def name_of(base: float | None) -> str:
    return "off" if base is None else f"a = {base:g}"


def best_base(loss: Callable[[float], float], grid: Sequence[float] = GRID) -> tuple[float, bool]:
    """The base of the least loss, to within a factor of ``PRECISION``, and whether it lies inside ``LIMITS``.

    First the grid, which goes on by its own step while its best is an end of it; then golden sections (Kiefer 1953) of
    ln(a) between the neighbours of the best. Of a loss with several minima it finds one.

    Raises:
        InputError: fewer than two different bases, or one outside ``LIMITS``.
    """
    tried = sorted(set(map(_rounded, grid)))
    if len(tried) < 2 or not (LIMITS[0] <= tried[0] and tried[-1] <= LIMITS[1]):
        raise InputError(
            f"--candidates {' '.join(f'{a:g}' for a in grid)}: name at least two bases from {LIMITS[0]:g} to"
            f" {LIMITS[1]:g}"
        )
    while (best := min(tried, key=loss)) in (tried[0], tried[-1]):
        if best in LIMITS:
            return best, False
        further = best / max(2.0, tried[1] / best) if best == tried[0] else best * max(2.0, best / tried[-2])
        tried = sorted({*tried, min(max(_rounded(further), LIMITS[0]), LIMITS[1])})
    at = tried.index(best)
    low, high = math.log(tried[at - 1]), math.log(tried[at + 1])
    found = {best}
    left, right = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
    while high - low > math.log(PRECISION):
        candidates = _rounded(math.exp(left)), _rounded(math.exp(right))
        found.update(candidates)
        if loss(candidates[0]) <= loss(candidates[1]):
            high, right = right, left
            left = high - GOLDEN * (high - low)
        else:
            low, left = left, right
            right = low + GOLDEN * (high - low)
    return min(sorted(found), key=loss), True


def _rounded(base: float) -> float:
    """Three digits: more would pretend to know more."""
    return float(f"{base:.3g}")
