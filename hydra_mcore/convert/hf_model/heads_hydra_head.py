# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""What all kinds of heads of a HydraHead layer (arXiv 2606.20097) have in common.

Shape suffixes: b batch, s tokens of this call, t all tokens so far, h heads of the branch, g kv groups, m model width,
d head dimension, c channels. Heads of a branch stand in ascending order of their index in the layer.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .cache_hydra_head import HydraHeadCacheLayer
from .configuration_hydra_head import HydraHeadConfig

GATE_ACTIVATIONS = {"sigmoid": torch.sigmoid, "silu": F.silu}


class Padding(NamedTuple):
    """Where the padding of this call's tokens is; all of [b, s], ``count_b`` [b]."""

    real_bs: Tensor
    front_bs: Tensor  # for each place, the token that stands there once all real ones are moved to the front, in order
    back_bs: Tensor  # the way back
    count_b: Tensor  # real tokens of each row


class Call(NamedTuple):
    """What all layers need to know of this call's tokens beside their hidden states.

    A tuple of tensors, so that device placement hooks move it along; [1, ...] stands for all rows.
    """

    cos_bs1d: Tensor
    sin_bs1d: Tensor
    query_scale_bs11: Tensor | None
    mask_b1st: Tensor | None  # True where a query sees a key; None without padding, where the order of tokens says it
    padding: Padding | None


def describe_call(
    config: HydraHeadConfig,
    position_bs: Tensor,
    past: int,
    real_bt: Tensor | None,
    frequencies: tuple[Tensor, float],
    dtype: torch.dtype,
) -> Call:
    """Prepare a call on s tokens after ``past`` others.

    Args:
        position_bs: positions from 0, padding not counted, [b, s] or [1, s].
        real_bt: False at padding, among all past + s tokens; None where there is none.
        frequencies: of ``rotary_frequencies``.
    """
    inverse_d, factor = frequencies
    angle_bs1d = (position_bs[..., None].float() * inverse_d).repeat(1, 1, 2)[:, :, None]
    scale = None
    if config.fa_log_scale != "never":
        scale = torch.log(position_bs.float() + config.fa_log_scale_base) / math.log(config.fa_log_scale_base)
        scale = scale.to(dtype)[:, :, None, None]
    s = position_bs.shape[1]
    here_bs = None if real_bt is None else real_bt[:, past:]
    return Call(
        cos_bs1d=(angle_bs1d.cos() * factor).to(dtype),
        sin_bs1d=(angle_bs1d.sin() * factor).to(dtype),
        query_scale_bs11=scale,
        mask_b1st=None if real_bt is None else _attention_mask(s, past, real_bt),
        padding=None if here_bs is None or bool(here_bs.all()) else _padding(here_bs),
    )


def rotary_frequencies(config: HydraHeadConfig, device: torch.device) -> tuple[Tensor, float]:
    """Inverse frequencies of the first half of a head's channels, [d / 2], and the factor on sine and cosine."""
    if config.rope_parameters["rope_type"] != "default":
        return ROPE_INIT_FUNCTIONS[config.rope_parameters["rope_type"]](config, device)
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
    return 1.0 / config.rope_parameters["rope_theta"] ** exponent, 1.0


def _attention_mask(s: int, past: int, real_bt: Tensor) -> Tensor:
    """A query sees the real tokens up to its own, and itself: a row of padding alone would have no softmax."""
    earlier_st = torch.ones(s, past + s, dtype=torch.bool, device=real_bt.device).tril(past)
    return (earlier_st & real_bt[:, None, None]) | earlier_st.triu(past)


def _padding(real_bs: Tensor) -> Padding:
    front_bs = real_bs.logical_not().to(torch.uint8).argsort(dim=1, stable=True)
    return Padding(real_bs, front_bs, front_bs.argsort(dim=1), real_bs.sum(dim=1))


def rotate(x_bshd: Tensor, call: Call) -> Tensor:
    """Rotary positions; a channel turns with its partner in the other half of the head."""
    first, second = x_bshd.chunk(2, dim=-1)
    return x_bshd * call.cos_bs1d + torch.cat([-second, first], dim=-1) * call.sin_bs1d


def repeat_groups(x_bsgd: Tensor, times: Sequence[int], dim: int) -> Tensor:
    """Each kv group as often as heads read it (0 drops it), in order; the tensor itself where that is once each."""
    if all(count == 1 for count in times):
        return x_bsgd
    shapes = ([count if axis == dim else -1 for axis in range(x_bsgd.dim())] for count in times)
    return torch.cat([x.expand(shape) for x, shape in zip(x_bsgd.split(1, dim), shapes, strict=True)], dim)


class OutputGate(nn.Linear):
    """act(W x + b), one value per channel or per head (arXiv 2505.06708): x_bsm -> [b, s, h, d] or [b, s, h, 1]."""

    def __init__(self, config: HydraHeadConfig, heads: int, granularity: str) -> None:
        rows = config.head_dim if granularity == "elementwise" else 1
        super().__init__(config.hidden_size, heads * rows)
        self.rows, self.activation = rows, GATE_ACTIVATIONS[config.gate_activation]

    def forward(self, x_bsm: Tensor) -> Tensor:
        return self.activation(super().forward(x_bsm)).unflatten(-1, (-1, self.rows))


