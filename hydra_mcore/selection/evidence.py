# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""How far head scores can be trusted, and what a choice made by them would cost: numbers only, from the scores
alone.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from hydra_mcore.config import ModelShape
from hydra_mcore.errors import InputError
from hydra_mcore.files import from_fields, read_json
from hydra_mcore.heads import Head
from hydra_mcore.kinds import FA, KINDS
from hydra_mcore.selection.choose import kv_groups_alive
from hydra_mcore.selection.score import CRITICAL, HeadScores, ProbeEffects

RATIOS = (1, 2, 3, 5, 7, 9, 11, 15)  # linear heads to one FA head
CONTEXTS = (4096, 32_768, 131_072, 524_288)  # tokens
KNOCK_OUT_ORDERS = ("best first", "worst first", "random")


# Estimates among ``HeadScores.observed``, and the role whose exact effect each stands for.
ESTIMATES = {"attribution, receivers": "receiver", "attribution, senders": "sender"}


class Likeness(NamedTuple):
    """One comparison of two rankings."""

    spearman: float  # of all scores
    overlap: float  # Jaccard index of the two sets of kept heads


@dataclass(frozen=True)
class Spread:
    """Mean of some draws, and the range that holds nine tenths of them."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: ArrayLike) -> Spread:
        return cls(float(np.mean(values)), *np.percentile(values, (5, 95)).tolist())


@dataclass(frozen=True)
class LikenessSpread:
    """Likeness over many draws."""

    spearman: Spread
    overlap: Spread

    @classmethod
    def of(cls, draws: Sequence[Likeness]) -> LikenessSpread:
        return cls(*(Spread.of(values) for values in zip(*draws, strict=True)))


def spearman(a: ArrayLike, b: ArrayLike) -> float:
    """Rank correlation of two arrays of one size, tied values sharing their mean rank; 0 where one is constant: it
    orders nothing.
    """
    x, y = (rank - rank.mean() for rank in map(_ranks, (a, b)))
    norm = np.linalg.norm(x) * np.linalg.norm(y)
    return float(x @ y / norm) if norm else 0.0


def _ranks(values: ArrayLike) -> np.ndarray:
    _, place, count = np.unique(np.ravel(values), return_inverse=True, return_counts=True)
    return (count.cumsum() - (count - 1) / 2)[place]


def overlap(ranking_a: Sequence[Hashable], ranking_b: Sequence[Hashable], k: int) -> float:
    """Jaccard index of the first ``k`` of two rankings; 1 where both are empty."""
    a, b = set(ranking_a[:k]), set(ranking_b[:k])
    return len(a & b) / len(a | b) if a | b else 1.0


def likeness(a: HeadScores, b: HeadScores, budget: int) -> Likeness:
    """How far two scorings of one model agree, on all heads and on the ``budget`` best."""
    return Likeness(spearman(a.scores_lh, b.scores_lh), overlap(a.ranking(), b.ranking(), budget))


def stability_by_pairs(scores: HeadScores, budget: int, draws: int = 20, seed: int = 0) -> dict[int, LikenessSpread]:
    """Random subsets of n usable pairs of every probe against all pairs, by n = 1, 2, 3, 4, 6, 8, 12, ... up to all.

    A subset is a part of what it is compared with, so agreement rises to 1 by itself; ``stability_of_halves`` has no
    such help. In both, the receivers that senders were measured by are those that all pairs found.
    """
    rng, used = np.random.default_rng(seed), _used(scores)

    def draw(count: int) -> Likeness:
        part = scores.take({name: rng.permutation(index)[:count] for name, index in used.items()})
        return likeness(part, scores, budget)

    return _by_count(draw, max(map(len, used.values())), draws)


def stability_of_halves(scores: HeadScores, budget: int, draws: int = 20, seed: int = 0) -> dict[int, LikenessSpread]:
    """Two disjoint random sets of n usable pairs of every probe against each other, by n; a probe of one pair is left
    out.

    Empty where no probe that weighs has two usable pairs. For what is kept from all pairs, see ``stability_by_pairs``.
    """
    rng = np.random.default_rng(seed)
    used = {name: index for name, index in _used(scores).items() if len(index) > 1}
    if not any(scores.weights.get(scores.probes[name].capability, 1.0) > 0 for name in used):
        return {}

    def draw(count: int) -> Likeness:
        mixed = {name: rng.permutation(index) for name, index in used.items()}
        size = {name: min(count, len(index) // 2) for name, index in used.items()}
        one = scores.take({name: index[: size[name]] for name, index in mixed.items()})
        other = scores.take({name: index[size[name] : 2 * size[name]] for name, index in mixed.items()})
        return likeness(one, other, budget)

    return _by_count(draw, max(len(index) // 2 for index in used.values()), draws)


def stability_by_length(scores: HeadScores, by_length: Mapping[int, HeadScores], budget: int) -> dict[int, Likeness]:
    """Scores from prompts of other lengths (in tokens) against these, by length."""
    return {length: likeness(by_length[length], scores, budget) for length in sorted(by_length)}


def _used(scores: HeadScores) -> dict[str, np.ndarray]:
    """The pairs that count of each probe that counts; the others would come back as probes of good pairs alone."""
    return {name: np.flatnonzero(probe.used_b) for name, probe in scores.probes.items() if probe.usable}


def _by_count(draw: Callable[[int], Likeness], most: int, draws: int) -> dict[int, LikenessSpread]:
    return {count: LikenessSpread.of([draw(count) for _ in range(draws)]) for count in pair_counts(most)}


def pair_counts(most: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, 16, ... below ``most``, then ``most``; empty for 0."""
    powers = range(most.bit_length())
    steps = {1 << power for power in powers} | {3 << power for power in powers}
    return sorted({step for step in steps if step < most} | {most} - {0})


