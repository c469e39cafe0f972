# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""How near two models' logits are, and the verdict on it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from hydra_mcore.errors import InputError

KL_BAR = 1e-6  # nats a token: far above the float32 rounding of a real model's depth, far below what any slip causes
TIE = 1e-4  # logits this near, relative to their size, are in no order that float32 could keep
ROWS = 256  # tokens compared at once, so that the float64 copies stay small beside the logits


@dataclass(frozen=True)
class Agreement:
    """Logits compared token by token.

    ``kl`` is the mean of KL(reference || found) in nats, ``agreeing`` counts tokens whose likeliest next token is the
    same or ties with it, ``ties`` those whose two likeliest tie in the reference; ``largest`` is the largest |logit| of
    the reference. ``note`` is said where the bars are not met.
    """

    tokens: int
    kl: float
    agreeing: int
    ties: int
    max_difference: float
    largest: float
    note: str = ""

    @property
    def relative(self) -> float:
        """The largest difference as a share of the largest logit."""
        return self.max_difference / self.largest if self.largest else self.max_difference

    @property
    def passed(self) -> bool:
        """Whether both bars are met; NaN meets none."""
        return self.kl < KL_BAR and self.agreeing == self.tokens

    def __str__(self) -> str:
        ties = f", {self.ties} tie{'s' if self.ties > 1 else ''}" if self.ties else ""
        note = f"; {self.note}" if self.note and not self.passed else ""
        difference = f"max difference {self.max_difference:.1e} ({self.relative:.1e} of the largest)"
        return f"KL {self.kl:.1e}  top-1 {self.agreeing}/{self.tokens}  {difference}{ties}{note}"


def agreement(pairs: Iterable[tuple[Tensor, Tensor]]) -> Agreement:
    """Compare logits with those of a reference, computed in float64.

    Args:
        pairs: (reference, found), each [..., w], of the same shape; all count together.

    Raises:
        InputError: shapes differ.
    """
    kl, worst, largest = (torch.zeros((), dtype=torch.float64) for _ in range(3))
    tokens = agreeing = ties = 0
    for reference, found in pairs:
        if reference.shape != found.shape:
            raise InputError(f"logits of shape {list(found.shape)} instead of {list(reference.shape)}")
        reference_tw, found_tw = reference.flatten(0, -2), found.flatten(0, -2)
        for expected_tw, actual_tw in zip(reference_tw.split(ROWS), found_tw.split(ROWS), strict=True):
            expected_tw, actual_tw = expected_tw.double(), actual_tw.double()
            log_p, log_q = F.log_softmax(expected_tw, dim=-1), F.log_softmax(actual_tw, dim=-1)
            kl += (log_p.exp() * (log_p - log_q)).sum()
            worst = torch.maximum(worst, (expected_tw - actual_tw).abs().max())  # which keeps NaN
            largest = torch.maximum(largest, expected_tw.abs().max())
            best_t2 = expected_tw.topk(2).values
            slack_t = TIE * best_t2.abs().amax(dim=1)
            chosen_t = expected_tw.gather(1, actual_tw.argmax(dim=1, keepdim=True))[:, 0]
            agreeing += int((best_t2[:, 0] - chosen_t <= slack_t).sum())
            ties += int((best_t2[:, 0] - best_t2[:, 1] <= slack_t).sum())
            tokens += len(expected_tw)
    return Agreement(tokens, kl.item() / max(tokens, 1), agreeing, ties, worst.item(), largest.item())


@dataclass(frozen=True)
class Fact:
    """Something that holds or does not, and the sentence that says which."""

    passed: bool
    said: str

    def __str__(self) -> str:
        return self.said


@dataclass(frozen=True)
class Result:
    """One line of a verification: a check (or a part of one), what it compared, and what came of it."""

    check: str
    part: str
    compared: str
    verdict: Literal["pass", "FAIL", "skipped"]
    said: str
    numbers: Agreement | None = None

    def __str__(self) -> str:
        return f"{self.verdict:8}{f'{self.check} {self.part}':22}{self.compared:40} {self.said}"

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which knows no NaN: such a number is None."""
        numbers = None
        if self.numbers is not None:
            raw = {name: value for name, value in asdict(self.numbers).items() if name != "note"} | {
                "relative": self.numbers.relative
            }
            numbers = {name: value if math.isfinite(value) else None for name, value in raw.items()}
        return asdict(self) | {"numbers": numbers}
