# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The best heads where a constraint couples them: few kv groups alive, or the same count on every tensor-parallel rank.

Both searches are exact. They maximise whole numbers made of the scores (``worths``), so that no rounding of a sum
decides between equals. Shape suffixes beside those of ``hydra_mcore.heads``: l layers, n groups opened, x heads left
    out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from hydra_mcore.heads import Head

LARGEST = 2**60  # of any sum of worths; int64 holds NEVER less or plus such a sum
NEVER = -(2**62)  # the worth of what cannot be


def worths(scores: Sequence[Sequence[float]], ranking: Sequence[Head]) -> np.ndarray:
    """What each head is worth, [layers, heads] int64, all different: the score first, then the place in the ranking.

    Of two sets with the same sum of scores, the one whose places sum to less is worth more. Scores are rounded to a
    power of two, which is at most one part in 2^41 of the sum of their sizes for 448 heads, in 2^35 for 4096; so ties
    of scores with few digits stay ties.
    """
    scores_lh = np.asarray(scores, dtype=np.float64)
    places_lh = np.empty(scores_lh.shape, dtype=np.int64)
    places_lh[tuple(np.transpose(ranking))] = np.arange(scores_lh.size)
    step = scores_lh.size**2  # more than any sum of places
    total = math.fsum(np.abs(scores_lh).flat)
    exponent = (LARGEST // step).bit_length() - 1 - math.frexp(total)[1]
    return np.rint(np.ldexp(scores_lh, exponent)).astype(np.int64) * step - places_lh


def best_in_groups(worth_lh: np.ndarray, num_kv_groups: int, budget: int, kv_budget: int) -> list[Head]:
    """The ``budget`` heads worth most together that live in at most ``kv_budget`` kv groups of the whole model.

    A dynamic program over the groups. Each is opened or not, and an opened one leaves out its worst heads, any number
    of them; n = ``min(kv_budget, budget)`` groups are opened in all and x = n * heads per group - ``budget`` heads left
    out. What matters of the groups behind is therefore how many were opened and how many heads they left out.

    Args:
        worth_lh: [layers, heads] int64 from ``worths``.
        num_kv_groups: of one layer.
        budget: at most ``kv_budget`` times the heads of a group; ``kv_budget`` at most all groups.
    """
    layers, heads = worth_lh.shape
    groups, size = layers * num_kv_groups, heads // num_kv_groups
    order_gh = np.argsort(-worth_lh.reshape(groups, size), axis=1)
    best_first_gh = np.take_along_axis(worth_lh.reshape(groups, size), order_gh, axis=1)
    opened = min(kv_budget, budget)
    left_out = opened * size - budget
    best_nx = np.full((opened + 1, left_out + 1), NEVER)
    best_nx[0, 0] = 0
    steps = []
    for group in range(groups):
        # Only counts from which the remaining groups can still make ``opened``; a smaller row is not read again.
        first, last = max(1, opened - (groups - 1 - group)), min(opened, group + 1)
        steps.append((first, _open(best_nx[first - 1 : last].copy(), best_nx[first : last + 1], best_first_gh[group])))
    kept: list[Head] = []
    for group in reversed(range(groups)):
        first, left_nx = steps[group]
        left = int(left_nx[opened - first, left_out]) if opened else -1
        if left >= 0:
            opened, left_out = opened - 1, left_out - left
            layer, start = group // num_kv_groups, group % num_kv_groups * size
            kept += [(layer, start + head) for head in order_gh[group, : size - left].tolist()]
    return kept


def _open(before_nx: np.ndarray, best_nx: np.ndarray, best_first_h: np.ndarray) -> np.ndarray:
    """Open one group more where that is better: changes ``best_nx``, returns how many heads it leaves out there, -1:
    closed.
    """
    size, limit = len(best_first_h), best_nx.shape[1] - 1
    kept_sums = [0, *np.cumsum(best_first_h).tolist()]
    left_nx = np.full(best_nx.shape, -1, dtype=np.min_scalar_type(-size - 1))
    for left in range(min(size, limit) + 1):
        found_nx = before_nx[:, : limit + 1 - left] + kept_sums[size - left]
        better_nx = found_nx > best_nx[:, left:]
        np.copyto(best_nx[:, left:], found_nx, where=better_nx)
        np.copyto(left_nx[:, left:], left, where=better_nx)
    return left_nx


def best_in_blocks(worth_lh: np.ndarray, budget: int, block: int) -> list[Head]:
    """The ``budget`` heads worth most together, of each layer a multiple of ``block``.

    A layer's heads, best first and cut into blocks, are worth less from block to block. The best blocks of the whole
    model therefore never skip one of their layer, and no other choice can be worth more.

    Args:
        worth_lh: [layers, heads] int64 from ``worths``.
        budget: a multiple of ``block``.
        block: divides the heads of a layer.
    """
    layers, heads = worth_lh.shape
    order_lh = np.argsort(-worth_lh, axis=1)
    blocks = np.take_along_axis(worth_lh, order_lh, axis=1).reshape(layers * heads // block, block).sum(axis=1)
    best = np.argsort(-blocks, kind="stable")[: budget // block].tolist()
    members = order_lh.reshape(layers * heads // block, block).tolist()
    kept: list[Head] = []
    for at in best:
        kept += [(at * block // heads, head) for head in members[at]]
    return kept