class Heads(nn.Module, ABC):
    """The heads of one kind in a layer: projections, RMSNorm and rotary positions of queries and keys, an output gate.

    ``kind`` names them in config.json and in the names of tensors.
    """

    kind: ClassVar[str]

    def __init__(
        self, config: HydraHeadConfig, heads: list[int], *, kv_per_head: bool, qk_norm: bool, position: str, gate: str
    ) -> None:
        super().__init__()
        self.config, self.position = config, position
        self.heads_per_group = [count for count in config.heads_per_group(heads) if count]
        m, d = config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(m, len(heads) * d, bias=config.qkv_bias)
        if config.qkv == "separate":
            kv_rows = (len(heads) if kv_per_head else len(self.heads_per_group)) * d
            self.k_proj, self.v_proj = (nn.Linear(m, kv_rows, bias=config.qkv_bias) for _ in range(2))
        self.q_norm, self.k_norm = (nn.RMSNorm(d, config.rms_norm_eps) if qk_norm else None for _ in range(2))
        self.gate_proj = None if gate == "none" else OutputGate(config, len(heads), gate)

    def option(self, name: str) -> Any:
        """One of the kind's own options: "gate" is ``gdn_gate`` of GDN heads."""
        return getattr(self.config, f"{self.kind}_{name}")

    def project(self, x_bsm: Tensor, shared_kv: tuple[Tensor, Tensor] | None) -> tuple[Tensor, ...]:
        """Queries [b, s, h, d], keys and values [b, s, h or g, d]; ``shared_kv`` where the branches share their
        projections.
        """
        q_bshd = self.q_proj(x_bsm).unflatten(-1, (-1, self.config.head_dim))
        if shared_kv is not None:
            return q_bshd, *shared_kv
        return q_bshd, *(
            projection(x_bsm).unflatten(-1, (-1, self.config.head_dim)) for projection in (self.k_proj, self.v_proj)
        )

    def project_by_head(self, x_bsm: Tensor, shared_kv: tuple[Tensor, Tensor] | None) -> tuple[Tensor, ...]:
        """Queries, keys and values of each head, [b, s, h, d]."""
        q, k, v = self.project(x_bsm, shared_kv)
        if self.config.qkv == "shared" or self.option("kv") == "per_group":
            k, v = (repeat_groups(x, self.heads_per_group, dim=2) for x in (k, v))
        return q, k, v

    def norm_and_place(self, q: Tensor, k: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        """RMSNorm, then rotary positions, where the branch has them."""
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return (rotate(q, call), rotate(k, call)) if self.position == "rope" else (q, k)

    def gate(self, x_bsm: Tensor) -> Tensor | None:
        """What multiplies the outputs, [b, s, h, d or 1]."""
        return None if self.gate_proj is None else self.gate_proj(x_bsm)

    def forward(
        self, x_bsm: Tensor, call: Call, shared_kv: tuple[Tensor, Tensor] | None, cache: HydraHeadCacheLayer | None
    ) -> tuple[Tensor, Tensor | None]:
        """(outputs [b, s, h, d], gate or None); ``shared_kv`` of the living groups where the branches share them."""
        return self.outputs(x_bsm, call, shared_kv, cache), self.gate(x_bsm)

    @abstractmethod
    def outputs(
        self, x_bsm: Tensor, call: Call, shared_kv: tuple[Tensor, Tensor] | None, cache: HydraHeadCacheLayer | None
    ) -> Tensor:
        """What the heads read, [b, s, h, d]; the cache learns of these tokens."""

    def start(self, init: ModuleType) -> None:
        """Give the parameters that are no projection their start, with transformers' ``initialization``."""


class RecurrentHeads(Heads):
    """Heads that remember a state of constant size: "recurrent" among the kind's states, [b, h, d, d]."""

    def __init__(self, config: HydraHeadConfig, heads: list[int]) -> None:
        own = {name: getattr(config, f"{self.kind}_{name}") for name in ("kv", "qk_norm", "position", "gate")}
        kv_per_head, qk_norm = own["kv"] == "per_head", own["qk_norm"] == "rms"
        super().__init__(
            config, heads, kv_per_head=kv_per_head, qk_norm=qk_norm, position=own["position"], gate=own["gate"]
        )

    def recur(self, states: dict[str, Tensor], *tokens: Tensor) -> Tensor:
        """What ``read`` gives, its state kept among these."""
        out_bshd, states["recurrent"] = self.read(*tokens, state_bhdd=states.get("recurrent"))
        return out_bshd

    @abstractmethod
    def read(
        self, *tokens: Tensor, state_bhdd: Tensor | None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Outputs [b, s, h, d] and the new state, from queries, keys, values and the kind's gates of all tokens.

        Args:
            cu_seqlens: where sequences begin that stand behind each other in a single row, and where the last one ends;
                each then has its state, [sequences, h, d, d].
        """


def one_by_one(
    read: Callable[..., tuple[Tensor, Tensor]], tokens: Sequence[Tensor], states_bhdd: Tensor, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor]:
    """Sequences of a packed row, each read from its state on."""
    sizes = cu_seqlens.diff().tolist()
    each = zip(*(x.split(sizes, dim=1) for x in tokens), states_bhdd.split(1), strict=True)
    outs, states = zip(*(read(*own) for own in each), strict=True)
    return torch.cat(outs, dim=1), torch.cat(states)


def precise(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def take(x_bsc: Tensor, place_bk: Tensor) -> Tensor:
    """The tokens at some places of each row: [b, k, c]."""
    return x_bsc.gather(1, place_bk[..., None].expand(-1, -1, x_bsc.shape[-1]))
