# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""How a Hugging Face tensor stands inside one of our parameters, in both directions.

Every Hugging Face tensor is a set of whole row blocks of exactly one parameter. A mapping names these blocks once,
as a view; reading and writing both go through that view, so the two directions cannot disagree.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from hydra_mcore.config import ModelShape


class WeightMapping(ABC):
    """One Hugging Face tensor <-> its part of one parameter of the all-FA model at TP 1."""

    @abstractmethod
    def part_of(self, ours: Tensor, shape: ModelShape) -> Tensor:
        """The tensor's rows as a view of the parameter: [blocks, rows of a block, ...]."""

    @torch.no_grad()
    def from_hf(self, hf: Tensor, ours: Tensor, shape: ModelShape) -> int:
        """Write the tensor's values into the parameter, in the parameter's dtype; returns how many."""
        part = self.part_of(ours, shape)
        part.copy_(hf.reshape(part.shape))
        return part.numel()

    @torch.no_grad()
    def to_hf(self, ours: Tensor, shape: ModelShape) -> Tensor:
        """The tensor as Hugging Face stores it: a contiguous copy in the parameter's dtype."""
        return self.part_of(ours, shape).flatten(0, 1).clone(memory_format=torch.contiguous_format)


@dataclass(frozen=True)
class Copy(WeightMapping):
    """The whole parameter, row for row."""

    def part_of(self, ours: Tensor, shape: ModelShape) -> Tensor:
        return ours.unsqueeze(0)


@dataclass(frozen=True)
class Stacked(WeightMapping):
    """Part number ``part`` of ``parts`` equal row blocks: gate_proj, then up_proj, make mlp.linear_fc1."""

    part: int
    parts: int

    def part_of(self, ours: Tensor, shape: ModelShape) -> Tensor:
        return ours.unflatten(0, (self.parts, -1))[self.part].unsqueeze(0)


@dataclass(frozen=True)
class PerGroup(WeightMapping):
    """Part ``part`` of ``parts`` within the rows of every kv group: linear_kv is [k; v] of group 0, of group 1, ..."""

    part: int
    parts: int

    def part_of(self, ours: Tensor, shape: ModelShape) -> Tensor:
        return ours.unflatten(0, (shape.num_kv_groups, self.parts, -1))[:, self.part]
