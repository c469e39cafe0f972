# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""From the effects of single pairs to one score a head (paper Eq 11 and 12), and the file that keeps them.

Arrays of effects carry the suffix ``rlhb``: role, layer, head, pair. Role 0 is the receiver (Eq 10, paths to the
    logits),
role k the sender of round k (paths to the receivers found in round k - 1).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from hydra_mcore.config import ModelCard, ModelShape
from hydra_mcore.errors import InputError
from hydra_mcore.files import from_fields, is_name, read_json, shown, write_json
from hydra_mcore.heads import Head, every_head

SCORES_FORMAT = 2
CRITICAL = 0.01  # |IE| from which a head counts in a sub-probe (paper section 2)
MIN_GAP = 0.5  # logits by which the corruption must lower m; a smaller gap would blow rounding up into an effect

ROLES = ("both", "receiver")  # what Eq 11 may look at
SCORES = {
    "causal": "the effect, the paper's rule",
    "replaceable": "what the best linear head would leave of the output",
    "product": "the effect times what the best linear head would leave",
}
MIN_SHARE = 0.25  # of a sub-probe's pairs that must count, or it is left out


class ScoresError(InputError):
    """Head scores that cannot be used."""


@dataclass(frozen=True, eq=False)
class ProbeEffects:
    """One sub-probe: what patching each head did to each of its pairs."""

    capability: str
    effects_rlhb: np.ndarray  # float64; 1 when a head alone moves the metric as far as the corrupt prompt does
    receivers: tuple[tuple[Head, ...], ...]  # those that the senders of round 1, 2, ... were measured by
    clean_b: np.ndarray  # m(x), in logits
    corrupt_b: np.ndarray  # m(x')
    solved_b: np.ndarray  # bool: the teacher's own answer is right

    @property
    def used_b(self) -> np.ndarray:
        """Pairs that count: the teacher is right, and the corruption moves it."""
        return self.solved_b & (self.clean_b - self.corrupt_b >= MIN_GAP)

    @property
    def used(self) -> int:
        return int(self.used_b.sum())

    @property
    def unsolved(self) -> int:
        """Pairs left out because the teacher's own answer is wrong."""
        return int((~self.solved_b).sum())

    @property
    def unmoved(self) -> int:
        """Pairs left out because the corruption moves the metric by less than MIN_GAP."""
        return int((self.solved_b & ~self.used_b).sum())

    @property
    def usable(self) -> bool:
        """Whether enough pairs count: a few lucky answers to what the teacher cannot do are no sub-probe."""
        return self.used >= max(1, MIN_SHARE * len(self.solved_b))

    def mean_rlh(self) -> np.ndarray:
        """Effects averaged over the used pairs.

        A pair's effect is clipped to [-1, 1], so that one pair with a small denominator cannot rule the mean. Signs are
        kept until the mean is taken: noise then cancels, and only a steady effect, in either direction, counts.
        """
        return self.effects_rlhb[..., self.used_b].clip(-1, 1).mean(-1)

    def take(self, pairs: ArrayLike) -> ProbeEffects:
        """The same probe with these of its pairs, in this order, repeats allowed."""
        index = np.asarray(pairs)
        arrays = {
            name: getattr(self, name)[..., index] for name in ("effects_rlhb", "clean_b", "corrupt_b", "solved_b")
        }
        return dataclasses.replace(self, **arrays)


@dataclass(frozen=True, eq=False)
class Replaceability:
    """How well a linear head of one kind could imitate each head (``model/imitation.py``); arrays [l, h]."""

    residual: np.ndarray  # share of the head's output, squared, that the best values leave on held-out tokens
    inherited: np.ndarray  # the same with the inherited values in the same memory
    half_life: np.ndarray  # of the best memory, in tokens
    fastest: np.ndarray  # its half-life in the fastest channels
    write: np.ndarray  # its write strength