@dataclass(frozen=True, eq=False)
class Bootstrap:
    """What the scores might have been with other pairs of the same kind."""

    low_lh: np.ndarray  # 5% and 95% of a head's score
    high_lh: np.ndarray
    chosen_lh: np.ndarray  # chance, 0..1, that the head is among the best ``budget``
    draws: int


def bootstrap(scores: HeadScores, budget: int, draws: int = 500, seed: int = 0) -> Bootstrap:
    """Score anew from pairs drawn with replacement within each probe; probes and prompt length stay, so their choice is
    not judged.
    """
    rng, used = np.random.default_rng(seed), _used(scores)
    scores_nlh, chosen_lh = np.empty((draws, *scores.scores_lh.shape)), np.zeros(scores.scores_lh.shape)
    for drawn_lh in scores_nlh:
        other = scores.take({name: rng.choice(index, len(index)) for name, index in used.items()})
        drawn_lh[:] = other.scores_lh
        chosen_lh[tuple(np.array(other.ranking()[:budget], dtype=int).reshape(-1, 2).T)] += 1 / draws
    low_lh, high_lh = np.percentile(scores_nlh, (5, 95), axis=0)
    return Bootstrap(low_lh, high_lh, chosen_lh, draws)


def random_overlap(total: int, k: int) -> float:
    """Expected Jaccard index of two random choices of ``k`` of ``total`` heads (their intersection is
    hypergeometric).
    """
    if k == 0:
        return 1.0
    ways = math.comb(total, k)
    return sum(
        math.comb(k, both) * math.comb(total - k, k - both) / ways * both / (2 * k - both) for both in range(k + 1)
    )


def label_control(scores: HeadScores, budget: int, draws: int = 200, seed: int = 0) -> LikenessSpread:
    """The scores against themselves with the heads' labels shuffled: what agreement chance gives."""
    rng, flat = np.random.default_rng(seed), scores.scores_lh.ravel()
    order = [layer * scores.shape.num_heads + head for layer, head in scores.ranking()]

    def draw() -> Likeness:
        given = rng.permutation(flat.size)  # head i gets the score of head given[i]
        return Likeness(spearman(flat, flat[given]), overlap(order, np.argsort(given)[order].tolist(), budget))

    return LikenessSpread.of([draw() for _ in range(draws)])


def observed_likeness(scores: HeadScores, budget: int) -> dict[str, Likeness]:
    """Each cheap score (``scores.observed``) against what it stands for.

    An estimate of one role (``ESTIMATES``) is compared with that role's exact effect, and left out where that was not
    measured; what only looks is compared with the causal score.
    """
    exact = {role: np.mean(list(parts.values()), axis=0) for role, parts in role_effects(scores).items()}
    found = {}
    for name, observed_lh in scores.observed.items():
        if name in ESTIMATES and ESTIMATES[name] not in exact:
            continue
        causal_lh = exact[ESTIMATES[name]] if name in ESTIMATES else scores.scores_lh
        best = [np.argsort(-values_lh, axis=None, kind="stable").tolist() for values_lh in (observed_lh, causal_lh)]
        found[name] = Likeness(spearman(observed_lh, causal_lh), overlap(*best, budget))
    return found


