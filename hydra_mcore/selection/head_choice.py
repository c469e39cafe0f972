# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""A choice of heads by the scores of a teacher, with the facts of how it was made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hydra_mcore.heads import every_head
from hydra_mcore.selection.choose import SCORED, Choice, choose_heads
from hydra_mcore.selection.score import HeadScores
from hydra_mcore.shape import ModelShape


@dataclass(frozen=True, kw_only=True)
class ChoiceSettings:
    """The flags of tools/select_heads.py by which heads are chosen; its --help says what they mean."""

    ratio: str | None = "3:1"
    strategy: str = "global_c"
    kv_groups: int | None = None
    ranks: int | None = None
    every: int | None = None
    linear: Sequence[str] = ()
    seed: int = 0


def chosen_heads(
    settings: ChoiceSettings, shape: ModelShape, fingerprint: str, budget: int, scores: HeadScores | None
) -> Choice:
    """The head map; without scores, one that only shows that the request can be met.

    Args:
        fingerprint: of the teacher's weights.
        budget: number of heads that keep full attention.

    Raises:
        InputError: as ``choose_heads``.
    """
    made_by: dict[str, Any] = {"tool": "select_heads", "seed": settings.seed}
    for name in ("ratio", "kv_groups", "ranks", "every"):
        if getattr(settings, name) is not None:
            made_by[name] = getattr(settings, name)
    if settings.linear:
        made_by["linear"] = " ".join(settings.linear)
    ranking, table = every_head(shape.num_layers, shape.num_heads), None
    if scores is not None:
        ranking, table = scores.ranking(), scores.scores_lh.tolist()
        if settings.strategy in SCORED:
            made_by |= {
                "scores": scores.settings,
                "roles": scores.roles,
                "score": scores.score,
                "weights": scores.weights,
                "versions": scores.versions,
            }
    elif settings.strategy in SCORED:
        table = [[0.0] * shape.num_heads] * shape.num_layers
    options = {
        "kv_budget": settings.kv_groups,
        "tp_size": settings.ranks or 1,
        "every": settings.every,
        "seed": settings.seed,
    }
    facts = {"linear": settings.linear, "fingerprint": fingerprint, "made_by": made_by}
    return choose_heads(settings.strategy, shape, budget, scores=table, ranking=ranking, **options, **facts)
