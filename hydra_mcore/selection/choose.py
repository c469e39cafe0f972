# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""From a ranking of heads and a budget to a head map (the strategies of paper section 2, and some to compare with)."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from hydra_mcore.config import ModelShape
from hydra_mcore.errors import InputError
from hydra_mcore.heads import Head, HeadMap, every_head
from hydra_mcore.kinds import DEFAULT_LINEAR, FA, KINDS
from hydra_mcore.selection.optimise import best_in_blocks, best_in_groups, worths

STRATEGIES = {
    "global_c": "the best heads of the whole model, at least one in every layer",
    "global": "the best heads of the whole model; layers may be left without",
    "layer": "the best heads of each layer, the same number in all",
    "kv_groups": "the best heads of few kv groups, for a small KV cache",
    "tp": "the best heads, in every layer the same number for each tensor-parallel rank",
    "global_random": "heads drawn from the whole model",
    "layer_random": "heads drawn in each layer, the same number in all",
    "fixed": "the first heads of each layer, the same number in all",
    "hybrid": "all heads of some layers, evenly spaced, as layer-wise hybrid models have it",
}
SCORED = ("global_c", "global", "layer", "kv_groups", "tp")  # the strategies that need scores
OPTIMISED = ("kv_groups", "tp")  # those that need the values of the scores, not the ranking alone


@dataclass(frozen=True)
class Choice:
    """A head map, what it was chosen for and what it holds.

    ``kept`` and ``given_up`` are shares of sums of scores: nan without scores, or where one is negative. Where the sum
    to compare with is 0 nothing was lost: ``kept`` is 1, ``given_up`` 0.
    """

    head_map: HeadMap
    objective: str  # one sentence: what was maximised under which constraints
    kept: float  # share of the total score that the kept heads hold, 0..1
    given_up: float  # score lost against the best choice of as many heads (strategy "global"), as a share of that best
    kv_groups: int  # kv groups of all layers that stay alive; a group lives while one of its heads is FA
    kv_fraction: float  # kv_groups / all kv groups: the part of the teacher's KV cache that is left
    linear: tuple[str, ...]  # for each layer, the kind of its heads that are not kept


def parse_ratio(text: str, total: int) -> int:
    """The number of FA heads at a ratio of linear to FA heads such as "3:1", to the nearest whole head.

    Raises:
        InputError: not of the form LINEAR:FA, or it leaves no FA head.
    """
    match = re.fullmatch(r"(\d+):(\d+)", text.strip())
    if not match or int(match[2]) == 0:
        raise InputError(f"ratio {text!r}: write linear heads to FA heads as in 3:1")
    linear, fa = int(match[1]), int(match[2])
    budget = round(total * fa / (linear + fa))
    if budget == 0:
        raise InputError(f"ratio {text!r} keeps none of {total} heads; choose a smaller one")
    return budget


def hybrid_budget(shape: ModelShape, every: int) -> int:
    """The number of FA heads when every ``every``-th layer is full attention.

    Raises:
        InputError: ``every`` leaves no such layer.
    """
    if not 1 <= every <= shape.num_layers:
        raise InputError(f"every {every}: choose 1 to {shape.num_layers}, so that one layer at least is full attention")
    return shape.num_layers // every * shape.num_heads


def linear_kinds() -> list[str]:
    """The kinds that heads which are not kept can become."""
    return [kind for kind in KINDS if kind != FA]


def parse_linear(words: Iterable[str], num_layers: int) -> tuple[str, ...]:
    """For each layer the kind of its heads that are not kept.

    Args:
        words: a kind for all layers (``DEFAULT_LINEAR`` where it is left out), and exceptions, each a layer or a range
            of layers and its kind: "3=NAME", "0-3=NAME".

    Raises:
        InputError: a word of another form, a kind or a layer that does not exist, or a layer that is given twice.
    """
    everywhere, by_layer = "", {}
    for word in words:
        _, equals, kind = word.rpartition("=")
        if kind not in linear_kinds():
            known = ", ".join(linear_kinds())
            raise InputError(
                f"linear {word!r}: {kind!r} is no kind of linear heads; choose one of {known}, alone or after"
                f" layers as in 0-3={DEFAULT_LINEAR}"
            )
        if not equals and everywhere:
            raise InputError(
                f"linear {word!r}: all layers have the kind {everywhere}; give exceptions by layer, as in 0-3={kind}"
            )
        if not equals:
            everywhere = kind
            continue
        for layer in _layers(word, num_layers):
            if layer in by_layer:
                raise InputError(f"linear {word!r}: layer {layer} has the kind {by_layer[layer]} already; give it one")
            by_layer[layer] = kind
    return tuple(by_layer.get(layer, everywhere or DEFAULT_LINEAR) for layer in range(num_layers))