def role_effects(scores: HeadScores) -> dict[str, dict[str, np.ndarray]]:
    """Role ("receiver", "sender") -> capability -> |effect| [l, h], averaged over sub-probes; of a sender the largest
    round's.
    """
    parts: dict[str, list[np.ndarray]] = {}
    for probe in _counted(scores):
        size_rlh = abs(probe.mean_rlh())
        size_rlh = size_rlh if len(size_rlh) > 1 else np.concatenate([size_rlh, np.zeros_like(size_rlh)])
        parts.setdefault(probe.capability, []).append(np.stack([size_rlh[0], size_rlh[1:].max(0)]))
    roles = ("receiver", "sender") if any(probe.receivers for probe in _counted(scores)) else ("receiver",)
    return {
        role: {name: np.mean(sizes, axis=0)[index] for name, sizes in parts.items()} for index, role in enumerate(roles)
    }


def critical_heads(scores: HeadScores) -> tuple[np.ndarray, np.ndarray]:
    """Two masks [l, h]: heads whose effect reaches CRITICAL in some capability, and heads that reach it in no sub-probe
    and role.

    The latter can be converted as far as patching tells. The heads in neither reach it somewhere, but not on average.
    """
    critical_lh = np.any([effect_lh >= CRITICAL for _, effect_lh in scores.by_capability.values()], axis=0)
    return critical_lh, ~np.any([(abs(probe.mean_rlh()) >= CRITICAL).any(0) for probe in _counted(scores)], axis=0)


def _counted(scores: HeadScores) -> list[ProbeEffects]:
    return [probe for probe in scores.probes.values() if probe.usable]


def gini(values: ArrayLike) -> float:
    """Gini coefficient of values >= 0: 0 all alike (or all zero), (n - 1) / n all in one of n."""
    ordered = np.sort(np.ravel(values))
    count, total = len(ordered), ordered.sum()
    return float((2 * np.arange(1, count + 1) - count - 1) @ ordered / (count * total)) if total > 0 else 0.0


def kept_share(scores: HeadScores) -> np.ndarray:
    """[l * h + 1] share of all scores' sum in the k best heads, k from 0."""
    best = np.array([scores.scores_lh[at] for at in scores.ranking()])
    return np.concatenate([[0.0], best.cumsum()]) / max(best.sum(), 1e-12)


@dataclass(frozen=True)
class Cost:
    """What a budget costs against the teacher; shares, by context in tokens where they depend on it."""

    ratio: str  # linear heads to FA heads
    num_fa: int
    kept: float  # share of the score
    kv_fraction: float  # kv groups with an FA head: what is left of the K/V cache
    decode: dict[int, float]  # attention FLOPs of the next token
    prefill: dict[int, float]  # attention FLOPs of a whole prompt


def costs(
    scores: HeadScores, linear: Sequence[str], ratios: Sequence[int] = RATIOS, contexts: Sequence[int] = CONTEXTS
) -> list[Cost]:
    """Costs of keeping the best heads of the whole model (strategy ``global``), by ratio; ratios that keep no head are
    left out. ``linear`` is the kind of the other heads, for each layer.
    """
    shape, ranking, kept = scores.shape, scores.ranking(), kept_share(scores)
    budgets = {f"{ratio}:1": round(len(ranking) / (ratio + 1)) for ratio in ratios}
    return [
        Cost(
            ratio=name,
            num_fa=budget,
            kept=float(kept[budget]),
            kv_fraction=kv_fraction(shape, ranking[:budget]),
            decode={context: attention_flops(shape, ranking[:budget], linear, context) for context in contexts},
            prefill={context: attention_flops(shape, ranking[:budget], linear, context / 2) for context in contexts},
        )
        for name, budget in budgets.items()
        if budget
    ]


def kv_fraction(shape: ModelShape, kept: Sequence[Head]) -> float:
    """Share of the teacher's kv groups that a kept head reads; states of constant size are left out."""
    return kv_groups_alive(shape, kept) / (shape.num_layers * shape.num_kv_groups)


