# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""First-order estimates of the effects: gradient times difference, for all heads from one backward pass.

Attribution patching (Nanda 2023; Syed et al., arXiv:2310.10348): m(x) - m(x; O <- O') is about (O - O') dm/dO. The
gradient through residual stream and MLPs alone, attention frozen, estimates the receiver effect; what the whole
gradient has beyond it goes through later heads and estimates the sender effect (through any number of any heads, where
the exact score counts paths into critical heads). Softmax and norms saturate, so this is a first look: its agreement is
measured, not assumed.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hydra_mcore.selection.probes import ProbeBatch
from hydra_mcore.selection.receivers import PairEffects, answer_positions
from hydra_mcore.selection.teacher import Teacher, Trace


def attributed_effects(teacher: Teacher, batch: ProbeBatch) -> PairEffects:
    """Estimated effects in the roles receiver and sender: ``effects_rlhb`` is float64 [2, l, h, b].

    All results are whole on every rank.
    """
    answer, everything = answer_positions(batch), slice(None)
    with torch.no_grad():
        clean = teacher.run(batch.clean_bs, answer, everything)
        corrupt = teacher.run(batch.corrupt_bs, answer, everything, only="heads_sbhd")
    direct, whole = (_gradients(teacher, clean, batch, frozen) for frozen in (True, False))
    pairs = len(batch.answer_bp)
    decrease_rlhb = torch.zeros(
        2, teacher.num_layers, teacher.num_heads, pairs, dtype=torch.float64, device=teacher.device
    )
    for layer_idx in teacher.layers:
        change_sbhd = (corrupt.heads_sbhd[layer_idx] - clean.heads_sbhd[layer_idx]).double()
        direct_hb = -(direct[layer_idx] * change_sbhd[answer]).sum((0, 3)).T
        total_hb = -(whole[layer_idx] * change_sbhd).sum((0, 3)).T
        decrease_rlhb[:, layer_idx, teacher.own_heads(layer_idx)] = torch.stack([direct_hb, total_hb - direct_hb])
    facts_fb = torch.zeros(3, pairs, dtype=torch.float64, device=teacher.device)
    if teacher.last:
        with torch.no_grad():
            facts_fb[:2] = torch.cat([teacher.final_metric(run.final_pbm, batch) for run in (clean, corrupt)])
            facts_fb[2] = teacher.solved(clean.logits_bpw, batch.answer_bp)
    clean_b, corrupt_b, solved_b = teacher.from_last(facts_fb)
    return PairEffects(teacher.whole(decrease_rlhb) / (clean_b - corrupt_b), clean_b, corrupt_b, solved_b.bool())


def _gradients(teacher: Teacher, clean: Trace, batch: ProbeBatch, frozen: bool) -> dict[int, Tensor]:
    """dm/d(head outputs) at the clean run, by layer; the answer's positions alone where attention is ``frozen``.

    A stage walks up from its own recorded input, so only gradients travel between stages, downward.
    """
    answer = answer_positions(batch)
    heads: dict[int, Tensor] = {}

    def frozen_attention(layer_idx: int) -> Tensor:
        heads[layer_idx] = clean.heads_sbhd[layer_idx][answer].clone().requires_grad_()
        return teacher.layers[layer_idx].self_attention.linear_proj(heads[layer_idx].flatten(2))

    def attention(layer_idx: int, x_sbm: Tensor) -> Tensor:
        def remember(heads_sbhd: Tensor) -> Tensor:
            heads[layer_idx] = heads_sbhd
            return heads_sbhd

        return teacher.attend(layer_idx, x_sbm, remember)

    bottom_sbm = clean.residual_sbm[min(teacher.layers)][answer if frozen else slice(None)].clone().requires_grad_()
    x_sbm = bottom_sbm
    for layer_idx in teacher.layers:
        x_sbm = x_sbm + (frozen_attention(layer_idx) if frozen else attention(layer_idx, x_sbm))
        x_sbm = checkpoint(teacher.mlp, layer_idx, x_sbm, use_reentrant=False)
    above_sbm = teacher.pipe.recv_backward(tuple(x_sbm.shape), teacher.last)
    if teacher.last:
        x_sbm = teacher.metric(x_sbm if frozen else x_sbm[answer], batch).sum()
    below_sbm, *gradients = torch.autograd.grad(x_sbm, [bottom_sbm, *heads.values()], above_sbm)
    teacher.pipe.send_backward(below_sbm, teacher.first)
    return {layer_idx: gradient.double() for layer_idx, gradient in zip(heads, gradients, strict=True)}
