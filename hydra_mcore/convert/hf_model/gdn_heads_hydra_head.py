# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Gated DeltaNet heads of HydraHead models; shape suffixes as in heads_hydra_head.py."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cache_hydra_head import HydraHeadCacheLayer
from .chunked_delta_rule import chunked_delta_rule, recurrent_delta_rule
from .chunks import FEW_TOKENS
from .configuration_hydra_head import HydraHeadConfig
from .heads_hydra_head import Call, Padding, RecurrentHeads, one_by_one, precise, take


class GatedDeltaHeads(RecurrentHeads):
    """The gated delta rule (arXiv 2412.06464): projections, short conv, RMSNorm, rotary, L2 norm, recurrence.

    log decay = -exp(A_log) * softplus(W_a x + dt), write = max * sigmoid(W_b x + b).
    """

    kind = "gdn"

    def __init__(self, config: HydraHeadConfig, heads: list[int]) -> None:
        super().__init__(config, heads)
        self.conv = None
        if taps := self.option("conv_kernel"):
            self.conv = ShortConv(len(heads) * 3 * config.head_dim, taps, self.option("conv_activation"))
        self.add_decay(len(heads))
        self.write_proj = nn.Linear(config.hidden_size, len(heads))
        self.A_log = nn.Parameter(torch.zeros(len(heads)))

    def add_decay(self, heads: int) -> None:
        """One decay a head."""
        self.decay_proj = nn.Linear(self.config.hidden_size, heads)

    def outputs(
        self, x_bsm: Tensor, call: Call, shared_kv: tuple[Tensor, Tensor] | None, cache: HydraHeadCacheLayer | None
    ) -> Tensor:
        q, k, v = self.project_by_head(x_bsm, shared_kv)
        states = {} if cache is None else cache.states.setdefault(self.kind, {})
        if self.conv is not None:
            mixed_bsc = self.convolve(states, torch.cat([q, k, v], dim=-1).flatten(2), call.padding)
            q, k, v = mixed_bsc.unflatten(2, (-1, 3 * self.config.head_dim)).chunk(3, dim=-1)
        q, k = (F.normalize(precise(x), dim=-1).to(x.dtype) for x in self.norm_and_place(q, k, call))
        return self.recur(states, q, k, v, *self.decay_and_write(x_bsm, call.padding))

    def convolve(self, states: dict[str, Tensor], qkv_bsc: Tensor, padding: Padding | None) -> Tensor:
        """The short convolution, its last inputs kept among the states: "conv", [b, taps - 1, c]."""
        mixed_bsc, states["conv"] = self.conv(qkv_bsc, padding, states.get("conv"))
        return mixed_bsc

    def read(
        self, *tokens: Tensor, state_bhdd: Tensor | None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The delta rule; tokens are queries, keys, values, log decay, write strength."""
        return delta_rule(*tokens, state_bhdd, cu_seqlens)

    def decay_and_write(self, x_bsm: Tensor, padding: Padding | None) -> tuple[Tensor, Tensor]:
        """Log decay (<= 0) [b, s, h] or [b, s, h, d], write strength [b, s, h], in float32 or more; padding forgets and
        writes nothing.
        """
        log_decay = self.log_decay(x_bsm)
        write_bsh = self.option("write_max") * torch.sigmoid(precise(self.write_proj(x_bsm)))
        if padding is not None:
            real_bs1 = padding.real_bs[..., None]
            write_bsh = write_bsh * real_bs1
            log_decay = log_decay * (real_bs1 if log_decay.dim() == 3 else real_bs1[..., None])
        return log_decay, write_bsh

    def log_decay(self, x_bsm: Tensor) -> Tensor:
        """[b, s, h]."""
        return -precise(self.A_log).exp() * F.softplus(precise(self.decay_proj(x_bsm)))

    @torch.no_grad()
    def start(self, init: ModuleType) -> None:
        """Long memory, half-open write gate."""
        for start_at_zero in (self.A_log, self.decay_proj.weight, self.write_proj.weight, self.write_proj.bias):
            init.zeros_(start_at_zero)
        init.constant_(self.decay_proj.bias, math.log(math.expm1(math.log(2.0) / self.option("half_life"))))


class ShortConv(nn.Module):
    """Causal depthwise convolution over the last ``taps`` real tokens: [b, s, c] -> same."""

    def __init__(self, channels: int, taps: int, activation: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels, 1, taps))
        self.activation = activation

    @torch.no_grad()
    def start(self, init: ModuleType) -> None:
        """The identity."""
        identity = torch.zeros_like(self.weight)
        identity[..., -1] = 1
        init.copy_(self.weight, identity)  # whole: of a loaded weight, transformers 5.0 knows the whole alone

    def forward(self, x_bsc: Tensor, padding: Padding | None, before_bkc: Tensor | None) -> tuple[Tensor, Tensor]:
        """``before_bkc`` are the taps - 1 inputs before these, zeros unless given; the second result are the last ones
        now.
        """
        b, s, c = x_bsc.shape
        if padding is not None:
            x_bsc = take(x_bsc, padding.front_bs)
        if before_bkc is None:
            before_bkc = x_bsc.new_zeros(b, self.weight.shape[-1] - 1, c)
        seen = torch.cat([before_bkc, x_bsc], dim=1)
        out_bsc = F.conv1d(seen.mT, self.weight, groups=c).mT
        if self.activation == "silu":
            out_bsc = F.silu(out_bsc)
        if padding is None:
            return out_bsc, seen[:, s:].clone()  # not a view, which would keep all of ``seen``
        last_bk = padding.count_b[:, None] + torch.arange(before_bkc.shape[1], device=x_bsc.device)
        return take(out_bsc, padding.back_bs), take(seen, last_bk)


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    write_bsh: Tensor,
    state_bhdd: Tensor | None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The delta rule from a state on: outputs [b, s, h, d], new state; flash-linear-attention's kernels on a GPU.

    Written for flash-linear-attention 0.6.0, whose one-token kernels have no backward. Not yet run on a GPU; in
    Triton's interpreter on a CPU the kernels gave what the torch functions give.
    """
    if q.is_cuda and q.dtype != torch.float64 and (kernels := _fla_kernels(log_decay.dim() == 4)):
        many_tokens, one_token = kernels
        kernel = one_token if q.shape[1] == 1 and not torch.is_grad_enabled() else many_tokens
        arguments = {"q": q, "k": k, "v": v, "g": log_decay, "beta": write_bsh, "initial_state": state_bhdd}
        return kernel(**arguments, output_final_state=True, use_qk_l2norm_in_kernel=False, cu_seqlens=cu_seqlens)
    if cu_seqlens is not None:
        return one_by_one(delta_rule, (q, k, v, log_decay, write_bsh), state_bhdd, cu_seqlens)
    rule = recurrent_delta_rule if q.shape[1] <= FEW_TOKENS else chunked_delta_rule
    return rule(q, k, v, log_decay, write_bsh, initial_state_bhdv=state_bhdd)


@functools.cache
def _fla_kernels(by_channel: bool) -> tuple[Callable[..., tuple[Tensor, Tensor]], ...] | None:
    """Flash-linear-attention's kernels for many tokens and for one, None where it is not installed."""
    try:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule
        from fla.ops.kda import chunk_kda, fused_recurrent_kda
    except ImportError:
        return None
    if by_channel:
        return chunk_kda, fused_recurrent_kda
    return chunk_gated_delta_rule, fused_recurrent_gated_delta_rule
