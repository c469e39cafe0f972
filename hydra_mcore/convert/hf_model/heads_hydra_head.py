# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The two kinds of heads of a HydraHead layer (arXiv 2606.20097): full attention, and the gated delta rule.

Shape suffixes: b batch, s tokens of this call, t all tokens so far, h heads of the branch, g kv groups, m model width,
d head dimension, c channels. Heads of a branch stand in ascending order of their index in the layer.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .cache_hydra_head import HydraHeadCacheLayer
from .chunked_delta_rule import chunked_delta_rule, recurrent_delta_rule
from .configuration_hydra_head import HydraHeadConfig

GATE_ACTIVATIONS = {"sigmoid": torch.sigmoid, "silu": F.silu}
FEW_TOKENS = 8  # up to so many the recurrence is less work than one chunk of 64 rows


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


class Heads(nn.Module):
    """What both branches of a layer have: projections, RMSNorm and rotary positions of queries and keys, an output
    gate.
    """

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

    def norm_and_place(self, q: Tensor, k: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        """RMSNorm, then rotary positions, where the branch has them."""
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return (rotate(q, call), rotate(k, call)) if self.position == "rope" else (q, k)

    def gate(self, x_bsm: Tensor) -> Tensor | None:
        """What multiplies the outputs, [b, s, h, d or 1]."""
        return None if self.gate_proj is None else self.gate_proj(x_bsm)


class FullAttentionHeads(Heads):
    """Causal softmax attention; query heads of one kv group share its keys and values.

    Keys and values, in the cache too, are those of the groups that have an FA head. Queries are multiplied by
    ln(t + a) / ln(a), t the position from 0 (HypeNet, arXiv 2601.22156, Eq 11).
    """

    def __init__(self, config: HydraHeadConfig, heads: list[int]) -> None:
        super().__init__(
            config, heads, kv_per_head=False, qk_norm=config.qk_norm, position=config.fa_position, gate=config.fa_gate
        )

    def forward(
        self, x_bsm: Tensor, call: Call, shared_kv: tuple[Tensor, Tensor] | None, memory: HydraHeadCacheLayer | None
    ) -> tuple[Tensor, Tensor | None]:
        """(outputs [b, s, h, d], gate or None); ``shared_kv`` of the living groups where the branches share them."""
        q, k, v = self.project(x_bsm, shared_kv)
        q, k = self.norm_and_place(q, k, call)
        if call.query_scale_bs11 is not None:
            q = q * call.query_scale_bs11
        q_bhsd, k_bgtd, v_bgtd = (x.transpose(1, 2) for x in (q, k, v))
        if memory is not None:
            k_bgtd, v_bgtd = memory.update(k_bgtd, v_bgtd)
        attend = self._attend_one if q_bhsd.shape[2] == 1 else self._attend
        return attend(q_bhsd, k_bgtd, v_bgtd, call.mask_b1st).transpose(1, 2), self.gate(x_bsm)

    def _attend(self, q_bhsd: Tensor, k_bgtd: Tensor, v_bgtd: Tensor, mask_b1st: Tensor | None) -> Tensor:
        k_bhtd, v_bhtd = (repeat_groups(x, self.heads_per_group, dim=1) for x in (k_bgtd, v_bgtd))
        s, t = q_bhsd.shape[2], k_bgtd.shape[2]
        if mask_b1st is None and s < t:
            mask_b1st = causal_lower_right(s, t)  # a GPU's kernels know it by name: no mask of s * t entries is made
        return F.scaled_dot_product_attention(q_bhsd, k_bhtd, v_bhtd, attn_mask=mask_b1st, is_causal=mask_b1st is None)

    def _attend_one(self, q_bh1d: Tensor, k_bgtd: Tensor, v_bgtd: Tensor, mask_b11t: Tensor | None) -> Tensor:
        """One token: the heads of a group are its query rows, so that keys and values are read once, not copied per
        head.
        """
        most = max(self.heads_per_group)
        groups = q_bh1d[:, :, 0].split(self.heads_per_group, dim=1)
        rows_bgrd = torch.stack([F.pad(q, (0, 0, 0, most - q.shape[1])) for q in groups], dim=1)
        out_bgrd = F.scaled_dot_product_attention(rows_bgrd, k_bgtd, v_bgtd, attn_mask=mask_b11t)
        rows = [out[:, :count] for out, count in zip(out_bgrd.unbind(1), self.heads_per_group, strict=True)]
        return torch.cat(rows, dim=1)[:, :, None]


class GatedDeltaHeads(Heads):
    """The gated delta rule (arXiv 2412.06464): projections, short conv, RMSNorm, rotary, L2 norm, recurrence.

    log decay = -exp(A_log) * softplus(W_a x + dt), write = max * sigmoid(W_b x + b).
    """

    def __init__(self, config: HydraHeadConfig, heads: list[int]) -> None:
        own_kv, normed = config.gdn_kv == "per_head", config.gdn_qk_norm == "rms"
        super().__init__(
            config, heads, kv_per_head=own_kv, qk_norm=normed, position=config.gdn_position, gate=config.gdn_gate
        )
        self.conv = None
        if config.gdn_conv_kernel:
            self.conv = ShortConv(len(heads) * 3 * config.head_dim, config.gdn_conv_kernel, config.gdn_conv_activation)
        self.decay_proj, self.write_proj = (nn.Linear(config.hidden_size, len(heads)) for _ in range(2))
        self.A_log = nn.Parameter(torch.zeros(len(heads)))

    def forward(
        self, x_bsm: Tensor, call: Call, shared_kv: tuple[Tensor, Tensor] | None, memory: HydraHeadCacheLayer | None
    ) -> tuple[Tensor, Tensor | None]:
        """(outputs [b, s, h, d], gate or None); ``shared_kv`` of the living groups where the branches share them."""
        q, k, v = self.project(x_bsm, shared_kv)
        if self.config.gdn_kv == "per_group":
            k, v = (repeat_groups(x, self.heads_per_group, dim=2) for x in (k, v))
        conv_state, state_bhdd = (None, None) if memory is None else (memory.conv_state, memory.recurrent_state)
        if self.conv is not None:
            mixed_bsc, conv_state = self.conv(torch.cat([q, k, v], dim=-1).flatten(2), call.padding, conv_state)
            q, k, v = mixed_bsc.unflatten(2, (-1, 3 * self.config.head_dim)).chunk(3, dim=-1)
        q, k = (F.normalize(_precise(x), dim=-1).to(x.dtype) for x in self.norm_and_place(q, k, call))
        out_bshd, state_bhdd = delta_rule(q, k, v, *self.decay_and_write(x_bsm, call.padding), state_bhdd)
        if memory is not None:
            memory.conv_state, memory.recurrent_state = conv_state, state_bhdd
        return out_bshd, self.gate(x_bsm)

    def decay_and_write(self, x_bsm: Tensor, padding: Padding | None) -> tuple[Tensor, Tensor]:
        """Log decay (<= 0) and write strength, [b, s, h] in float32 or more; padding forgets and writes nothing."""
        log_decay_bsh = -_precise(self.A_log).exp() * F.softplus(_precise(self.decay_proj(x_bsm)))
        write_bsh = self.config.gdn_write_max * torch.sigmoid(_precise(self.write_proj(x_bsm)))
        if padding is not None:
            log_decay_bsh, write_bsh = (x * padding.real_bs[..., None] for x in (log_decay_bsh, write_bsh))
        return log_decay_bsh, write_bsh


class ShortConv(nn.Module):
    """Causal depthwise convolution over the last ``taps`` real tokens: [b, s, c] -> same."""

    def __init__(self, channels: int, taps: int, activation: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels, 1, taps))
        self.activation = activation

    def forward(self, x_bsc: Tensor, padding: Padding | None, before_bkc: Tensor | None) -> tuple[Tensor, Tensor]:
        """``before_bkc`` are the taps - 1 inputs before these, zeros unless given; the second result are the last ones
        now.
        """
        b, s, c = x_bsc.shape
        if padding is not None:
            x_bsc = _take(x_bsc, padding.front_bs)
        if before_bkc is None:
            before_bkc = x_bsc.new_zeros(b, self.weight.shape[-1] - 1, c)
        seen = torch.cat([before_bkc, x_bsc], dim=1)
        out_bsc = F.conv1d(seen.mT, self.weight, groups=c).mT
        if self.activation == "silu":
            out_bsc = F.silu(out_bsc)
        if padding is None:
            return out_bsc, seen[:, s:].clone()  # not a view, which would keep all of ``seen``
        last_bk = padding.count_b[:, None] + torch.arange(before_bkc.shape[1], device=x_bsc.device)
        return _take(out_bsc, padding.back_bs), _take(seen, last_bk)


