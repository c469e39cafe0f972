# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""From the effects of single pairs to one score a head, and the file that keeps them."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hydra_mcore.config import ModelCard
from hydra_mcore.heads import InputError, write_json
from hydra_mcore.selection.patching import PairEffects

SCORES_FORMAT = 1
CRITICAL = 0.01  # |IE| from which a head counts in a sub-probe (paper section 2)
MIN_GAP = 0.5  # logits by which the corruption must lower m; a smaller gap would blow rounding up into an effect

Table = tuple[tuple[float, ...], ...]  # [layers][heads]


class ScoresError(InputError):
    """Head scores that cannot be used."""


@dataclass(frozen=True)
class ProbeScores:
    """One sub-probe: each head's effect, averaged over the pairs that could be used."""

    effects: Table  # Eq 10, each pair's clipped to [-1, 1]; zeros when no pair could be used
    pairs: int
    unsolved: int  # pairs left out because the teacher's own answer is wrong
    unmoved: int  # pairs left out because the corruption moves the metric by less than MIN_GAP
    mean_gap: float  # m(x) - m(x') over the used pairs, in logits

    @property
    def used(self) -> int:
        return self.pairs - self.unsolved - self.unmoved

    @classmethod
    def from_pairs(cls, batches: Iterable[PairEffects]) -> ProbeScores:
        """Average a sub-probe's batches.

        A pair's effect is clipped, so that one pair with a small denominator cannot rule the mean. Signs are
        kept until the mean is taken: noise then cancels, and only a steady effect, in either direction, counts.
        """
        results = list(batches)
        effects_lhb = torch.cat([result.effects_lhb for result in results], dim=-1)
        gap_b = torch.cat([result.clean_b - result.corrupt_b for result in results])
        solved_b = torch.cat([result.solved_b for result in results])
        used_b = solved_b & (gap_b >= MIN_GAP)
        if used_b.any():
            mean_lh, gap = effects_lhb[..., used_b].clamp(-1, 1).mean(-1), gap_b[used_b].mean().item()
        else:
            mean_lh, gap = torch.zeros(effects_lhb.shape[:2], dtype=torch.float64), 0.0
        return cls(
            effects=_table(mean_lh.tolist()),
            pairs=len(used_b),
            unsolved=int((~solved_b).sum()),
            unmoved=int((solved_b & ~used_b).sum()),
            mean_gap=gap,
        )


@dataclass(frozen=True)
class HeadScores:
    """Receiver scores of every head of one teacher, and all that is needed to make them again."""

    num_layers: int
    num_heads: int
    num_kv_groups: int
    fingerprint: str
    scores: Table  # s = mean |IE| * kappa
    effects: Table  # mean |IE| over the sub-probes; ranks the heads whose score is 0
    probes: dict[str, ProbeScores]
    settings: dict[str, Any]
    versions: dict[str, str]

    @classmethod
    def from_probes(cls, card: ModelCard, probes: dict[str, ProbeScores], settings: dict[str, Any], versions: dict[str, str]) -> HeadScores:
        """Eq 11 for one capability, with the receiver's effect alone: this version builds no sender score.

        kappa is the fraction of sub-probes in which |IE| >= CRITICAL. Sub-probes without a usable pair are left out.

        Raises:
            ScoresError: no sub-probe has a usable pair.
        """
        usable = [probe for probe in probes.values() if probe.used]
        if not usable:
            unsolved, pairs = (sum(getattr(probe, name) for probe in probes.values()) for name in ("unsolved", "pairs"))
            raise ScoresError(
                f"no usable pair: the teacher fails {unsolved} of {pairs} prompts, the rest hardly react to another value;"
                " try a shorter --length, or the needle --format it knows"
            )
        size_lh = torch.tensor([probe.effects for probe in usable], dtype=torch.float64).abs()
        effect_lh, kappa_lh = size_lh.mean(0), (size_lh >= CRITICAL).double().mean(0)
        return cls(
            num_layers=card.shape.num_layers,
            num_heads=card.shape.num_heads,
            num_kv_groups=card.shape.num_kv_groups,
            fingerprint=card.fingerprint,
            scores=_table((effect_lh * kappa_lh).tolist()),
            effects=_table(effect_lh.tolist()),
            probes=probes,
            settings=settings,
            versions=versions,
        )

    def ranking(self) -> list[tuple[int, int]]:
        """All (layer_idx, head_idx), best first: by score, then effect, then place, so the order is always the same."""
        heads = [(layer, head) for layer in range(self.num_layers) for head in range(self.num_heads)]
        return sorted(heads, key=lambda at: (-self.scores[at[0]][at[1]], -self.effects[at[0]][at[1]], at))

    def check_teacher(self, card: ModelCard) -> None:
        """Raise ScoresError when the scores belong to another teacher, naming the difference."""
        for name, label in (("num_layers", "layers"), ("num_heads", "heads"), ("num_kv_groups", "kv groups")):
            mine, theirs = getattr(self, name), getattr(card.shape, name)
            if mine != theirs:
                raise ScoresError(f"the scores are for another model: it has {mine} {label}, the teacher has {theirs}")
        if self.fingerprint != card.fingerprint:
            raise ScoresError(
                f"the scores were made for teacher {self.fingerprint[:12]}, this one is {card.fingerprint[:12]}; score this teacher anew"
            )

    def save(self, path: str | Path) -> None:
        """Write JSON beside the target, then rename."""
        write_json(path, {"format": SCORES_FORMAT, **dataclasses.asdict(self)})

    @classmethod
    def load(cls, path: str | Path) -> HeadScores:
        """Read a scores file; raises ScoresError for a missing, broken or invalid one."""
        try:
            raw = json.loads(Path(path).read_text())
        except OSError as error:
            raise ScoresError(f"scores {path}: {error.strerror}") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ScoresError(f"scores {path}: not JSON ({error})") from None
        found = raw.pop("format", None) if isinstance(raw, dict) else type(raw).__name__
        if found != SCORES_FORMAT:
            raise ScoresError(f"scores {path}: format {found!r}, this version reads format {SCORES_FORMAT}")
        try:
            probes = {name: ProbeScores(**{**probe, "effects": _table(probe["effects"])}) for name, probe in raw.pop("probes").items()}
            scores, effects = _table(raw.pop("scores")), _table(raw.pop("effects"))
            result = cls(**raw, scores=scores, effects=effects, probes=probes)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ScoresError(f"scores {path}: a key is missing, unknown or of the wrong type ({error})") from None
        result._check_tables(path)
        return result

    def _check_tables(self, path: str | Path) -> None:
        tables = {"scores": self.scores, "effects": self.effects, **{name: probe.effects for name, probe in self.probes.items()}}
        for name, table in tables.items():
            if len(table) != self.num_layers or any(len(row) != self.num_heads for row in table):
                raise ScoresError(f"scores {path}: table {name!r} is not {self.num_layers} layers x {self.num_heads} heads")
            if not all(math.isfinite(value) for row in table for value in row):
                raise ScoresError(f"scores {path}: table {name!r} holds a value that is not a finite number")


def _table(rows: Sequence[Sequence[float]]) -> Table:
    return tuple(tuple(float(value) for value in row) for row in rows)
