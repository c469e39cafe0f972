# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The Lightning attention heads of a layer of an exported HydraHead model (arXiv 2401.04658, 2601.22156)."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from .cache_hydra_head import HydraHeadCacheLayer
from .chunked_linear_attention import chunked_linear_attention, recurrent_linear_attention
from .chunks import FEW_TOKENS
from .configuration_hydra_head import HydraHeadConfig
from .heads_hydra_head import Call, Padding, RecurrentHeads, one_by_one, precise, take


class LightningHeads(RecurrentHeads):
    """Linear attention with a fixed decay a head: projections, RMSNorm, rotary, recurrence.

    Head h of H decays at lightning_slope^((h + 1) / H) a token.
    """

    kind = "lightning"

    def __init__(self, config: HydraHeadConfig, heads: list[int]) -> None:
        super().__init__(config, heads)
        self.heads = heads

    def outputs(
        self, x_bsm: Tensor, call: Call, shared_kv: tuple[Tensor, Tensor] | None, cache: HydraHeadCacheLayer | None
    ) -> Tensor:
        q, k, v = self.project_by_head(x_bsm, shared_kv)
        q, k = self.norm_and_place(q, k, call)
        states = {} if cache is None else cache.states.setdefault(self.kind, {})
        if call.padding is None:
            return self.recur(states, q, k, v)
        of_padded = _past_padding(call.padding, q, k, v, self.log_decay(q.device), states.get("recurrent"))
        out_bshd, states["recurrent"] = of_padded
        return out_bshd

    def read(
        self, *tokens: Tensor, state_bhdd: Tensor | None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Decayed linear attention; tokens are queries, keys, values."""
        return linear_attention(*tokens, self.log_decay(tokens[0].device), state_bhdd, cu_seqlens)

    def log_decay(self, device: torch.device) -> Tensor:
        """[h], float64; made where it is used, because numbers from the host would hold up a GPU's one-token steps."""
        total = self.config.num_attention_heads
        rates = self.config.lightning_slope ** (torch.arange(1, total + 1, dtype=torch.float64, device=device) / total)
        return -torch.stack([rates[head] for head in self.heads])


def _past_padding(
    padding: Padding, q: Tensor, k: Tensor, v: Tensor, log_decay_h: Tensor, state_bhdd: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``linear_attention`` of the real tokens: they are moved to the front, and the state is what they leave behind."""
    q, k, v = (take(x.flatten(2), padding.front_bs).view_as(x) for x in (q, k, v))
    out_bshd, _ = linear_attention(q, k, v, log_decay_h, state_bhdd)
    after_bs = padding.count_b[:, None] - 1 - torch.arange(q.shape[1], device=q.device)
    left_bsh = (log_decay_h * after_bs.clamp(min=0)[..., None]).exp() * (after_bs >= 0)[..., None]
    k, v = precise(k), precise(v)
    state = torch.einsum("bsh,bshd,bshv->bhdv", left_bsh.to(k.dtype), k, v)
    if state_bhdd is not None:
        state = state + (log_decay_h * padding.count_b[:, None]).exp().to(k.dtype)[..., None, None] * state_bhdd
    return take(out_bshd.flatten(2), padding.back_bs).view_as(q), state


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay_h: Tensor,
    state_bhdd: Tensor | None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Decayed linear attention from a state on: outputs [b, s, h, d], new state; flash-linear-attention's kernels on a
    GPU.

    Written for flash-linear-attention 0.6.0. Not yet run on a GPU; in Triton's interpreter on a CPU the kernels gave
    what the torch functions give.
    """
    if q.is_cuda and q.dtype != torch.float64 and (kernels := _fla_kernels()):
        many_tokens, one_token = kernels
        kernel = one_token if q.shape[1] == 1 and not torch.is_grad_enabled() else many_tokens
        arguments = {"q": q, "k": k, "v": v, "g_gamma": log_decay_h.float(), "initial_state": state_bhdd}
        return kernel(**arguments, output_final_state=True, cu_seqlens=cu_seqlens)
    if cu_seqlens is not None:

        def read(q: Tensor, k: Tensor, v: Tensor, state_bhdd: Tensor) -> tuple[Tensor, Tensor]:
            return linear_attention(q, k, v, log_decay_h, state_bhdd)

        return one_by_one(read, (q, k, v), state_bhdd, cu_seqlens)
    rule = recurrent_linear_attention if q.shape[1] <= FEW_TOKENS else chunked_linear_attention
    return rule(q, k, v, log_decay_h, initial_state_bhdv=state_bhdd)


@functools.cache
def _fla_kernels() -> tuple[Callable[..., tuple[Tensor, Tensor]], ...] | None:
    """Flash-linear-attention's kernels for many tokens and for one, None where it is not installed."""
    try:
        from fla.ops.simple_gla import chunk_simple_gla, fused_recurrent_simple_gla
    except ImportError:
        return None
    return chunk_simple_gla, fused_recurrent_simple_gla