def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, log_decay_bsh: Tensor, write_bsh: Tensor, state_bhdd: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The gated delta rule from a state on: outputs [b, s, h, d], new state; flash-linear-attention's kernels on a GPU.

    Written for flash-linear-attention 0.6.0, whose one-token kernel has no backward. Not yet run on a GPU; in Triton's
    interpreter on a CPU both kernels gave what the torch functions give (float32 and float16).
    """
    if q.is_cuda and q.dtype != torch.float64 and (kernels := _fla_kernels()):
        many_tokens, one_token = kernels
        kernel = one_token if q.shape[1] == 1 and not torch.is_grad_enabled() else many_tokens
        arguments = {"q": q, "k": k, "v": v, "g": log_decay_bsh, "beta": write_bsh, "initial_state": state_bhdd}
        return kernel(**arguments, output_final_state=True, use_qk_l2norm_in_kernel=False)
    rule = recurrent_delta_rule if q.shape[1] <= FEW_TOKENS else chunked_delta_rule
    return rule(q, k, v, log_decay_bsh, write_bsh, initial_state_bhdv=state_bhdd)


@functools.cache
def _fla_kernels() -> tuple[Callable[..., tuple[Tensor, Tensor]], ...] | None:
    """Flash-linear-attention's kernels for many tokens and for one, None where it is not installed."""
    try:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule
    except ImportError:
        return None
    return chunk_gated_delta_rule, fused_recurrent_gated_delta_rule


def _precise(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _take(x_bsc: Tensor, place_bk: Tensor) -> Tensor:
    """The tokens at some places of each row: [b, k, c]."""
    return x_bsc.gather(1, place_bk[..., None].expand(-1, -1, x_bsc.shape[-1]))
