# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The parts of one layer on one rank, in float64, with parameters that say something.

Six heads read three kv groups: FA heads 1, 4, 5 read groups 0 and 2, GDN heads 0, 2, 3 read groups 0 and 1.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from hydra_mcore.config import HydraOptions, ModelShape
from hydra_mcore.heads import HeadLayout, HeadMap, HeadsByKind
from hydra_mcore.model.attention_plan import AttentionPlan
from hydra_mcore.model.build import transformer_config

D, M = 8, 24  # of a head, of the model
SHAPE = ModelShape(
    num_layers=1, hidden_size=M, num_heads=6, num_kv_groups=3, head_dim=D, ffn_hidden_size=32, vocab_size=64,
    native_length=64
)  # fmt: skip
HEADS = HeadsByKind(fa=(1, 4, 5), gdn=(0, 2, 3))


class OneLayer(NamedTuple):
    """What a branch is made of, in the order of its arguments."""

    config: TransformerConfig
    plan: AttentionPlan
    layout: HeadLayout


def one_layer(heads: HeadsByKind = HEADS, log_scale: bool = False, **changes: Any) -> OneLayer:
    """A layer with some of the shape's facts, or of the options, changed."""
    facts = {name: changes.pop(name) for name in ("qk_norm", "qkv_bias") if name in changes}
    shape = dataclasses.replace(SHAPE, **facts)
    head_map = HeadMap(num_heads=shape.num_heads, num_kv_groups=shape.num_kv_groups, layers=(heads,))
    plan = AttentionPlan(head_map, HydraOptions(**changes), log_scale=log_scale)
    return OneLayer(transformer_config(shape, torch.float64), plan, plan.layout(0, tp_size=1))


def scrambled[T: torch.nn.Module](module: T) -> T:
    """A module whose parameters, also those that start alike, are all different."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, dtype=parameter.dtype, generator=generator)
    return module


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def rotary_angles(positions: list[int]) -> Tensor:
    """[s, 1, 1, d]: channels i and i + d / 2 turn by position * 100^(-2i / d)."""
    angle_si = torch.outer(torch.tensor(positions).double(), 100.0 ** -(torch.arange(0, D, 2).double() / D))
    return torch.cat([angle_si, angle_si], dim=-1)[:, None, None]


def rotated(x_sd: Tensor, rotary: Tensor) -> Tensor:
    """Turn each pair of channels of one head, as a complex number, by its position's angle."""
    pairs = torch.complex(*x_sd.chunk(2, dim=-1)) * torch.polar(torch.ones(()).double(), rotary[:, 0, 0, : D // 2])
    return torch.cat([pairs.real, pairs.imag], dim=-1)


def normed(x_sd: Tensor, weight_d: Tensor) -> Tensor:
    return weight_d * x_sd / (x_sd.square().mean(-1, keepdim=True) + SHAPE.norm_epsilon).sqrt()


def positions_of(documents: tuple[int, ...]) -> list[int]:
    """Positions of packed documents, whose boundaries are given: each counts from 0."""
    return [token - max(start for start in documents if start <= token) for token in range(documents[-1])]
