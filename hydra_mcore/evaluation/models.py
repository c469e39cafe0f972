# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""What evaluation asks of a model, be it a checkpoint on many ranks or a Hugging Face directory on one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from hydra_mcore.errors import InputError
from hydra_mcore.files import is_name

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What is known of a model before its weights are read."""

    folder: Path
    fingerprint: str
    """sha256 of what the folder holds (and of the YaRN factor): other weights, another fingerprint."""
    lineage: str
    """Fingerprint of the pretrained weights it descends from; empty if unknown."""
    stage: str
    """Last stage of its training, "teacher", or a Hugging Face model type."""
    strategy: str
    """How its FA heads were chosen; empty if unknown."""
    num_fa: int | None
    num_heads: int
    """Of the whole model, as ``num_fa``."""
    native_length: int
    """Tokens it was pretrained for, before YaRN."""
    vocab_size: int
    tokenizer_dir: Path
    yarn: float | None = None
    """Factor by which YaRN (arXiv:2309.00071) stretches its positions."""
    url: str = ""
    """Address of the server that answers for it; empty where it is run here."""

    def __post_init__(self) -> None:
        if not all(map(is_name, (self.fingerprint, self.lineage, self.stage, self.strategy))):
            raise InputError("fingerprint, lineage, stage and strategy are one short line each")
        if (
            min(self.num_heads, self.native_length, self.vocab_size) < 1
            or not 0 <= (self.num_fa or 0) <= self.num_heads
        ):
            raise InputError(
                "counts of heads, tokens and words start from 1, and no more heads are FA heads than there are"
            )
        if self.yarn is not None and not self.yarn > 0:
            raise InputError(f"yarn is {self.yarn}; a factor is positive")


def repeat_stop(found_br: Tensor, stop: frozenset[int]) -> Tensor:
    """Decoded tokens, int64 [b, r], in which behind the first token of ``stop`` that token is repeated."""
    stops_br = torch.isin(found_br, torch.tensor(sorted(stop), dtype=torch.int64))
    behind_br = stops_br.cumsum(1) - stops_br.long() > 0
    first_b1 = stops_br.long().argmax(1, keepdim=True)
    return torch.where(behind_br, found_br.gather(1, first_b1), found_br)


class EvaluatedModel(Protocol):
    """A model in evaluation mode. All ranks call alike and all get the same result, on the CPU.

    Token ids are int64 [b, s] of any length; whatever a layout needs, it pads for itself.
    """

    replica: int
    """This process's number among those that could answer for the whole model: they share prompts out."""
    replicas: int

    def predicted(self, ids_bs: Tensor, start: int) -> Tensor:
        """int64 [b, s - start]: the likeliest token at each position from ``start`` (at least 1) on, given all before
        it.
        """

    def token_losses(self, ids_bs: Tensor) -> tuple[Tensor, Tensor]:
        """Negative log likelihood (nats, float32) of every token but the first, and the likeliest token there: both [b,
        s - 1].
        """

    def generated(self, ids_bs: Tensor, room: int, stop: frozenset[int]) -> Tensor:
        """int64 [b, room]: greedy decoding; behind the first token of ``stop`` that token is repeated."""

    def collect(self, mine: list[T]) -> list[list[T]]:
        """The lists of all replicas, by replica."""