def _layers(word: str, num_layers: int) -> range:
    """The layers of "3=NAME" or "0-3=NAME"; raises InputError for what names none."""
    where, _, kind = word.rpartition("=")
    match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", where)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
    if first > last:
        raise InputError(f"linear {word!r}: write a layer, or the first and the last of several, as in 0-3={kind}")
    if last >= num_layers:
        raise InputError(f"linear {word!r}: there is no layer {last}; layers are 0 to {num_layers - 1}")
    return range(first, last + 1)


def linear_words(linear: Sequence[str]) -> str:
    """What heads that are not kept become, for the reader; where layers differ, with the layers."""
    named, start = [], 0
    for kind, run in itertools.groupby(linear):
        stop = start + len(list(run))
        layers = f"layer {start}" if stop == start + 1 else f"layers {start} to {stop - 1}"
        where = f" in {layers}" if len(set(linear)) > 1 else ""
        named.append(f"{KINDS[kind].title} ({KINDS[kind].label}) heads{where}")
        start = stop
    return ", ".join(named)


def choose_heads(
    strategy: str,
    shape: ModelShape,
    budget: int,
    *,
    scores: Sequence[Sequence[float]] | None = None,
    ranking: Sequence[Head] = (),
    seed: int = 0,
    kv_budget: int | None = None,
    tp_size: int = 1,
    every: int | None = None,
    linear: Sequence[str] = (),
    fingerprint: str = "",
    made_by: dict[str, Any] | None = None,
) -> Choice:
    """Keep ``budget`` heads as full attention.

    Where a strategy gives every layer the same number and the budget does not divide, layers differ by one head;
    which of them get one more is decided by the ranking (layer), the draw (layer_random) or even spacing (fixed).
    Of choices with the same sum of scores, kv_groups and tp take the one whose places in the ranking sum to least.

    Args:
        scores: [layers][heads]; needed by the strategies in ``OPTIMISED``, and by all for ``kept`` and ``given_up``.
        ranking: all heads, best first, in line with the scores (``HeadScores.ranking``); needed by those in ``SCORED``.
        seed: of the random strategies. Each option is read by its own strategies only.
        kv_budget: of kv_groups: how many kv groups of the whole model may stay alive; None: the fewest that can hold
            the budget.
        tp_size: of tp: the number of ranks that share a layer's FA heads evenly.
        every: of hybrid: full attention in layers every - 1, 2 * every - 1, ... (counted from 0) as Megatron's
            --linear-attention-freq has it; the budget must be ``hybrid_budget``. None: as many layers as the budget
            fills, evenly spaced, each the last of its block; the same layers where the blocks are equally long.
        linear: what heads that are not kept become, in the words of ``parse_linear``.

    Raises:
        InputError: an unknown strategy, a budget or an option out of range, or scores that a strategy lacks.
    """
    kv_budget = _fewest_groups(shape, budget) if kv_budget is None else kv_budget
    _check_budget(strategy, shape, budget)
    _check_option(strategy, shape, budget, kv_budget, tp_size, every)
    _check_scores(strategy, shape, scores, ranking)
    layers, heads, groups = shape.num_layers, shape.num_heads, shape.num_kv_groups
    order = list(ranking)
    if strategy.endswith("_random"):
        order = every_head(layers, heads)
        random.Random(seed).shuffle(order)
    picks: dict[str, Callable[[], list[Head]]] = {
        "global": lambda: order[:budget],
        "global_c": lambda: _one_a_layer(order, budget),
        "layer": lambda: _even(order, budget, layers),
        "fixed": lambda: _first_heads(budget, layers),
        "hybrid": lambda: _whole_layers(budget // heads, layers, heads, every),
        "kv_groups": lambda: best_in_groups(worths(scores, order), groups, budget, kv_budget),
        "tp": lambda: best_in_blocks(worths(scores, order), budget, tp_size),
    }
    kept, kinds = picks[strategy.removesuffix("_random")](), parse_linear(linear, layers)
    facts = {"model": dataclasses.asdict(shape), "strategy": strategy, "made_by": made_by or {}}
    head_map = HeadMap.from_fa(kept, layers, heads, groups, kinds, fingerprint=fingerprint, **facts)
    objective, alive = _objective(strategy, shape, budget, kv_budget, tp_size), kv_groups_alive(shape, kept)
    return Choice(head_map, objective, *_shares(kept, scores), alive, alive / (layers * groups), kinds)


def kv_groups_alive(shape: ModelShape, kept: Iterable[Head]) -> int:
    """How many kv groups of all layers a kept head reads."""
    return len({(layer, head * shape.num_kv_groups // shape.num_heads) for layer, head in kept})


def _fewest_groups(shape: ModelShape, heads: int) -> int:
    """How many kv groups can hold so many heads."""
    return math.ceil(heads * shape.num_kv_groups / shape.num_heads)


def _check_budget(strategy: str, shape: ModelShape, budget: int) -> None:
    if strategy not in STRATEGIES:
        raise InputError(f"strategy {strategy!r}; choose one of {', '.join(STRATEGIES)}")
    layers, total = shape.num_layers, shape.num_layers * shape.num_heads
    least = layers if strategy == "global_c" else 0
    if not least <= budget <= total:
        why = (
            f" ({strategy} keeps one in each of {layers} layers; strategy global has no such lower bound)"
            if least > budget >= 0
            else ""
        )
        raise InputError(f"budget {budget}: choose {least} to {total} heads{why}")


def _check_option(
    strategy: str, shape: ModelShape, budget: int, kv_budget: int, tp_size: int, every: int | None
) -> None:
    """Raise InputError unless the strategy's own option can hold the budget."""
    heads, groups = shape.num_heads, shape.num_layers * shape.num_kv_groups
    if strategy == "kv_groups":
        least = _fewest_groups(shape, budget)
        if not least <= kv_budget <= groups:
            raise InputError(
                f"kv budget {kv_budget}: choose {least} to {groups} kv groups ({least} can hold {budget} heads)"
            )
    elif strategy == "tp":
        if tp_size < 1 or heads % tp_size:
            raise InputError(
                f"tensor parallel size {tp_size} does not divide {heads} query heads; choose one that does"
            )
        _check_multiple(
            budget,
            tp_size,
            f"budget {budget} is not the same number of heads for each of {tp_size} tensor-parallel ranks",
        )
    elif strategy == "hybrid" and every is None:
        _check_multiple(budget, heads, f"budget {budget} is not a number of whole layers of {heads} heads")
    elif strategy == "hybrid" and budget != (implied := hybrid_budget(shape, every)):
        raise InputError(
            f"budget {budget}: every {every} of {shape.num_layers} layers keeps {implied} heads; choose that budget"
        )


def _check_multiple(budget: int, unit: int, problem: str) -> None:
    if budget % unit:
        raise InputError(f"{problem}; choose {budget // unit * unit} or {(budget // unit + 1) * unit}")


def _check_scores(
    strategy: str, shape: ModelShape, scores: Sequence[Sequence[float]] | None, ranking: Sequence[Head]
) -> None:
    layers, heads = shape.num_layers, shape.num_heads
    everything = every_head(layers, heads)
    if (strategy in SCORED and sorted(ranking) != everything) or (strategy in OPTIMISED and scores is None):
        raise InputError(f"strategy {strategy} needs a score for every one of the {len(everything)} heads")
    if scores is not None:
        whole = [len(row) for row in scores] == [heads] * layers
        if not (whole and all(map(math.isfinite, itertools.chain.from_iterable(scores)))):
            raise InputError(f"scores: give every head a finite number, {layers} layers x {heads} heads")


def _objective(strategy: str, shape: ModelShape, budget: int, kv_budget: int, tp_size: int) -> str:
    constraints = {
        "global": "",
        "global_c": ", at least one in every layer",
        "layer": ", layers differing by at most one head",
        "kv_groups": f" in at most {kv_budget} of {shape.num_layers * shape.num_kv_groups} kv groups",
        "tp": f", in every layer a multiple of {tp_size}",
    }
    if strategy in SCORED:
        return f"The highest sum of scores that {budget} heads can have{constraints[strategy]}."
    return f"No scores were maximised: {budget} heads, {STRATEGIES[strategy]}."


def _shares(kept: Sequence[Head], scores: Sequence[Sequence[float]] | None) -> tuple[float, float]:
    """``kept`` and ``given_up`` of a Choice; sums are rounded once (fsum), so that equal choices give up exactly 0."""
    values = [] if scores is None else sorted(map(float, itertools.chain.from_iterable(scores)), reverse=True)
    if not values or values[-1] < 0:
        return math.nan, math.nan
    held = math.fsum(scores[layer][head] for layer, head in kept)
    total, best = math.fsum(values), math.fsum(values[: len(kept)])
    return held / total if total else 1.0, 1 - held / best if best else 0.0


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
    chosen: list[Head] = []
    for layer in range(layers):
        count = (layer + 1) * budget // layers - layer * budget // layers
        chosen += [(layer, head) for head in range(count)]
    return chosen


def _whole_layers(full: int, layers: int, heads: int, every: int | None) -> list[Head]:
    """All heads of ``full`` layers: each ``every``-th one, or the last of each of ``full`` blocks as equal as
    can be.
    """
    chosen = [(at + 1) * every - 1 if every else (at + 1) * layers // full - 1 for at in range(full)]
    return list(itertools.product(chosen, range(heads)))