def attention_flops(shape: ModelShape, kept: Sequence[Head], linear: Sequence[str], seen: float) -> float:
    """FLOPs a token of all heads over those of the teacher's; projections, gates and MLPs, whose cost no context
    raises, are left out.

    An FA head takes 4 d n at the end of a context of n, and on average 2 d n over a causal prefill of n, since a token
    sees n / 2 others.

    Args:
        linear: for each layer the kind of its heads that are not kept.
        seen: tokens a token attends to: n at the end of a context, n / 2 on average over a prefill.
    """
    heads = Counter({FA: len(kept)})
    fa_by_layer = Counter(layer for layer, _ in kept)
    for layer, kind in enumerate(linear):
        heads[kind] += shape.num_heads - fa_by_layer[layer]
    one = {kind: KINDS[kind].decode_flops(shape.head_dim, seen) for kind in heads}
    return sum(count * one[kind] for kind, count in heads.items()) / (shape.num_layers * shape.num_heads * one[FA])


@dataclass(frozen=True)
class KnockOut:
    """Accuracy (0..1) of the teacher with ever more heads removed, in the orders of ``KNOCK_OUT_ORDERS``."""

    fractions: tuple[float, ...]  # of all heads, removed at each point
    heads: tuple[int, ...]  # their number
    accuracy: dict[str, tuple[tuple[float, ...], ...]]  # order -> one curve a draw; only "random" has several
    prompts: int

    def __post_init__(self) -> None:
        curves = list(itertools.chain.from_iterable(self.accuracy.values()))
        if (
            not self.fractions
            or not curves
            or {len(curve) for curve in curves} | {len(self.heads)} != {len(self.fractions)}
        ):
            raise InputError("every curve needs one accuracy for each fraction of heads")
        if not all(self.accuracy.values()) or not self.accuracy.keys() <= set(KNOCK_OUT_ORDERS):
            raise InputError(f"curves are needed for orders among {', '.join(KNOCK_OUT_ORDERS)}")
        shares = [*self.fractions, *itertools.chain.from_iterable(curves)]
        if not all(0 <= share <= 1 for share in shares) or min(*self.heads, self.prompts) < 0:
            raise InputError("fractions and accuracies go from 0 to 1, heads and prompts from 0 on")

    def spread(self, order: str) -> np.ndarray:
        """[3, points]: mean, least and largest of an order's draws."""
        curves = np.array(self.accuracy[order])
        return np.stack([curves.mean(0), curves.min(0), curves.max(0)])

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def load(cls, path: Path) -> KnockOut:
        """Read a file of these curves; raises InputError for a broken one."""
        return from_fields(cls, read_json(path, what="knock-out"), f"knock-out {path}")


@dataclass(frozen=True, eq=False)
class Evidence:
    """All of the above for one scoring and one budget."""

    budget: int
    by_pairs: dict[int, LikenessSpread]
    halves: dict[int, LikenessSpread]
    by_length: dict[int, Likeness]
    bootstrap: Bootstrap
    random_overlap: float
    control: LikenessSpread
    gini_l: np.ndarray  # of the scores within each layer
    share_l: np.ndarray  # of the whole score, in each layer
    costs: list[Cost]
    observed: dict[str, Likeness]
    critical_lh: np.ndarray
    convertible_lh: np.ndarray


def gather(
    scores: HeadScores, budget: int, linear: Sequence[str], by_length: Mapping[int, HeadScores] | None = None
) -> Evidence:
    """Compute all evidence for a choice of heads; this takes some seconds for 28 x 16 heads."""
    critical_lh, convertible_lh = critical_heads(scores)
    layer_l = scores.scores_lh.sum(1)
    return Evidence(
        budget=budget,
        by_pairs=stability_by_pairs(scores, budget),
        halves=stability_of_halves(scores, budget),
        by_length=stability_by_length(scores, by_length or {}, budget),
        bootstrap=bootstrap(scores, budget),
        random_overlap=random_overlap(scores.scores_lh.size, budget),
        control=label_control(scores, budget),
        gini_l=np.array([gini(score_h) for score_h in scores.scores_lh]),
        share_l=layer_l / max(layer_l.sum(), 1e-12),
        costs=costs(scores, linear),
        observed=observed_likeness(scores, budget),
        critical_lh=critical_lh,
        convertible_lh=convertible_lh,
    )
