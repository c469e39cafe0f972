# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""All communication that we write ourselves: between the contiguous parts of a sequence, forward and backward.

Every function takes its process group; with a group of one it communicates nothing. All ranks of a group must call
alike, in the same order, and use the result, or a backward pass would wait for a rank that has nothing to send.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor

Group = dist.ProcessGroup


def gather_parts(x: Tensor, group: Group) -> Tensor:
    """Join all ranks' parts along axis 0: [s, ...] -> [s * ranks, ...]; backward sums each part's gradient over
    ranks.
    """
    if group.size() == 1:
        return x
    if x.numel() == 0:  # a rank without heads; so are its peers, and nothing need be sent
        return x.repeat(group.size(), *[1] * (x.dim() - 1))
    return gather_from_sequence_parallel_region(x.contiguous(), group=group)


def swap_with_mirror(x: Tensor, group: Group) -> Tensor:
    """Exchange a tensor with rank ``size - 1 - rank``; backward exchanges the gradients."""
    return _Exchange.apply(x, group, *[group.size() - 1 - group.rank()] * 2) if group.size() > 1 and x.numel() else x


def from_previous(x: Tensor, group: Group) -> Tensor:
    """What the previous rank passes here, zeros on the first; backward passes the gradient back."""
    rank = group.rank()
    after, before = (rank + 1 if rank + 1 < group.size() else None), (rank - 1 if rank else None)
    return _Exchange.apply(x, group, after, before)


def state_from_previous(transition: Tensor, offset_bhdv: Tensor, group: Group) -> Tensor:
    """The recurrent state before this rank's part: [b, h, d, v].

    A linear recurrence maps the state before a part to the state after it as S -> A S + B. So one gather of all ranks'
    (A, B) replaces a chain of sends: the first rank starts from zero and every rank folds what precedes it.

    Args:
        transition: A of this part, [b, h, d, d], or its diagonal [b, h, d, 1]; zeros when the state after it does not
            depend on the state before it.
        offset_bhdv: B of this part, the state after it when it starts from zero.
    """
    x = transition.shape[-1]
    pairs = gather_parts(torch.cat([transition, offset_bhdv], dim=-1)[None], group)
    state_bhdv = pairs[:0, ..., x:].sum(dim=0)  # zeros, but joined to the gather, whose backward no rank may miss
    for pair in pairs[: group.rank()].unbind():
        kept = pair[..., :x] * state_bhdv if x == 1 else pair[..., :x] @ state_bhdv
        state_bhdv = kept + pair[..., x:]
    return state_bhdv


def from_last(x: Tensor, group: Group) -> Tensor:
    """What the last rank passes, on all ranks; no backward."""
    x = x.clone()
    if group.size() > 1 and x.numel():
        dist.broadcast(x, group=group, group_src=group.size() - 1)
    return x


def merge_softmax(out_bhsv: Tensor, total_bhs1: Tensor, group: Group) -> Tensor:
    """Attention over the keys of all ranks, from each rank's attention over its own: [b, h, s, v].

    Args:
        total_bhs1: log of the sum of exp(score) over this rank's keys.
    """
    if group.size() == 1:
        return out_bhsv
    out_rbhsv, total_rbhs1 = gather_parts(torch.cat([out_bhsv, total_bhs1], dim=-1)[None], group).split(
        [out_bhsv.shape[-1], 1], dim=-1
    )
    return (out_rbhsv * total_rbhs1.softmax(dim=0)).sum(dim=0)


class _Exchange(torch.autograd.Function):
    """Send to one rank and receive as much from another; either may be None (then nothing is sent, or zeros come)."""

    @staticmethod
    def forward(ctx, x: Tensor, group: Group, to: int | None, source: int | None) -> Tensor:
        ctx.group, ctx.to, ctx.source = group, to, source
        return _send_receive(x, group, to, source)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return _send_receive(gradient, ctx.group, ctx.source, ctx.to), None, None, None


def _send_receive(x: Tensor, group: Group, to: int | None, source: int | None) -> Tensor:
    if to == source == group.rank():
        return x.clone()
    received = torch.zeros_like(x, memory_format=torch.contiguous_format)
    operations = []
    if to is not None:
        operations.append(dist.P2POp(dist.isend, x.contiguous(), group=group, group_peer=to))
    if source is not None:
        operations.append(dist.P2POp(dist.irecv, received, group=group, group_peer=source))
    for work in dist.batch_isend_irecv(operations) if operations else ():
        work.wait()
    return received
