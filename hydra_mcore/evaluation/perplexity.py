# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Perplexity on held-out text, by token."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hydra_mcore.evaluation.forward import logits_at, rows_a_forward
from hydra_mcore.heads import InputError

TEXT_TOKENS = 32_768  # of the text that are read; the same ones for every window length


@dataclass(frozen=True)
class TextLoss:
    """Mean negative log likelihood (in nats) of ``tokens`` predicted tokens, in windows of ``length``."""

    length: int
    tokens: int
    nll: float

    @property
    def perplexity(self) -> float:
        return math.exp(self.nll)


def text_windows(text_ids: np.ndarray, length: int) -> Tensor:
    """int64 [b, s]: the text's first ``TEXT_TOKENS`` tokens cut into windows of ``length``, the rest left out.

    Raises:
        InputError: windows of fewer than 2 tokens (the first token of a window is never predicted), or less text
            than one window.
    """
    if length < 2:
        raise InputError(f"perplexity with {length} tokens a window: at least 2 are needed")
    if len(text_ids) < length:
        have = f"the text has {len(text_ids)} tokens; give a longer one"
        raise InputError(f"perplexity with {length} tokens a window: {have}")
    count = max(1, min(len(text_ids), TEXT_TOKENS) // length)
    return torch.from_numpy(np.asarray(text_ids[: count * length], dtype=np.int64).reshape(count, length))


def text_loss(model: torch.nn.Module, windows_bs: Tensor) -> TextLoss:
    """The model's loss over windows of text, each predicted from its own beginning only; ``model`` as in ``logits_at``.

    Log-probabilities are taken in float32 and summed in float64.
    """
    length, total = windows_bs.shape[1], 0.0
    for ids_bs in windows_bs.split(rows_a_forward(length)):
        logits_bsw = logits_at(model, ids_bs, slice(0, length - 1)).float()
        labels = ids_bs[:, 1:].flatten().to(logits_bsw.device)
        total += F.cross_entropy(logits_bsw.flatten(0, 1), labels, reduction="none").double().sum().item()
    tokens = windows_bs.shape[0] * (length - 1)
    return TextLoss(length=length, tokens=tokens, nll=total / tokens)
