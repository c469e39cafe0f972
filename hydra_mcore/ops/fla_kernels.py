# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The border to flash-linear-attention: its names, layouts and limits are known here and nowhere else.

``serve`` is the one switch: where it says no, the callers take their torch functions. Written for 0.6.0; not yet run on
a GPU. In Triton's interpreter on a CPU every function here gives what its torch counterpart gives, gradients included.

Two of its kernels are left out on purpose. The fused decay gate takes log(1 + exp(x)) in float32, which is 0.25% off at
a half-life of 100,000 tokens and 3% at a million: heads that remember long would forget at another rate on a GPU. And
the L2 norm inside the delta rule's kernel is the same kernel as ``unit_length``, but for an epsilon that changes short
keys.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from hydra_mcore.sequence import SequencePart

if TYPE_CHECKING:
    from hydra_mcore.ops.context_parallel import Group  # it imports Megatron

NEVER_ZERO = 1e-24  # beside a squared length: 1e-12 beside a length, as in F.normalize


class Kernels(NamedTuple):
    """Flash-linear-attention's functions, under our names."""

    delta: Callable[..., tuple[Tensor, Tensor | None]]
    delta_few: Callable[..., tuple[Tensor, Tensor]]
    channel_delta: Callable[..., tuple[Tensor, Tensor | None]]
    channel_delta_few: Callable[..., tuple[Tensor, Tensor]]
    linear: Callable[..., tuple[Tensor, Tensor]]
    linear_few: Callable[..., tuple[Tensor, Tensor]]
    conv: Callable[..., tuple[Tensor, Tensor | None]]
    l2norm: Callable[..., Tensor]


@functools.cache
def kernels() -> Kernels | None:
    """The package's kernels, or None with one warning where it is not installed."""
    try:  # on demand: the package needs a GPU build of triton
        from fla.modules.causal_conv1d import causal_conv1d
        from fla.modules.norm.l2norm import l2norm
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule
        from fla.ops.kda import chunk_kda, fused_recurrent_kda
        from fla.ops.simple_gla import chunk_simple_gla, fused_recurrent_simple_gla
    except ImportError as error:
        warnings.warn(
            f"recurrent heads: no flash-linear-attention 0.6 ({error}); torch functions run on the GPU, slower. "
            "Fix: pip install 'flash-linear-attention>=0.6'",
            stacklevel=3,
        )
        return None
    return Kernels(
        chunk_gated_delta_rule, fused_recurrent_gated_delta_rule, chunk_kda, fused_recurrent_kda, chunk_simple_gla,
        fused_recurrent_simple_gla, causal_conv1d, l2norm,
    )  # fmt: skip


def serve(x: Tensor) -> bool:
    """Whether the kernels take such a tensor: on a GPU, of up to 32 bits (float32 products then run in TF32), not
    empty.

    An empty grid is an error to a kernel; tensor-parallel ranks may own no head of a kind.
    """
    return x.is_cuda and x.dtype != torch.float64 and x.numel() > 0 and kernels() is not None


def unit_length(x: Tensor) -> Tensor:
    """``F.normalize(x, dim=-1)``, with sums in float32, in the dtype of ``x``."""
    return kernels().l2norm(x, eps=NEVER_ZERO)


def short_conv(x_sbhc: Tensor, weight_nt: Tensor, bounds: Sequence[int] | None, activation: str | None) -> Tensor:
    """A causal depthwise convolution over whole rows or packed documents: [s, b, h, c], summed in float32.

    Args:
        weight_nt: taps of all h * c channels, the newest token's last.
        bounds: boundaries 0 < ... < s of the documents packed into the one row.
        activation: "silu" or None.
    """
    cu_seqlens = {} if bounds is None else _boundaries(torch.tensor(bounds), x_sbhc.device)
    out_bsn, _ = kernels().conv(x_sbhc.flatten(2).transpose(0, 1), weight_nt, activation=activation, **cu_seqlens)
    return out_bsn.transpose(0, 1).unflatten(2, x_sbhc.shape[2:])


def delta_rule(
    inputs: Sequence[Tensor],
    scale: float | None,
    initial_state_bhdv: Tensor | None,
    bounds: Sequence[int] | None,
    few: bool = False,
) -> tuple[Tensor, Tensor]:
    """The delta rule with decay, one a head or one a key channel, on this rank alone.

    Arguments as in ``ops.gated_delta``, ``inputs`` the first five of them; ``bounds`` as in ``short_conv``. ``few``
    tokens take the recurrent kernel, where no gradient is wanted: it has no backward.
    """
    kernel = _delta_kernel(inputs, few)
    return kernel(
        **_named(inputs),
        scale=scale,
        initial_state=None if initial_state_bhdv is None else initial_state_bhdv.float(),
        output_final_state=True,
        **({} if bounds is None else _boundaries(torch.tensor(bounds), inputs[0].device)),
    )


def delta_rule_on_parts(inputs: Sequence[Tensor], scale: float | None, part: SequencePart, cp_group: Group) -> Tensor:
    """The package's own context parallelism, which takes one row at a time and the whole row's boundaries."""
    from fla.ops.cp import build_cp_context

    cu_seqlens = torch.tensor(part.documents)
    context = build_cp_context(cu_seqlens.to(inputs[0].device), group=cp_group, cu_seqlens_cpu=cu_seqlens)
    rows = [
        _delta_kernel(inputs)(**_named([x[row : row + 1] for x in inputs]), scale=scale, cp_context=context)[0]
        for row in range(inputs[0].shape[0])
    ]
    return torch.cat(rows)


def linear_attention(
    inputs: Sequence[Tensor],
    scale: float | None,
    initial_state_bhdv: Tensor | None,
    bounds: Sequence[int] | None,
    few: bool = False,
) -> tuple[Tensor, Tensor]:
    """Linear attention with a fixed decay a head; arguments as in ``ops.linear_attention`` and ``delta_rule``.

    Log decays are at least -1.4, which those of Lightning heads are: of rows that fill up a last chunk of 64, the
    kernel takes 0 * exp(-63 log decay), which beyond float32's range is NaN.
    """
    q, k, v, log_decay_h = inputs
    kernel = kernels().linear_few if few and not torch.is_grad_enabled() else kernels().linear
    return kernel(
        q=q,
        k=k.to(q.dtype),
        v=v.to(q.dtype),
        g_gamma=log_decay_h.float(),
        scale=scale,
        initial_state=None if initial_state_bhdv is None else initial_state_bhdv.float(),
        output_final_state=True,
        **({} if bounds is None else _boundaries(torch.tensor(bounds), q.device)),
    )


def _delta_kernel(inputs: Sequence[Tensor], few: bool = False) -> Callable[..., tuple[Tensor, Tensor | None]]:
    by_channel, few = inputs[3].dim() == 4, few and not torch.is_grad_enabled()
    if by_channel:
        return kernels().channel_delta_few if few else kernels().channel_delta
    return kernels().delta_few if few else kernels().delta


def _named(inputs: Sequence[Tensor]) -> dict[str, Any]:
    """The five inputs under the package's names, all vectors in one dtype."""
    q, k, v, log_decay, write = inputs
    return {"q": q, "k": k.to(q.dtype), "v": v.to(q.dtype), "g": log_decay.float(), "beta": write.float()}


def _boundaries(cu_seqlens: Tensor, device: torch.device) -> dict[str, Tensor]:
    """Boundaries of documents; those on the host spare the kernels a look at the GPU's."""
    return {"cu_seqlens": cu_seqlens.to(device, torch.long), "cu_seqlens_cpu": cu_seqlens.to("cpu", torch.long)}
