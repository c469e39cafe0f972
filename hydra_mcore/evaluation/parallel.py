# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""A model on many ranks, as evaluation sees it: tensor, sequence, context, pipeline and data parallel alike.

Memory beyond the weights is that of one layer's forward pass over the prompts: only the positions asked for enter the
output layer, some at a time, and the vocabulary stays spread over its ranks.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from torch import Tensor

from hydra_mcore.costs.batch_sizes import LOGITS_AT_ONCE, SHORTEST_PART
from hydra_mcore.evaluation.generation import greedy
from hydra_mcore.model.forward import last_hidden
from hydra_mcore.ops.context_parallel import gather_parts


class ParallelModel:
    """An ``EvaluatedModel`` of this rank's model chunks (several where pipeline stages are virtual), in evaluation
    mode.

    All ranks of a replica call alike, with the same ids; replicas are the data-parallel ranks.
    """

    def __init__(self, chunks: list[GPTModel]) -> None:
        self.chunks, self.config, self.groups = chunks, chunks[0].config, chunks[0].pg_collection
        self.replica, self.replicas = self.groups.dp.rank(), self.groups.dp.size()

    @torch.no_grad()
    def predicted(self, ids_bs: Tensor, start: int) -> Tensor:
        """int64 [b, s - start]: the likeliest token at each position from ``start`` (at least 1) on, given all before
        it.
        """
        found_bp = torch.zeros(
            len(ids_bs), ids_bs.shape[1] - start, dtype=torch.int64, device=torch.cuda.current_device()
        )
        for columns, logits_pbw in self._logits(ids_bs, start):
            found_bp[:, columns] = self.likeliest(logits_pbw).T
        return self._on_all_ranks(found_bp)

    @torch.no_grad()
    def token_losses(self, ids_bs: Tensor) -> tuple[Tensor, Tensor]:
        """Negative log likelihood (nats, float32) of every token but the first, and the likeliest token there: both [b,
        s - 1].
        """
        next_bp = ids_bs[:, 1:].to(torch.cuda.current_device())
        loss_bp, found_bp = torch.zeros_like(next_bp, dtype=torch.float32), torch.zeros_like(next_bp)
        for columns, logits_pbw in self._logits(ids_bs, 1):
            found_bp[:, columns] = self.likeliest(logits_pbw).T
            loss_pb = vocab_parallel_cross_entropy(
                logits_pbw.float(), next_bp[:, columns].T.contiguous(), tp_group=self.groups.tp
            )
            loss_bp[:, columns] = loss_pb.T
        return self._on_all_ranks(loss_bp), self._on_all_ranks(found_bp)

    def generated(self, ids_bs: Tensor, room: int, stop: frozenset[int]) -> Tensor:
        """int64 [b, room]: greedy decoding; behind the first token of ``stop`` that token is repeated."""
        return greedy(self, ids_bs, room, stop)

    def collect[T](self, mine: list[T]) -> list[list[T]]:
        """The lists of all replicas, by replica."""
        lists: list[list[T]] = [[]] * self.replicas
        torch.distributed.all_gather_object(lists, mine, group=self.groups.dp)
        return lists

    def padded(self, ids_bs: Tensor) -> Tensor:
        """The ids with as many zeros behind them as this layout needs; heads are causal, so what stands before does not
        see them.
        """
        tp, cp = self.groups.tp.size() if self.config.sequence_parallel else 1, self.groups.cp.size()
        unit = tp if cp == 1 else 2 * cp * tp  # under context parallelism the halves of parts change places
        length = ids_bs.shape[1] if cp == 1 else max(ids_bs.shape[1], SHORTEST_PART * cp)
        return F.pad(ids_bs, (0, length + -length % unit - ids_bs.shape[1]))

    def likeliest(self, logits_w: Tensor) -> Tensor:
        """int64 [...]: the token with the largest of this rank's and its peers' logits [..., w], the first one of
        equals.
        """
        value, index = logits_w.max(-1)  # the first of equals, as argmax below
        best_2 = torch.stack(
            [value.double(), (index + self.groups.tp.rank() * logits_w.shape[-1]).double()]
        )  # both exact
        value_r, token_r = gather_parts(best_2[None], self.groups.tp).unbind(1)
        return token_r.gather(0, value_r.argmax(0, keepdim=True))[0].long()

    def _logits(self, ids_bs: Tensor, start: int) -> Iterator[tuple[slice, Tensor]]:
        """This rank's logits [p, b, w] that predict the tokens from ``start`` on, a few at a time.

        Each comes with the columns p of [b, s - start] that it is for. The last pipeline stage gets those of its
        context-parallel part, the others none.
        """
        length, padded_bs = ids_bs.shape[1], self.padded(ids_bs)
        if (output := last_hidden(self.chunks, padded_bs)) is None:
            return
        (hidden_sbm, weight_wm), before = output, self.groups.cp.rank() * padded_bs.shape[1] // self.groups.cp.size()
        size = max(1, LOGITS_AT_ONCE // (len(ids_bs) * len(weight_wm)))
        last = min(length, before + len(hidden_sbm) + 1)  # a token is predicted by the one before it
        for first in range(max(start, before + 1), last, size):
            beyond = min(first + size, last)
            hidden_pbm = hidden_sbm[first - 1 - before : beyond - 1 - before]
            yield slice(first - start, beyond - start), F.linear(hidden_pbm, weight_wm)

    def _on_all_ranks(self, x_bp: Tensor) -> Tensor:
        """What the last pipeline stage's context-parallel parts have found (zeros elsewhere), on the CPU of
        every rank.
        """
        for group in (self.groups.cp, self.groups.pp):
            torch.distributed.all_reduce(x_bp, group=group)
        return x_bp.cpu()