def capability_scores(means: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Eq 11 of one capability from the mean effects [r, l, h] of its sub-probes: score s and size of the effect, [l,
    h].

    s = |IE| * kappa in the role in which |IE|, averaged over the sub-probes, is largest; kappa is the fraction of
    sub-probes in which |IE| >= CRITICAL in that role.
    """
    roles = max(len(mean) for mean in means)
    size_irlh = np.stack([np.pad(abs(mean), ((0, roles - len(mean)), (0, 0), (0, 0))) for mean in means])
    effect_rlh, kappa_rlh = size_irlh.mean(0), (size_irlh >= CRITICAL).mean(0)
    role_lh = effect_rlh.argmax(0)[None]
    effect_lh, kappa_lh = (np.take_along_axis(values, role_lh, axis=0)[0] for values in (effect_rlh, kappa_rlh))
    return effect_lh * kappa_lh, effect_lh


def fuse(scores: Mapping[str, np.ndarray], weights: Mapping[str, float]) -> np.ndarray:
    """Eq 12: the weighted mean of the capabilities' scores [l, h], each scaled to 0..1 by its least and largest."""
    scaled = {name: (value - value.min()) / max(np.ptp(value), 1e-12) for name, value in scores.items()}
    return sum(weights[name] * value for name, value in scaled.items()) / sum(weights[name] for name in scaled)


@dataclass(frozen=True, eq=False)
class HeadScores:
    """The effects of every head of one teacher, and all that is needed to make them again."""

    shape: ModelShape
    fingerprint: str
    probes: dict[str, ProbeEffects]
    weights: dict[str, float] = field(default_factory=dict)  # of capabilities in Eq 12; those not named count 1
    roles: str = "both"  # one of ROLES
    observed: dict[str, np.ndarray] = field(default_factory=dict)  # [l, h] scores that look and do not patch, by name
    replaceability: dict[str, Replaceability] = field(default_factory=dict)  # by kind of linear heads
    score: str = "causal"  # one of SCORES
    become: tuple[str, ...] = ()  # for each layer the kind of its linear heads; needed by scores other than causal
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.roles not in ROLES:
            raise ScoresError(f"roles {shown(self.roles)}: choose one of {', '.join(ROLES)}")
        counted = {probe.capability for probe in self.probes.values() if probe.usable}
        if not counted:
            unsolved, pairs = (
                sum(p.unsolved for p in self.probes.values()),
                sum(len(p.solved_b) for p in self.probes.values()),
            )
            raise ScoresError(
                f"no usable probe: the teacher fails {unsolved} of {pairs} prompts, of the rest few react to another"
                " value; try a shorter --length, or the needle --template it knows"
            )
        if not any(self.weights.get(name, 1.0) > 0 for name in counted):
            raise ScoresError(
                f"no score without weight: {', '.join(sorted(counted))} count 0; give one a weight above 0"
            )
        if self.score != "causal" and (missing := sorted(set(self.become) - set(self.replaceability))):
            raise ScoresError(
                f"score {self.score}: the file holds no imitations by {missing[0]}; score the teacher with"
                f" --replaceable-by {missing[0]}"
            )

    @cached_property
    def by_capability(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """(score, size of the effect) [l, h] of each capability; sub-probes that are not usable are left out."""
        means: dict[str, list[np.ndarray]] = {}
        for probe in self.probes.values():
            if probe.usable:
                mean_rlh = probe.mean_rlh()
                means.setdefault(probe.capability, []).append(mean_rlh[:1] if self.roles == "receiver" else mean_rlh)
        return {name: capability_scores(parts) for name, parts in means.items()}

    @cached_property
    def scores_lh(self) -> np.ndarray:
        """One score a head from 0 on, what ``score`` says."""
        if self.score == "causal":
            return self.causal_lh
        return self.residual_lh if self.score == "replaceable" else self.causal_lh * self.residual_lh

    @cached_property
    def residual_lh(self) -> np.ndarray:
        """What the best linear head of the layer's kind leaves of each head's output."""
        return np.stack([self.replaceability[kind].residual[layer] for layer, kind in enumerate(self.become)])

    @cached_property
    def causal_lh(self) -> np.ndarray:
        """0..1: Eq 12 over the capabilities that have a usable probe."""
        scores = {name: score_lh for name, (score_lh, _) in self.by_capability.items()}
        return fuse(scores, {name: self.weights.get(name, 1.0) for name in scores})

    @cached_property
    def effects_lh(self) -> np.ndarray:
        """Mean size of the effect over the capabilities; ranks the heads whose causal score is 0."""
        return np.mean([effect_lh for _, effect_lh in self.by_capability.values()], axis=0)

    def ranking(self) -> list[Head]:
        """All (layer_idx, head_idx), best first: by score, then by what the score rests on, then by place, so that the
        order is always the same.

        Effects too small to count differ by chance; where residuals are known they say more [ours].
        """
        then_lh = self.effects_lh if self.score == "causal" else self.residual_lh
        return sorted(every_head(*self.scores_lh.shape), key=lambda at: (-self.scores_lh[at], -then_lh[at], at))

    def take(self, pairs: Mapping[str, ArrayLike]) -> HeadScores:
        """The scores that these pairs of each probe give (subsets, or resamples with repeats)."""
        return dataclasses.replace(self, probes={name: self.probes[name].take(index) for name, index in pairs.items()})

    def check_teacher(self, card: ModelCard) -> None:
        """Raise ScoresError when the scores belong to another teacher, naming the difference."""
        if difference := card.difference(dataclasses.asdict(self.shape), self.fingerprint):
            raise ScoresError(f"the scores are for another model: {difference}; score this teacher anew")

    def save(self, path: str | Path) -> None:
        """Write JSON beside the target, then rename."""
        probes = {
            name: {
                "capability": probe.capability,
                "receivers": probe.receivers,
                "solved": probe.solved_b.tolist(),
                "clean": _rounded(probe.clean_b),
                "corrupt": _rounded(probe.corrupt_b),
                "effects": _rounded(probe.effects_rlhb),
            }
            for name, probe in self.probes.items()
        }
        raw = {
            "format": SCORES_FORMAT,
            "model": dataclasses.asdict(self.shape),
            "fingerprint": self.fingerprint,
            "settings": self.settings,
            "versions": self.versions,
            "weights": self.weights,
            "roles": self.roles,
            "scores": _rounded(self.causal_lh),  # for readers of the file; they follow from the effects
            "observed": {name: _rounded(value) for name, value in self.observed.items()},
            "replaceability": {
                kind: {name: _rounded(value) for name, value in vars(found).items()}
                for kind, found in self.replaceability.items()
            },
            "probes": probes,
        }
        write_json(path, raw, indent=None)

    @classmethod
    def load(cls, path: str | Path) -> HeadScores:
        """Read a scores file; raises ScoresError for a missing, broken or invalid one."""
        raw = read_json(path, ScoresError, "scores")
        found = raw.get("format") if isinstance(raw, dict) else type(raw).__name__
        if found != SCORES_FORMAT:
            raise ScoresError(f"scores {path}: format {shown(found)}, this version reads format {SCORES_FORMAT}")
        file = from_fields(_ScoresFile, raw, f"scores {path}", ScoresError)
        shape = file.model
        heads = (shape.num_layers, shape.num_heads)
        return cls(
            shape=shape,
            fingerprint=file.fingerprint,
            probes={name: probe.effects_of(path, name, shape) for name, probe in file.probes.items()},
            weights=file.weights,
            roles=file.roles,
            observed={name: _array(path, name, value, heads) for name, value in file.observed.items()},
            replaceability={kind: found.arrays(path, kind, heads) for kind, found in file.replaceability.items()},
            settings=file.settings,
            versions=file.versions,
        )


@dataclass(frozen=True)
class _ProbeFile:
    capability: str
    receivers: tuple[tuple[Head, ...], ...]
    solved: list[bool]
    clean: Any
    corrupt: Any
    effects: Any

    def effects_of(self, path: str | Path, name: str, shape: ModelShape) -> ProbeEffects:
        pairs, roles = len(self.solved), len(self.receivers) + 1
        effects_rlhb = _array(
            path, f"effects of {name}", self.effects, (roles, shape.num_layers, shape.num_heads, pairs)
        )
        if not set(np.ndindex(effects_rlhb.shape[1:3])).issuperset(itertools.chain(*self.receivers)):
            raise ScoresError(f"scores {path}: receivers of {name!r} are no heads of the model")
        clean_b, corrupt_b = (
            _array(path, f"{what} of {name}", getattr(self, what), (pairs,)) for what in ("clean", "corrupt")
        )
        return ProbeEffects(
            self.capability, effects_rlhb, self.receivers, clean_b, corrupt_b, np.asarray(self.solved, dtype=bool)
        )


@dataclass(frozen=True)
class _ReplaceabilityFile:
    residual: Any
    inherited: Any
    half_life: Any
    fastest: Any
    write: Any

    def arrays(self, path: str | Path, kind: str, heads: tuple[int, int]) -> Replaceability:
        return Replaceability(
            **{name: _array(path, f"{name} of {kind}", value, heads) for name, value in vars(self).items()}
        )


@dataclass(frozen=True)
class _ScoresFile:
    """What stands in a scores file; ``scores`` follows from the effects."""

    format: int
    model: ModelShape
    fingerprint: str
    settings: dict[str, Any]
    versions: dict[str, str]
    weights: dict[str, float]
    roles: str
    scores: Any
    observed: dict[str, Any]
    probes: dict[str, _ProbeFile]
    replaceability: dict[str, _ReplaceabilityFile] = field(default_factory=dict)  # older files have none

    def __post_init__(self) -> None:
        if min(self.weights.values(), default=0.0) < 0:
            raise ValueError("a weight is negative; give numbers from 0 on")
        capabilities = [probe.capability for probe in self.probes.values()]
        for text in (
            self.fingerprint,
            *self.settings,
            *self.versions,
            *self.observed,
            *self.replaceability,
            *self.probes,
            *capabilities,
        ):
            if not is_name(text):
                raise ValueError(f"{shown(text)} is not one short line, as names are")


def _array(path: str | Path, name: str, raw: Any, shape: tuple[int, ...]) -> np.ndarray:
    try:
        value = np.asarray(raw)
        if value.dtype.kind not in "biuf":  # texts, null, integers of any length
            raise ValueError
    except (ValueError, OverflowError):  # numpy's own: rows of different lengths, integers without end
        raise ScoresError(f"scores {path}: {name!r} is no table of numbers") from None
    value = value.astype(np.float64)
    if value.shape != shape:
        raise ScoresError(f"scores {path}: table {name!r} has shape {value.shape}, the model needs {shape}")
    if not np.isfinite(value).all():
        raise ScoresError(f"scores {path}: table {name!r} holds a value that is not a finite number")
    return value


def _rounded(values: np.ndarray) -> Any:
    """Nested lists of seven digits: what float32 holds, in half the space."""
    flat = [float(f"{value:.7g}") for value in values.ravel()]
    return np.asarray(flat).reshape(values.shape).tolist()
