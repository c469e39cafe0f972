# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""How a state decays from row to row of a chunk: one decay a head (Gated DeltaNet, arXiv 2412.06464), or one for each
key channel of a head (Kimi Delta Attention, arXiv 2510.26692).

Both give the chunked delta rule the decays from the chunk's start to each row, from each row to its end and through the
whole chunk, and the decayed scores of rows that read with rows that were written, with their gradients. Of a chunk,
``readers`` [c, n, 2, r, d] are its queries and its keys, and p = 2r. Other suffixes are those of ``chunks.py``.

This file needs torch only: a copy of it travels with every model exported to Hugging Face.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .chunks import add_product  # relative: exported models hold a copy of both files side by side


class HeadDecay:
    """One log decay for each row and head, [c, n, r]."""

    def __init__(self, log_decay_cnr: Tensor, dtype: torch.dtype) -> None:
        # Sums of log decays in float64: after a few strong decays their differences, which is all that is used,
        # would keep only four digits in float32. Masked before exp, which above the diagonal could overflow.
        r, total_cnr = log_decay_cnr.shape[-1], log_decay_cnr.double().cumsum(-1)
        later_rr = torch.ones(r, r, dtype=torch.bool, device=log_decay_cnr.device).triu(1)
        between_cnrr = (total_cnr[..., :, None] - total_cnr[..., None, :]).to(dtype)
        self.between_cn1rr = between_cnrr.masked_fill_(later_rr, -torch.inf).exp_()[:, :, None]
        self.from_start_cn1rx = total_cnr.exp().to(dtype)[:, :, None, :, None]
        self.to_end_cnrx = (total_cnr[..., -1:] - total_cnr).exp().to(dtype)[..., None]
        self.forget_cnx1 = self.from_start_cn1rx[:, :, 0, -1:]

    def scores(self, readers_cn2rd: Tensor, k_cnrd: Tensor) -> Tensor:
        """Readers times keys, decayed on the way from the key's row to the reader's: [c, n, p, r]."""
        scores_cnpr = readers_cn2rd.flatten(2, 3) @ k_cnrd.mT
        scores_cnpr.unflatten(2, readers_cn2rd.shape[2:4]).mul_(self.between_cn1rr)
        return scores_cnpr

    def gradient(
        self,
        readers_cn2rd: Tensor,
        k_cnrd: Tensor,
        scores_cnpr: Tensor,
        d_scores_cnpr: Tensor,
        d_readers_cn2rd: Tensor,
        d_k_cnrd: Tensor,
        state_cndv: Tensor,
        d_state_cndv: Tensor,
    ) -> Tensor:
        """The gradient of the log decays; adds to those of readers and keys what goes through the scores.

        The total log decay of a row stands in exp(+total) wherever the row reads, in exp(-total) wherever it is written
        to; a log decay is in the totals of its own and all later rows. Summed in float64: what does not pass a log
        decay cancels in its gradient, which strong decays make small beside it.

        Args:
            d_scores_cnpr: gradients of the scores, 0 where these are not used; changed.
            d_readers_cn2rd, d_k_cnrd: gradients of readers and keys as far as they go through the states.
            state_cndv, d_state_cndv: the states before the chunks, and the gradients of those after them.
        """
        d_readers_cnpd = d_readers_cn2rd.flatten(2, 3)
        through_scores_cnpr = d_scores_cnpr * scores_cnpr
        d_scores_cnpr.unflatten(2, readers_cn2rd.shape[2:4]).mul_(self.between_cn1rr)
        reads_cnp = (readers_cn2rd.flatten(2, 3) * d_readers_cnpd).sum(-1) + through_scores_cnpr.sum(
            -1, dtype=torch.float64
        )
        to_end_cnr = (k_cnrd * d_k_cnrd).sum(-1).double()
        d_total_cnr = (
            reads_cnp.unflatten(-1, readers_cn2rd.shape[2:4]).sum(-2)
            - through_scores_cnpr.sum(-2, dtype=torch.float64)
            - to_end_cnr
        )
        through_state_cn = self.forget_cnx1[..., 0, 0] * (state_cndv * d_state_cndv).sum((-1, -2))
        d_total_cnr[..., -1] += to_end_cnr.sum(-1) + through_state_cn
        add_product(d_readers_cnpd, d_scores_cnpr, k_cnrd)
        add_product(d_k_cnrd, d_scores_cnpr.mT, readers_cn2rd.flatten(2, 3))
        return d_total_cnr.flip(-1).cumsum(-1).flip(-1)


