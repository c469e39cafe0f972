# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""How a Hugging Face tensor stands inside one tensor of a checkpoint, in both directions.

A checkpoint stores every head by itself, in Hugging Face order ([heads, d, m] for the rows of a projection), whatever
layout wrote it. Every Hugging Face tensor is a part of exactly one stored tensor. A mapping names this part once, as a
view; reading and writing both go through that view, so the two directions cannot disagree.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


class WeightMapping(ABC):
    """One Hugging Face tensor <-> its part of one stored tensor."""

    @abstractmethod
    def view_of(self, stored: Tensor) -> Tensor:
        """The tensor's values as a view of the stored tensor, in the order of Hugging Face."""

    @torch.no_grad()
    def from_hf(self, hf: Tensor, stored: Tensor) -> int:
        """Write the tensor's values into the stored tensor, in the latter's dtype; returns how many."""
        part = self.view_of(stored)
        part.copy_(hf.reshape(part.shape))
        return part.numel()

    @torch.no_grad()
    def to_hf(self, stored: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The tensor as Hugging Face stores it: a contiguous copy of the given shape in the stored dtype."""
        return self.view_of(stored).reshape(shape).clone(memory_format=torch.contiguous_format)


@dataclass(frozen=True)
class Whole(WeightMapping):
    """All of the stored tensor, row for row; heads that stand as blocks there are rows one after another here."""

    def view_of(self, stored: Tensor) -> Tensor:
        return stored


@dataclass(frozen=True)
class Stacked(WeightMapping):
    """Part number ``part`` of ``parts`` equal row blocks: gate_proj, then up_proj, make mlp.linear_fc1."""

    part: int
    parts: int

    def view_of(self, stored: Tensor) -> Tensor:
        return stored.unflatten(0, (self.parts, -1))[self.part]


@dataclass(frozen=True)
class InEachBlock(WeightMapping):
    """Part ``part`` of ``parts`` within every block: linear_kv stores [k; v] of the first head or group, of the second,
    ...
    """

    part: int
    parts: int

    def view_of(self, stored: Tensor) -> Tensor:
        return stored.unflatten(1, (self.parts, -1))[:, self.part]


@dataclass(frozen=True)
class Columns(WeightMapping):
    """Blocks that are columns in Hugging Face: o_proj [m, h * d] is stored as [h, m, d]."""

    def view_of(self, stored: Tensor) -> Tensor:
        return stored.transpose(0, 1)
