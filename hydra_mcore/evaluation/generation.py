# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Greedy decoding on the training layouts: the prompt is read once, then one token after the other from the cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from hydra_mcore.costs.batch_sizes import SHORTEST_PART
from hydra_mcore.model.cache import DecodingCache
from hydra_mcore.model.forward import last_hidden
from hydra_mcore.ops.context_parallel import from_last
from hydra_mcore.sequence import SequencePart

if TYPE_CHECKING:
    from hydra_mcore.evaluation.parallel import ParallelModel


@torch.no_grad()
def greedy(model: ParallelModel, ids_bs: Tensor, room: int, stop: frozenset[int]) -> Tensor:
    """The ``room`` likeliest next tokens of each row, one by one: int64 [b, room] on the CPU of every rank.

    Behind the first token of ``stop`` that token is repeated. All ranks of a replica call alike. Weights and modules
    are left as they are. Beside a forward pass it takes memory for keys and values, of the prompt's part that this rank
    has.

    Args:
        ids_bs: int64, the prompts, all of one length.
    """
    written_bs = torch.zeros(len(ids_bs), room, dtype=torch.int64)
    ended_b = torch.zeros(len(ids_bs), dtype=torch.bool)
    stop_w = torch.tensor(sorted(stop), dtype=torch.int64)
    divided = ranks_that_divide(model)
    short = divided > 1 and ids_bs.shape[1] < SHORTEST_PART * divided
    following = in_whole_rows(model, ids_bs) if short else from_memory(model, ids_bs, room)
    for step, (token_b, _) in zip(range(room), following, strict=False):
        written_bs[:, step] = torch.where(ended_b, written_bs[:, step - 1], token_b)
        ended_b |= torch.isin(token_b, stop_w)
        if ended_b.all():
            written_bs[:, step:] = written_bs[:, step : step + 1]
            break
    return written_bs


def from_memory(model: ParallelModel, ids_bs: Tensor, room: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    """What follows the prompts, at most ``room`` tokens: the next of each row, int64 [b] on the CPU, one after the
    other.

    With it comes, on the last pipeline stage, what chose it: this rank's part of the logits, [b, w]; of
        context-parallel
    ranks the last one's are those that count. To be run without gradients.
    """
    groups, length = model.groups, ids_bs.shape[1]
    prompt = length - length % ranks_that_divide(model)  # the few tokens left are read as new ones are
    cache = DecodingCache(SequencePart(prompt, groups.cp.size(), groups.cp.rank()), length + room)
    output, new_bs = last_hidden(model.chunks, ids_bs[:, :prompt], cache=cache), ids_bs[:, prompt:]
    while True:
        if new_bs.shape[1]:
            cache.follow(new_bs.shape[1])
            output = last_hidden(model.chunks, new_bs, cache=cache)
        token_b, logits_bw = torch.zeros(len(ids_bs), dtype=torch.int64, device=torch.cuda.current_device()), None
        if output is not None:
            hidden_sbm, weight_wm = output
            logits_bw = F.linear(hidden_sbm[-1], weight_wm)
            token_b = model.likeliest(logits_bw)
        for group in (groups.cp, groups.pp):
            token_b = from_last(token_b, group)
        yield token_b.cpu(), logits_bw
        new_bs = token_b[:, None]


def in_whole_rows(model: ParallelModel, ids_bs: Tensor) -> Iterator[tuple[Tensor, None]]:
    """Greedy decoding without a cache, for prompts too short for the layout: a pass over padded rows for each token."""
    while True:
        ids_bs = F.pad(ids_bs, (0, 1))
        ids_bs[:, -1:] = model.predicted(ids_bs, ids_bs.shape[1] - 1)
        yield ids_bs[:, -1].cpu(), None


def ranks_that_divide(model: ParallelModel) -> int:
    """How many ranks a row is divided among."""
    return model.groups.cp.size() * (model.groups.tp.size() if model.config.sequence_parallel else 1)
