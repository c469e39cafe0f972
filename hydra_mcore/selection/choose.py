# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""From a ranking of heads and a budget to a head map (the strategies of paper section 2)."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from typing import Any

from hydra_mcore.config import ModelShape
from hydra_mcore.heads import HeadMap, InputError

Head = tuple[int, int]  # (layer_idx, head_idx)

STRATEGIES = {
    "global_c": "the best heads of the whole model, at least one in every layer",
    "global": "the best heads of the whole model; layers may be left without",
    "layer": "the best heads of each layer, the same number in all",
    "global_random": "heads drawn from the whole model",
    "layer_random": "heads drawn in each layer, the same number in all",
    "fixed": "the first heads of each layer, the same number in all",
}
SCORED = ("global_c", "global", "layer")  # the strategies that need scores


def parse_ratio(text: str, total: int) -> int:
    """The number of FA heads at a GDN:FA ratio such as "3:1": total * FA / (GDN + FA), to the nearest whole head.

    Raises:
        InputError: not of the form GDN:FA, or it leaves no FA head.
    """
    match = re.fullmatch(r"(\d+):(\d+)", text.strip())
    if not match or int(match[2]) == 0:
        raise InputError(f"ratio {text!r}: write GDN heads to FA heads as in 3:1")
    gdn, fa = int(match[1]), int(match[2])
    budget = round(total * fa / (gdn + fa))
    if budget == 0:
        raise InputError(f"ratio {text!r} keeps none of {total} heads; choose a smaller one")
    return budget


def choose_heads(
    strategy: str,
    shape: ModelShape,
    budget: int,
    *,
    ranking: Sequence[Head] = (),
    seed: int = 0,
    fingerprint: str = "",
    made_by: dict[str, Any] | None = None,
) -> HeadMap:
    """Keep ``budget`` heads as full attention.

    Where a strategy gives every layer the same number and the budget does not divide, layers differ by one head;
    which of them get one more is decided by the ranking (layer), the draw (layer_random) or even spacing (fixed).

    Args:
        ranking: all heads, best first (``HeadScores.ranking``); needed by the strategies in ``SCORED``.
        seed: of the random strategies.

    Raises:
        InputError: an unknown strategy, a budget out of range, or scores that a strategy lacks.
    """
    if strategy not in STRATEGIES:
        raise InputError(f"strategy {strategy!r}; choose one of {', '.join(STRATEGIES)}")
    layers, heads = shape.num_layers, shape.num_heads
    everything = [(layer, head) for layer in range(layers) for head in range(heads)]
    least = layers if strategy == "global_c" else 0
    if not least <= budget <= len(everything):
        why = f" ({strategy} keeps one in each of {layers} layers; strategy global has no such floor)" if least > budget >= 0 else ""
        raise InputError(f"budget {budget}: choose {least} to {len(everything)} heads{why}")
    if strategy in SCORED and sorted(ranking) != everything:
        raise InputError(f"strategy {strategy} needs a score for every one of the {len(everything)} heads")
    order = list(ranking)
    if strategy.endswith("_random"):
        order = everything
        random.Random(seed).shuffle(order)
    picks: dict[str, Callable[[], list[Head]]] = {
        "global": lambda: order[:budget],
        "global_random": lambda: order[:budget],
        "global_c": lambda: _one_a_layer(order, budget),
        "layer": lambda: _even(order, budget, layers),
        "layer_random": lambda: _even(order, budget, layers),
        "fixed": lambda: _first_heads(budget, layers),
    }
    return HeadMap.from_fa(
        picks[strategy](), layers, heads, shape.num_kv_groups, fingerprint=fingerprint, strategy=strategy, made_by=made_by or {}
    )


def _one_a_layer(order: Sequence[Head], budget: int) -> list[Head]:
    """Each layer's best head, then the best of the others: the top ``budget`` with empty layers' best promoted."""
    first: dict[int, Head] = {}
    for at in order:
        first.setdefault(at[0], at)
    kept = set(first.values())
    others = [at for at in order if at not in kept]
    return [*kept, *others[: budget - len(kept)]]


def _even(order: Sequence[Head], budget: int, layers: int) -> list[Head]:
    """The first ``budget // layers`` heads of each layer in this order; the surplus, one a layer, in this order too."""
    each = budget // layers
    place = dict.fromkeys(range(layers), 0)
    kept, following = [], []
    for at in order:
        place[at[0]] += 1
        if place[at[0]] <= each:
            kept.append(at)
        elif place[at[0]] == each + 1:
            following.append(at)
    return kept + following[: budget - len(kept)]


def _first_heads(budget: int, layers: int) -> list[Head]:
    return [(layer, head) for layer in range(layers) for head in range((layer + 1) * budget // layers - layer * budget // layers)]
