# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Loss on held-out text: as a whole, and by how much of the text stands before a token."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hydra_mcore.costs.batch_sizes import rows_a_forward
from hydra_mcore.errors import InputError
from hydra_mcore.evaluation.models import EvaluatedModel
from hydra_mcore.evaluation.scoring import shared_out

TEXT_TOKENS = 32_768  # of the text that are read; the same ones for every window length
LONG_WINDOWS = 8  # longer windows read more of it, so that a mean over them has an error
FIRST_EDGE = 64  # tokens; the bins of positions double from here
LARGEST_LOSS = 700  # nats a token: the perplexity of more is no float64


@dataclass(frozen=True)
class Bin:
    """Mean loss (nats a token) of the tokens that have at least ``start`` and fewer than ``end`` tokens before them."""

    start: int
    end: int
    nll: float
    error: float | None
    """Standard error over windows; None of a single window."""


@dataclass(frozen=True)
class TextLoss:
    """Loss in nats a token over windows of ``length``, the first token of each never being predicted.

    Raises:
        InputError: no windows or bytes, or a loss that is not finite, or beyond ``LARGEST_LOSS``.
    """

    length: int
    by_window: tuple[tuple[float, ...], ...]
    """Mean loss of each bin of ``edges(length)``, by window."""
    text_bytes: int
    """UTF-8 bytes of the predicted tokens: what models of different tokenizers have in common."""

    def __post_init__(self) -> None:
        if self.length < 2 or not self.by_window or self.text_bytes < 1:
            raise InputError(
                f"a loss on text needs windows of 2 tokens or more, and bytes; {self.length} tokens a window are given"
            )
        bins = len(edges(self.length))
        if any(len(window) != bins for window in self.by_window):
            raise InputError(f"a window of {self.length} tokens has {bins} mean losses")
        losses = itertools.chain.from_iterable(self.by_window)
        if not all(abs(loss) <= LARGEST_LOSS for loss in losses):  # so written, NaN is refused too
            raise InputError(
                f"the loss on windows of {self.length} tokens is not finite, or beyond {LARGEST_LOSS}: the model is"
                " broken"
            )

    @property
    def tokens(self) -> int:
        return len(self.by_window) * (self.length - 1)

    @property
    def nll(self) -> float:
        sizes = [end - start for start, end in edges(self.length)] * len(self.by_window)
        losses = itertools.chain.from_iterable(self.by_window)
        return math.fsum(size * nll for size, nll in zip(sizes, losses, strict=True)) / self.tokens

    @property
    def perplexity(self) -> float:
        return math.exp(self.nll)

    @property
    def bits_per_byte(self) -> float:
        return self.nll * self.tokens / math.log(2) / self.text_bytes

    @property
    def by_position(self) -> tuple[Bin, ...]:
        """The bins, the last one ending with the window."""
        loss_wb = np.asarray(self.by_window)
        count = len(loss_wb)
        errors = loss_wb.std(axis=0, ddof=1) / math.sqrt(count) if count > 1 else [None] * loss_wb.shape[1]
        bins = zip(edges(self.length), loss_wb.mean(axis=0).tolist(), errors, strict=True)
        return tuple(Bin(start, end, nll, None if error is None else float(error)) for (start, end), nll, error in bins)

    def rise(self, place: int, behind: int) -> tuple[float, float | None]:
        """How much higher the loss is in one bin than in another, and the standard error of that over windows."""
        rise_w = np.asarray(self.by_window)[:, behind] - np.asarray(self.by_window)[:, place]
        error = rise_w.std(ddof=1) / math.sqrt(len(rise_w)) if len(rise_w) > 1 else None
        return float(rise_w.mean()), None if error is None else float(error)

    def to_dict(self) -> dict[str, Any]:
        return {"length": self.length, "by_window": self.by_window, "text_bytes": self.text_bytes}


def edges(length: int) -> list[tuple[int, int]]:
    """[start, end) of each bin of positions in a window, 0 having no prediction: 1-64, 64-128, 128-256, ..."""
    starts = itertools.takewhile(lambda start: start < length, (FIRST_EDGE * 2**power for power in itertools.count()))
    return list(itertools.pairwise([1, *starts, length]))


def text_windows(text_ids: np.ndarray, length: int) -> Tensor:
    """int64 [b, s]: the text's first ``TEXT_TOKENS`` tokens cut into windows of ``length``, the rest left out.

    Of windows so long that these would be fewer than ``LONG_WINDOWS``, as many as the text has, up to that number.

    Raises:
        InputError: windows of fewer than 2 tokens (the first token of a window is never predicted), or less text
            than one window.
    """
    if length < 2:
        raise InputError(f"perplexity with {length} tokens a window: at least 2 are needed")
    if len(text_ids) < length:
        have = f"the text has {len(text_ids)} tokens; give a longer one"
        raise InputError(f"perplexity with {length} tokens a window: {have}")
    count = min(len(text_ids) // length, max(TEXT_TOKENS // length, LONG_WINDOWS))
    return torch.from_numpy(np.asarray(text_ids[: count * length], dtype=np.int64).reshape(count, length))


def window_losses(model: EvaluatedModel, windows_bs: Tensor) -> Iterator[list[tuple[tuple[float, ...], np.ndarray]]]:
    """For each window, in order, a batch at a time: the mean loss of its bins, and int32 [s - 1] the likeliest tokens.

    Each window is predicted from its own beginning only. Losses are averaged in float64.
    """
    length = windows_bs.shape[1]
    bins = [slice(start - 1, end - 1) for start, end in edges(length)]

    def losses(rows: Sequence[Tensor]) -> list[tuple[tuple[float, ...], np.ndarray]]:
        nll_bs, likeliest_bs = model.token_losses(torch.stack(list(rows)))
        means_b = [tuple(nll_s[part].double().mean().item() for part in bins) for nll_s in nll_bs]
        return list(zip(means_b, likeliest_bs.to(torch.int32).numpy(), strict=True))

    return shared_out(model, list(windows_bs), rows_a_forward(length), losses)
