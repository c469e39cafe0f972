# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The exact receiver effect (paper Eq 9-10) of every head, from two forward passes a batch of pairs.

Patching a head means: its output (its columns of the output projection's input) comes from the corrupt run, at
all positions, while the attention outputs of all later layers stay at their clean values. So the patch travels
only along residual stream and MLPs, which act on each position by itself, and the metric reads only the answer
positions. Hence the short way is no approximation: record both runs at the answer positions, add the patched
head's difference there, and run the MLPs above it over those few tokens, the heads of all layers below as one batch.
``tests/support/naive_patching.py`` does it the long way, and ``tests/parity/test_patching.py`` compares.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hydra_mcore.config import ModelShape
from hydra_mcore.selection.probes import ProbeBatch
from hydra_mcore.selection.teacher import Teacher, Trace


@dataclass(frozen=True, eq=False)
class PairEffects:
    """The result for a batch of pairs."""

    effects_rlhb: (
        Tensor  # Eq 10, float64: 1 when a head alone moves the metric as far as the corrupt prompt does; r: roles
    )
    clean_b: Tensor  # m(x), in logits
    corrupt_b: Tensor  # m(x')
    solved_b: Tensor  # bool: the clean run's argmax is the answer at every position


def answer_positions(batch: ProbeBatch) -> slice:
    """The positions whose logits predict the answer."""
    return slice(batch.answer_start - 1, batch.clean_bs.shape[1] - 1)


@torch.no_grad()
def receiver_effects(teacher: Teacher, batch: ProbeBatch) -> PairEffects | None:
    """Eq 10 for all heads: (m(x) - m(x; O_lh <- O_lh(x'))) / (m(x) - m(x')); None except on the last pipeline stage.

    Pairs whose metric the corruption does not move divide by about zero: judge by ``clean_b - corrupt_b``.
    """
    answer = answer_positions(batch)
    clean = teacher.run(batch.clean_bs, answer, answer)
    corrupt = teacher.run(batch.corrupt_bs, answer, answer, only="heads_sbhd")
    x_pnm = _walk(teacher, clean, corrupt, batch)
    if x_pnm is None:
        return None
    # The clean metric is that of an unpatched row that went the same way: in bf16 its rounding then cancels.
    clean_b, *patched_nb = teacher.metric(x_pnm, batch)
    corrupt_b = teacher.final_metric(corrupt.final_pbm, batch)[0]
    effects_nb = (clean_b - torch.stack(patched_nb)) / (clean_b - corrupt_b)
    effects_rlhb = effects_nb.unflatten(0, (1, teacher.num_layers, teacher.num_heads))
    return PairEffects(effects_rlhb, clean_b, corrupt_b, teacher.solved(clean.logits_bpw, batch.answer_bp))


def _walk(teacher: Teacher, clean: Trace, corrupt: Trace, batch: ProbeBatch) -> Tensor | None:
    """Up through the layers with one clean row and, from its own layer on, one row for each patched head.

    Rows stand side by side along axis 1, the pairs innermost; the stage before sends those of its layers.
    """
    pairs, positions = batch.answer_bp.shape
    below = min(teacher.layers)
    x_pnm = teacher.receive(positions, (1 + below * teacher.num_heads) * pairs)
    if x_pnm is None:
        x_pnm = clean.residual_sbm[0]
    for layer_idx in teacher.layers:
        x_pnm = x_pnm + clean.attention_sbm[layer_idx].repeat(1, x_pnm.shape[1] // pairs, 1)
        change_phbm = teacher.written(
            layer_idx, corrupt.heads_sbhd[layer_idx] - clean.heads_sbhd[layer_idx], range(teacher.num_heads)
        )
        patched_phbm = x_pnm[:, None, :pairs] + change_phbm
        x_pnm = teacher.mlp(layer_idx, torch.cat([x_pnm, patched_phbm.flatten(1, 2)], dim=1))
    teacher.send(x_pnm)
    return x_pnm if teacher.last else None


def receiver_flops(shape: ModelShape, length: int, pairs: int, answer_tokens: int) -> float:
    """Floating-point operations of ``receiver_effects`` over ``pairs`` pairs, the output layer left out (few
    positions).
    """
    mlp = 6 * shape.hidden_size * shape.ffn_hidden_size
    rows = shape.num_heads * shape.num_layers * (shape.num_layers + 1) / 2 + shape.num_layers
    return pairs * (2 * forward_flops(shape, length) + answer_tokens * rows * mlp)


def forward_flops(shape: ModelShape, length: int) -> float:
    """Floating-point operations of one forward pass over one row, the output layer left out."""
    heads = shape.num_heads * shape.head_dim
    mlp = 6 * shape.hidden_size * shape.ffn_hidden_size
    projections = 2 * shape.hidden_size * (2 * heads + 2 * shape.num_kv_groups * shape.head_dim)
    return length * shape.num_layers * (mlp + projections + 2 * length * heads)