class ChannelDecay:
    """A log decay for each row, head and key channel, [c, n, r, d]; r is a power of two.

    The decay from row j to row i is a factor inside the sum over channels, so scores are no product of a matrix of
    decays; and exp(total of i) * exp(-total of j) overflows after a few strong decays. So the chunk is halved, and its
    halves again, down to single rows: rows of a later half read those of the earlier one across the border between
    them, decayed from j to the border and from the border to i. Both factors are at most 1, and both are exponentials
    of sums of few log decays of one sign, which lose no digits in float32.
    """

    def __init__(self, log_decay_cnrd: Tensor, dtype: torch.dtype) -> None:
        # Of every block of rows: sums from its start to each row, the row's own included, and from behind each row to
        # its end. Both start with blocks of a single row.
        to_row_cnrd, from_row_cnrd = log_decay_cnrd.to(dtype, copy=True), torch.zeros_like(log_decay_cnrd, dtype=dtype)
        self.widths: list[int] = []
        self.factors: list[Tensor] = []  # of each width, [c, n, blocks, 2, width, d]
        width = 1
        while width < log_decay_cnrd.shape[2]:
            to_row, from_row = _halves(to_row_cnrd, width), _halves(from_row_cnrd, width)
            self.widths.append(width)
            self.factors.append(torch.stack([from_row[..., 0, :, :], to_row[..., 1, :, :]], dim=3).exp_())
            whole = to_row[..., -1:, :].clone()
            to_row[..., 1, :, :] += whole[..., 0, :, :]
            from_row[..., 0, :, :] += whole[..., 1, :, :]
            width *= 2
        self.from_start_cn1rx = to_row_cnrd.exp()[:, :, None]
        self.to_end_cnrx = from_row_cnrd.exp()
        self.forget_cnx1 = self.from_start_cn1rx[:, :, 0, -1, :, None]

    def scores(self, readers_cn2rd: Tensor, k_cnrd: Tensor) -> Tensor:
        """As ``HeadDecay.scores``; 0 above the diagonal, and for keys on it."""
        scores_cn2rr = k_cnrd.new_zeros(*readers_cn2rd.shape[:4], k_cnrd.shape[2])
        scores_cn2rr[:, :, 0].diagonal(dim1=-2, dim2=-1).copy_((readers_cn2rd[:, :, 0] * k_cnrd).sum(-1))
        for width, factor in zip(self.widths, self.factors, strict=True):
            later, earlier = self._decayed(readers_cn2rd, k_cnrd, width, factor)
            _across(scores_cn2rr, width).copy_((later @ earlier.mT).unflatten(3, (2, width)))
        return scores_cn2rr.flatten(2, 3)

    def gradient(
        self,
        readers_cn2rd: Tensor,
        k_cnrd: Tensor,
        scores_cnpr: Tensor,
        d_scores_cnpr: Tensor,
        d_readers_cn2rd: Tensor,
        d_k_cnrd: Tensor,
        state_cndv: Tensor,
        d_state_cndv: Tensor,
    ) -> Tensor:
        """As ``HeadDecay.gradient``, from the whole chunk down to single rows."""
        d_scores_cn2rr = d_scores_cnpr.unflatten(2, readers_cn2rd.shape[2:4])
        d_to_row_cnrd = (readers_cn2rd * d_readers_cn2rd).sum(2)
        d_from_row_cnrd = k_cnrd * d_k_cnrd
        d_to_row_cnrd[:, :, -1] += self.forget_cnx1[..., 0] * (state_cndv * d_state_cndv).sum(-1)
        d_diagonal_cnr1 = d_scores_cn2rr[:, :, 0].diagonal(dim1=-2, dim2=-1)[..., None]
        d_readers_cn2rd[:, :, 0] += d_diagonal_cnr1 * k_cnrd
        d_k_cnrd += d_diagonal_cnr1 * readers_cn2rd[:, :, 0]
        for width, factor in zip(reversed(self.widths), reversed(self.factors), strict=True):
            later, earlier = self._decayed(readers_cn2rd, k_cnrd, width, factor)
            d_across = _across(d_scores_cn2rr, width).flatten(3, 4)
            d_later, d_earlier = d_across @ earlier, d_across.mT @ later
            d_to_row, d_from_row = _halves(d_to_row_cnrd, width), _halves(d_from_row_cnrd, width)
            d_whole = torch.stack([d_to_row[..., 1, :, :].sum(-2), d_from_row[..., 0, :, :].sum(-2)], dim=3)
            d_to_row[..., 1, :, :] += (later * d_later).unflatten(3, (2, width)).sum(3)
            d_from_row[..., 0, :, :] += earlier * d_earlier
            d_to_row[..., -1, :] += d_whole
            d_later_readers = d_later.unflatten(3, (2, width)) * factor[..., 1:, :, :]
            _halves(d_readers_cn2rd, width)[..., 1, :, :] += d_later_readers.transpose(2, 3)
            _halves(d_k_cnrd, width)[..., 0, :, :] += d_earlier * factor[..., 0, :, :]
        return d_to_row_cnrd

    def _decayed(self, readers_cn2rd: Tensor, k_cnrd: Tensor, width: int, factor: Tensor) -> tuple[Tensor, Tensor]:
        """Readers of all later halves [c, n, blocks, 2 width, d], and keys of all earlier ones [c, n, blocks, width,
        d], decayed to their border.
        """
        later = _halves(readers_cn2rd, width)[..., 1, :, :].transpose(2, 3) * factor[..., 1:, :, :]
        return later.flatten(3, 4), _halves(k_cnrd, width)[..., 0, :, :] * factor[..., 0, :, :]


def _halves(x_rd: Tensor, width: int) -> Tensor:
    """A view of [..., r, d] as [..., blocks, 2, width, d]: pairs of neighbouring halves."""
    return x_rd.unflatten(-2, (-1, 2, width))


def _across(scores_cn2rr: Tensor, width: int) -> Tensor:
    """A view of the scores of later halves with the earlier ones beside them: [c, n, blocks, 2, width, width]."""
    pairs = scores_cn2rr.unflatten(-1, (-1, 2, width)).unflatten(3, (-1, 2, width))
    return pairs[:, :, :, :, 1, :, :, 0].diagonal(dim1=3, dim2=5).permute(0, 1, 5, 2, 3, 4)
