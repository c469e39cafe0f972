# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""What a model remembers of the tokens that it has read, so that it reads each of them once while it decodes.

A prompt is read as in training: under context parallelism every rank has its part of it, and keeps the keys and values
of that part. What follows, a token or a few at a time, is computed by all context-parallel ranks alike; its keys and
values are kept by the last one, behind the prompt's. Recurrent heads keep states of constant size, on all ranks alike.
"""

from __future__ import annotations

from collections import defaultdict
from functools import partial

import torch
from torch import Tensor

from hydra_mcore.ops.context_parallel import Group, from_last, merge_softmax
from hydra_mcore.sequence import SequencePart


class KeysValues:
    """Keys and values of one layer's full attention, on this rank.

    ``keys_bgtd`` and ``values_bgtd`` hold ``kept`` tokens and have ``room`` for more on the last context-parallel rank.
    """

    def __init__(self, room: int) -> None:
        self.room, self.kept = room, 0
        self.keys_bgtd: Tensor | None = None
        self.values_bgtd: Tensor | None = None

    def keep(self, k_sbgd: Tensor, v_sbgd: Tensor) -> None:
        """Remember keys and values: of this rank's part of the prompt, then, where there is room, of what follows."""
        if self.keys_bgtd is None:
            s, b, g, d = k_sbgd.shape
            self.keys_bgtd, self.values_bgtd = (k_sbgd.new_empty(b, g, s + self.room, d) for _ in range(2))
        elif self.room == 0:
            return
        end = self.kept + len(k_sbgd)
        self.keys_bgtd[:, :, self.kept : end] = k_sbgd.permute(1, 2, 0, 3)
        self.values_bgtd[:, :, self.kept : end] = v_sbgd.permute(1, 2, 0, 3)
        self.kept = end

    def attend(self, q_sbhd: Tensor, behind_s: Tensor, group_of_head: Tensor, cp_group: Group) -> Tensor:
        """Causal attention of new tokens, already kept, to everything that the ranks remember: [s, b, h, d].

        In float32 at least: every rank takes the softmax over its own keys, and the ranks' results are merged.

        Args:
            behind_s: where the queries stand, counted from the end: -1 is the newest token.
            group_of_head: on axis g of the keys.
        """
        exact = torch.promote_types(q_sbhd.dtype, torch.float32)
        q_bhsd = q_sbhd.permute(1, 2, 0, 3).to(exact)
        k_bhtd, v_bhtd = (
            x[:, :, : self.kept].index_select(1, group_of_head).to(exact) for x in (self.keys_bgtd, self.values_bgtd)
        )
        score_bhst = q_bhsd @ k_bhtd.mT * q_bhsd.shape[-1] ** -0.5
        if self.room:  # the newest tokens are the last ones here, and none of them elsewhere
            later_st = torch.arange(self.kept, device=q_sbhd.device) > self.kept + behind_s[:, None]
            score_bhst = score_bhst.masked_fill(later_st, -torch.inf)
        total_bhs1 = score_bhst.logsumexp(-1, keepdim=True)
        out_bhsd = merge_softmax((score_bhst - total_bhs1).exp() @ v_bhtd, total_bhs1, cp_group)
        return out_bhsd.permute(2, 0, 1, 3).to(q_sbhd.dtype)


class LayerCache:
    """What one layer remembers: keys and values, and for each recurrent kind of heads its states by name."""

    def __init__(self, room: int) -> None:
        self.keys_values = KeysValues(room)
        self.states: defaultdict[str, dict[str, Tensor]] = defaultdict(dict)


class DecodingCache:
    """What a model remembers of a batch of rows; goes through Megatron's layers as their ``inference_context``.

    Args:
        part: this rank's part of the prompt.
        capacity: tokens of a row that will ever be read, the prompt's included.
    """

    def __init__(self, part: SequencePart, capacity: int) -> None:
        self.part = part  # of the tokens under way
        # Megatron's word: it makes rotary angles for as many on every rank.
        self.max_sequence_length = -(-capacity // part.cp_size)
        room = capacity - part.length if part.cp_rank == part.cp_size - 1 else 0
        self.layers: defaultdict[int, LayerCache] = defaultdict(partial(LayerCache, room))

    def follow(self, tokens: int) -> None:
        """Go on to the next tokens, the ones before having been read."""
        self.part = SequencePart(tokens, past=self.part.past + self.part.length)


def left_behind(x: Tensor, part: SequencePart, cp_group: Group) -> Tensor:
    """``x`` of the rank that holds the last part, on all ranks, which compute alike what follows a prompt."""
    return from_last(x, cp_group) if part.cp_size > 1 else x.clone()  # of a slice, whose whole can go
