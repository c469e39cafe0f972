# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""How a state decays from row to row of a chunk: one decay a head (Gated DeltaNet, arXiv 2412.06464), or one for each
key channel of a head (Kimi Delta Attention, arXiv 2510.26692).

Both give the chunked delta rule the decayed scores of rows that read with rows that were written, readers decayed from
the chunk's start, keys decayed to its end and the decay through the whole chunk, with their gradients. Of a chunk,
``readers`` [c, n, r, 2, d] are the query and the key of each row. Other suffixes are those of ``chunks.py``.

This file needs torch only: a copy of it travels with every model exported to Hugging Face.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .chunks import add_product  # relative: exported models hold a copy of both files side by side


class HeadDecay:
    """How chunks apply a log decay that each row and head has one of, [c, n, r]."""

    def __init__(self, log_decay_cnr: Tensor, dtype: torch.dtype) -> None:
        # Sums of log decays in float64: after a few strong decays their differences, which is all that is used,
        # would keep only four digits in float32. Masked before exp, which above the diagonal could overflow.
        r, total_cnr = log_decay_cnr.shape[-1], log_decay_cnr.double().cumsum(-1)
        later_rr = torch.ones(r, r, dtype=torch.bool, device=log_decay_cnr.device).triu(1)
        between_cnrr = (total_cnr[..., :, None] - total_cnr[..., None, :]).to(dtype)
        self.between_cnr1r = between_cnrr.masked_fill_(later_rr, -torch.inf).exp_()[..., None, :]
        self.from_start_cnr11 = total_cnr.exp().to(dtype)[..., None, None]
        self.to_end_cnr1 = (total_cnr[..., -1:] - total_cnr).exp().to(dtype)[..., None]
        self.forget_cnx1 = self.from_start_cnr11[:, :, -1]

    def apply(self, readers_cnr2d: Tensor, k_cnrd: Tensor, for_backward: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Readers times keys, decayed on the way from the key's row to the reader's, [c, n, r, 2, r]; readers decayed
        from the chunk's start, keys decayed to its end.
        """
        scores_cnr2r = (readers_cnr2d.flatten(2, 3) @ k_cnrd.mT).unflatten(2, readers_cnr2d.shape[2:4])
        scores_cnr2r.mul_(self.between_cnr1r)
        return scores_cnr2r, readers_cnr2d * self.from_start_cnr11, k_cnrd * self.to_end_cnr1

    def gradient(
        self,
        readers_cnr2d: Tensor,
        k_cnrd: Tensor,
        scores_cnr2r: Tensor,
        d_scores_cnr2r: Tensor,
        d_readers_cnr2d: Tensor,
        d_k_cnrd: Tensor,
        state_cndv: Tensor,
        d_state_cndv: Tensor,
    ) -> Tensor:
        """The gradient of the log decays; makes those of readers and keys of those of their decayed forms.

        The total log decay of a row stands in exp(+total) wherever the row reads, in exp(-total) wherever it is written
        to; a log decay is in the totals of its own and all later rows. Summed in float64: what does not pass a log
        decay cancels in its gradient, which strong decays make small beside it.

        Args:
            d_scores_cnr2r: gradients of the scores, 0 where these are not used; changed.
            d_readers_cnr2d, d_k_cnrd: gradients of decayed readers and keys; changed.
            state_cndv, d_state_cndv: the states before the chunks, and the gradients of those after them.
        """
        d_readers_cnr2d.mul_(self.from_start_cnr11)
        d_k_cnrd.mul_(self.to_end_cnr1)
        through_scores_cnr2r = d_scores_cnr2r * scores_cnr2r
        d_scores_cnpr = d_scores_cnr2r.mul_(self.between_cnr1r).flatten(2, 3)
        reads_cnr2 = (readers_cnr2d * d_readers_cnr2d).sum(-1) + through_scores_cnr2r.sum(-1, dtype=torch.float64)
        to_end_cnr = (k_cnrd * d_k_cnrd).sum(-1).double()
        d_total_cnr = reads_cnr2.sum(-1) - through_scores_cnr2r.sum((2, 3), dtype=torch.float64) - to_end_cnr
        through_state_cn = self.forget_cnx1[..., 0, 0] * (state_cndv * d_state_cndv).sum((-1, -2))
        d_total_cnr[..., -1] += to_end_cnr.sum(-1) + through_state_cn
        add_product(d_readers_cnr2d.flatten(2, 3), d_scores_cnpr, k_cnrd)
        add_product(d_k_cnrd, d_scores_cnpr.mT, readers_cnr2d.flatten(2, 3))
        return d_total_cnr.flip(-1).cumsum(-1).flip(-1)


class ChannelDecay:
    """A log decay for each row, head and key channel, [c, n, r, d]; r is a power of two.

    The decay from row j to row i is a factor inside the sum over channels, so scores are no product of a matrix of
    decays; and exp(total of i) * exp(-total of j) overflows after a few strong decays. So blocks of rows grow from a
    single row to the whole chunk. Readers are decayed from the start of their block, keys to the end of theirs; of two
    neighbouring blocks the later one's readers read the earlier one's keys, then both pass through the other block.
    All factors are at most 1, and each is the exponential of a sum of log decays of one sign, which loses no digits.
    """

    def __init__(self, log_decay_cnrd: Tensor, dtype: torch.dtype) -> None:
        self.through: list[Tensor] = []  # blocks of 1, 2, 4 ... rows, [c, n, blocks, d]
        self.across: list[tuple[Tensor, Tensor]] = []  # of each width, what readers and keys were as the readers read
        total_cnxd = log_decay_cnrd.to(dtype)
        while True:
            self.through.append(total_cnxd.exp())
            if total_cnxd.shape[2] == 1:
                break
            total_cnxd = total_cnxd[:, :, ::2] + total_cnxd[:, :, 1::2]
        self.forget_cnx1 = self.through[-1][:, :, 0, :, None]

    def apply(self, readers_cnr2d: Tensor, k_cnrd: Tensor, for_backward: bool) -> tuple[Tensor, Tensor, Tensor]:
        """As ``HeadDecay.apply``; scores are 0 above the diagonal, and for keys on it."""
        scores_cnr2r = k_cnrd.new_zeros(*readers_cnr2d.shape[:4], k_cnrd.shape[2])
        queries_cnrd = readers_cnr2d[:, :, :, 0]
        scores_cnr2r[:, :, :, 0].diagonal(dim1=-2, dim2=-1).copy_((queries_cnrd * k_cnrd).sum(-1))
        decayed_readers_cnr2d, decayed_k_cnrd = readers_cnr2d * self.through[0][:, :, :, None], k_cnrd.clone()
        for through_cnxd in self.through[:-1]:
            later, earlier, through_earlier, through_later = _pairs(decayed_readers_cnr2d, decayed_k_cnrd, through_cnxd)
            _across(scores_cnr2r, later.shape[3] // 2).copy_((later @ earlier.mT).unflatten(3, (-1, 2)))
            if for_backward:
                self.across.append((later.clone(), earlier.clone()))
            later.mul_(through_earlier)
            earlier.mul_(through_later)
        return scores_cnr2r, decayed_readers_cnr2d, decayed_k_cnrd

    def gradient(
        self,
        readers_cnr2d: Tensor,
        k_cnrd: Tensor,
        scores_cnr2r: Tensor,
        d_scores_cnr2r: Tensor,
        d_readers_cnr2d: Tensor,
        d_k_cnrd: Tensor,
        state_cndv: Tensor,
        d_state_cndv: Tensor,
    ) -> Tensor:
        """As ``HeadDecay.gradient``, from the whole chunk down to single rows."""
        d_total_cnxd = (self.forget_cnx1[..., 0] * (state_cndv * d_state_cndv).sum(-1))[:, :, None]
        for through_cnxd, (later, earlier) in zip(reversed(self.through[:-1]), reversed(self.across), strict=True):
            d_later, d_earlier, through_earlier, through_later = _pairs(d_readers_cnr2d, d_k_cnrd, through_cnxd)
            d_later.mul_(through_earlier)
            d_earlier.mul_(through_later)
            d_pair = torch.stack([(later * d_later).sum(-2), (earlier * d_earlier).sum(-2)], dim=3)
            d_total_cnxd = (d_pair + d_total_cnxd[:, :, :, None]).flatten(2, 3)
            d_across = _across(d_scores_cnr2r, earlier.shape[3]).flatten(3, 4)
            _add_product(d_later, d_across, earlier)
            _add_product(d_earlier, d_across.mT, later)
        d_readers_cnr2d.mul_(self.through[0][:, :, :, None])
        d_log_decay_cnrd = d_total_cnxd + (readers_cnr2d * d_readers_cnr2d).sum(3)
        d_diagonal_cnr1 = d_scores_cnr2r[:, :, :, 0].diagonal(dim1=-2, dim2=-1)[..., None]
        d_readers_cnr2d[:, :, :, 0].addcmul_(d_diagonal_cnr1, k_cnrd)
        d_k_cnrd.addcmul_(d_diagonal_cnr1, readers_cnr2d[:, :, :, 0])
        return d_log_decay_cnrd


def _pairs(readers_cnr2d: Tensor, k_cnrd: Tensor, through_cnxd: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Views [c, n, pairs, ...] of pairs of neighbouring blocks: readers of the later block [2 width, d], keys of the
    earlier block [width, d], and the decays [1, d] through the earlier and through the later block.
    """
    halves = (-1, 2, k_cnrd.shape[2] // through_cnxd.shape[2])
    later = readers_cnr2d.unflatten(2, halves)[:, :, :, 1].flatten(3, 4)
    through_earlier, through_later = through_cnxd.unflatten(2, (-1, 2, 1)).unbind(3)
    return later, k_cnrd.unflatten(2, halves)[:, :, :, 0], through_earlier, through_later


def _across(scores_cnr2r: Tensor, width: int) -> Tensor:
    """A view of the scores of later blocks with the earlier ones beside them, [c, n, pairs, width, 2, width]."""
    pairs = scores_cnr2r.unflatten(-1, (-1, 2, width)).unflatten(2, (-1, 2, width))
    return pairs[:, :, :, 1, :, :, :, 0].diagonal(dim1=2, dim2=5).permute(0, 1, 5, 2, 3, 4)


def _add_product(sum_cnbxy: Tensor, a_cnbxz: Tensor, b_cnbzy: Tensor) -> None:
    """sum += a @ b, in place; libraries for matrix products are slow where z is 1 or 2."""
    if (z := a_cnbxz.shape[-1]) > 2:
        sum_cnbxy.flatten(0, 2).baddbmm_(a_cnbxz.flatten(0, 2), b_cnbzy.flatten(0, 2))
        return
    for i in range(z):
        sum_cnbxy.addcmul_(a_cnbxz[..., i : i + 1], b_cnbzy[..., i : i + 1, :])
