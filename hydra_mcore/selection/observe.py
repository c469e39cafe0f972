# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Cheap scores that look at attention and change nothing, for comparison: a head that looks need not matter."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
from torch import Tensor

from hydra_mcore.selection.probes import ProbeBatch
from hydra_mcore.selection.receivers import answer_positions
from hydra_mcore.selection.teacher import Teacher

OBSERVED = ("attention mass", "retrieval head")


@torch.no_grad()
def observed_scores(teacher: Teacher, batch: ProbeBatch) -> Tensor:
    """Two scores [2, l, h, b] in 0..1, in the order of ``OBSERVED``, float64, on every rank.

    attention mass: what the answer's positions attend to the tokens that the answer is copied from, averaged over
        positions.
    retrieval head (Wu et al., arXiv:2404.15574): the share of answer tokens for which the token to copy gets most
    attention.

    Args:
        batch: of a probe whose answer is copied (``source_bp`` is given).
    """
    shape = (2, teacher.num_layers, teacher.num_heads, len(batch.answer_bp))
    result = torch.zeros(shape, dtype=torch.float64, device=teacher.device)
    answer = answer_positions(batch)

    def look(layer_idx: int) -> Any:
        def before_attention(module: Any, args: tuple) -> None:
            _, q_sbhd, k_sbhd, _ = args
            weight_bhps = _weights(q_sbhd[answer], k_sbhd, answer.start)
            source_bhpp = batch.source_bp[:, None, None].expand(*weight_bhps.shape[:3], -1)
            mass_bh = weight_bhps.gather(-1, source_bhpp).sum(-1).mean(-1)
            right_bhp = weight_bhps.argmax(-1) == batch.source_bp[:, None]
            result[:, layer_idx, teacher.own_heads(layer_idx)] = torch.stack(
                [mass_bh.T, right_bhp.double().mean(-1).T]
            ).double()

        return teacher.layers[layer_idx].self_attention.fa.core_attention.register_forward_pre_hook(before_attention)

    with contextlib.ExitStack() as hooks:
        for layer_idx in teacher.layers:
            hooks.enter_context(look(layer_idx))
        teacher.forward(batch.clean_bs, answer)
    return teacher.whole(result)


def _weights(q_pbhd: Tensor, k_sbhd: Tensor, start: int) -> Tensor:
    """Causal attention weights of the queries at positions start, start + 1, ...: [b, h, p, s] float32."""
    score_bhps = torch.einsum("pbhd,sbhd->bhps", q_pbhd.float(), k_sbhd.float()) / math.sqrt(q_pbhd.shape[-1])
    position_s = torch.arange(k_sbhd.shape[0], device=k_sbhd.device)
    later_ps = position_s > start + torch.arange(len(q_pbhd), device=k_sbhd.device)[:, None]
    return score_bhps.masked_fill(later_ps, -torch.inf).softmax(-1)
