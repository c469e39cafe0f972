# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Which head does what, and which tensor-parallel rank owns it. Pure values: no torch, no communication.

Shape suffixes used in the whole package (``q_sbhd`` is a query of shape [s, b, h, d]):

    s  sequence          h  query heads (HF order, or a rank's own order: kind by kind)
    b  batch             g  key/value groups of grouped-query attention
    m  model width       d  key dimension of a head       v  value dimension of a head
    w  vocabulary        n  packed documents

``layer_idx`` and ``head_idx`` count from 0 over the whole model, heads in Hugging Face query-head order.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from hydra_mcore.errors import InputError
from hydra_mcore.files import checked, from_fields, is_name, read_json, shown, write_json
from hydra_mcore.kinds import DEFAULT_LINEAR, FA, KINDS
from hydra_mcore.kinds.kind import HeadCount

HEAD_MAP_FORMAT = 3  # docs/head_map.schema.json
READ_FORMATS = (2, HEAD_MAP_FORMAT)  # in format 2 every layer lists fa and gdn, be it empty, and nothing else

Head = tuple[int, int]  # (layer_idx, head_idx)


def every_head(num_layers: int, num_heads: int) -> list[Head]:
    """All heads of a model, layer by layer."""
    return list(itertools.product(range(num_layers), range(num_heads)))


class HeadMapError(InputError):
    """A head map that cannot be used."""


class HeadsByKind(Mapping[str, tuple[int, ...]]):
    """The heads of each kind, of a layer or of a rank: kinds in the order of the table (``KINDS``), heads ascending.

    Kinds without heads are left out; asked for one, it gives no heads.
    """

    def __init__(self, /, **heads: Iterable[int]) -> None:
        """By keyword: ``HeadsByKind(fa=(0, 3), gdn=(1, 2))``; raises HeadMapError for a kind that does not exist."""
        if strange := heads.keys() - KINDS.keys():
            raise HeadMapError(f"no kind of heads is called {shown(min(strange))}; the kinds are {', '.join(KINDS)}")
        given = {kind: tuple(heads[kind]) for kind in KINDS if kind in heads}
        self._heads = {kind: owned for kind, owned in given.items() if owned}

    @classmethod
    def from_fa(cls, fa: Iterable[int], num_heads: int, others: str = DEFAULT_LINEAR) -> HeadsByKind:
        """A layer that keeps ``fa`` as full attention and makes all its other heads of one kind."""
        kept = set(fa)
        return cls(**{FA: sorted(kept), others: [head_idx for head_idx in range(num_heads) if head_idx not in kept]})

    def __getitem__(self, kind: str) -> tuple[int, ...]:
        return self._heads.get(kind, ())

    def __contains__(self, kind: object) -> bool:
        return kind in self._heads

    def __iter__(self) -> Iterator[str]:
        return iter(self._heads)

    def __len__(self) -> int:
        return len(self._heads)

    def __hash__(self) -> int:
        return hash(tuple(self._heads.items()))

    def __repr__(self) -> str:
        return f"HeadsByKind({', '.join(f'{kind}={heads}' for kind, heads in self._heads.items())})"

    @property
    def heads(self) -> tuple[int, ...]:
        """All heads, kind by kind: the order in which a rank has them."""
        return tuple(itertools.chain(*self._heads.values()))

    def check(self, layer_idx: int, num_heads: int) -> None:
        """Raise HeadMapError unless these are all heads of a layer, each exactly once."""
        seen: set[int] = set()
        for head_idx in self.heads:
            if not 0 <= head_idx < num_heads:
                raise HeadMapError(f"head map: layer {layer_idx} lists head {head_idx}; heads are 0 to {num_heads - 1}")
            if head_idx in seen:
                raise HeadMapError(f"head map: layer {layer_idx} lists head {head_idx} twice; give it one kind")
            seen.add(head_idx)
        if len(seen) < num_heads:  # who says 1e15 heads must not be given memory for them
            missing = next(head_idx for head_idx in range(num_heads) if head_idx not in seen)
            kinds = ", ".join(KINDS)
            raise HeadMapError(f"head map: layer {layer_idx} lacks head {missing}; give it a kind (of {kinds})")


def first_difference(theirs: HeadsByKind, ours: HeadsByKind) -> tuple[str, str, str]:
    """The first kind of which two layers have different heads, and these, as errors show them: ("FA", "0, 3",
    "none").
    """
    kind = next(kind for kind in KINDS if theirs[kind] != ours[kind])
    return KINDS[kind].label, *(", ".join(map(str, heads[kind])) or "none" for heads in (theirs, ours))


@dataclass(frozen=True)
class HeadMap:
    """The kind of every head of a model, and how the choice was made.

    ``model`` and ``fingerprint`` are the configuration and the weights of the teacher that the map was made for (see
    ``ModelCard``); empty means any model with these counts of heads. ``made_by`` is free provenance: probes, seeds,
    versions.
    """

    num_heads: int
    num_kv_groups: int
    layers: tuple[HeadsByKind, ...]
    fingerprint: str = ""
    model: dict[str, Any] = field(default_factory=dict, compare=False)
    strategy: str = "fixed"
    made_by: dict[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        if self.num_heads < 1 or self.num_kv_groups < 1 or self.num_heads % self.num_kv_groups:
            raise HeadMapError(f"head map: {self.num_heads} heads do not divide into {self.num_kv_groups} kv groups")
        if not self.layers:
            raise HeadMapError("head map: no layers")
        if not (is_name(self.fingerprint) and is_name(self.strategy)):
            raise HeadMapError("head map: fingerprint and strategy are one short line each")
        for layer_idx, layer in enumerate(self.layers):
            layer.check(layer_idx, self.num_heads)

    @classmethod
    def from_fa(
        cls,
        fa_heads: Iterable[Head],
        num_layers: int,
        num_heads: int,
        num_kv_groups: int,
        others: str | Sequence[str] = DEFAULT_LINEAR,
        **facts: Any,
    ) -> HeadMap:
        """A map from the heads that keep full attention.

        Args:
            others: the kind of all other heads, or one for each layer.

        Raises:
            HeadMapError: heads or kinds that do not exist, FA among the kinds, or not one for each layer.
        """
        pairs = set(fa_heads)
        kinds = [others] * num_layers if isinstance(others, str) else list(others)
        if len(kinds) != num_layers or FA in kinds:
            raise HeadMapError(
                f"head map: {len(kinds)} kinds ({', '.join(sorted(set(kinds)))}) for the other heads of"
                f" {num_layers} layers; give one a layer, none of them {FA}"
            )
        for layer_idx, head_idx in pairs:
            if not (0 <= layer_idx < num_layers and 0 <= head_idx < num_heads):
                raise HeadMapError(
                    f"head map: no head {head_idx} in layer {layer_idx} of a {num_layers} x {num_heads} model"
                )
        layers = tuple(
            HeadsByKind.from_fa((h for layer, h in pairs if layer == layer_idx), num_heads, kind)
            for layer_idx, kind in enumerate(kinds)
        )
        return cls(num_heads=num_heads, num_kv_groups=num_kv_groups, layers=layers, **facts)

    @classmethod
    def all_fa(cls, num_layers: int, num_heads: int, num_kv_groups: int) -> HeadMap:
        """The teacher's map: every head is full attention."""
        layers = (HeadsByKind.from_fa(range(num_heads), num_heads),) * num_layers
        return cls(num_heads=num_heads, num_kv_groups=num_kv_groups, layers=layers, strategy="teacher")

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def counts(self) -> dict[str, int]:
        """What a model must have for the map to fit at all."""
        return {"num_layers": self.num_layers, "num_heads": self.num_heads, "num_kv_groups": self.num_kv_groups}

    @property
    def num_fa(self) -> int:
        """How many heads of the whole model keep full attention (the budget)."""
        return len(self.heads_of(FA))

    def heads_of(self, kind: str) -> list[Head]:
        """All heads of a kind, layer by layer."""
        heads: list[Head] = []
        for layer_idx, layer in enumerate(self.layers):
            heads += [(layer_idx, head_idx) for head_idx in layer[kind]]
        return heads

    def to_dict(self) -> dict[str, Any]:
        return {
            "format": HEAD_MAP_FORMAT,
            "model": self.model | self.counts,
            "fingerprint": self.fingerprint,
            "strategy": self.strategy,
            "budget": self.num_fa,
            "layers": [{kind: list(heads) for kind, heads in layer.items()} for layer in self.layers],
            "made_by": self.made_by,
        }

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> HeadMap:
        """Read the JSON form; raises HeadMapError naming what is wrong."""
        if not isinstance(raw, dict) or raw.get("format") not in READ_FORMATS:
            found = raw.get("format") if isinstance(raw, dict) else type(raw).__name__
            formats = " and ".join(map(str, READ_FORMATS))
            raise HeadMapError(f"head map: format {shown(found)}, this version reads formats {formats}")
        file = from_fields(_MapFile, raw, "head map", HeadMapError)
        counts = {}
        for name in ("num_layers", "num_heads", "num_kv_groups"):
            if name not in file.model:
                raise HeadMapError(f"head map: key {name!r} is missing")
            counts[name] = checked(file.model[name], int, f"head map: {name}", HeadMapError)
        num_layers = counts.pop("num_layers")
        facts = {
            "fingerprint": file.fingerprint,
            "model": file.model,
            "strategy": file.strategy,
            "made_by": file.made_by,
        }
        head_map = cls(**counts, layers=tuple(_layer(idx, heads) for idx, heads in enumerate(file.layers)), **facts)
        if num_layers != head_map.num_layers:
            raise HeadMapError(f"head map: lists {head_map.num_layers} layers but says num_layers {num_layers}")
        if file.budget != head_map.num_fa:
            raise HeadMapError(f"head map: lists {head_map.num_fa} FA heads but says budget {file.budget}")
        return head_map

    def save(self, path: str | Path) -> None:
        """Write JSON beside the target, then rename (a reader never sees half a file)."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> HeadMap:
        """Read a head map file; raises HeadMapError for a missing, broken or invalid one."""
        return cls.from_dict(read_json(path, HeadMapError, "head map"))


@dataclass(frozen=True)
class _MapFile:
    """What stands in a head map's file (docs/head_map.schema.json)."""

    format: int
    model: dict[str, Any]
    fingerprint: str
    strategy: str
    budget: int
    layers: list[dict[str, list[int]]]
    made_by: dict[str, Any] = field(default_factory=dict)


def _layer(layer_idx: int, heads: dict[str, list[int]]) -> HeadsByKind:
    try:
        return HeadsByKind(**heads)
    except HeadMapError as error:
        raise HeadMapError(f"head map: layer {layer_idx}: {error}") from None


@dataclass(frozen=True)
class HeadLayout:
    """One layer's heads dealt to ``tp_size`` ranks, in one of two ways (``fa_balance``).

    "heads": H/tp whole heads each, FA counts that differ by at most one. Simple, and every projection is balanced; but
    with two FA heads on eight ranks, two ranks do all of the attention.
    "queries": every rank gets the same number of whole FA heads; those left over (``shared``) are computed by all
    ranks, each for its own part of the queries. All ranks do the same attention work, for any map (nearly the same
    where documents are packed).

    Ranks that get one head more rotate with ``layer_idx``, so the surplus evens out over the layers.
    FA heads of one kv group stay on one rank where the balance allows it (the deal is greedy: of groups of four or
    more heads, a few are split that an exhaustive search would keep whole); a group that is split is held by every
    rank (``split_groups``), and its gradient is summed over them.
    """

    layer: HeadsByKind
    num_kv_groups: int
    tp_size: int = 1
    layer_idx: int = 0
    fa_balance: Literal["heads", "queries"] = "heads"

    def __post_init__(self) -> None:
        if self.tp_size < 1 or self.num_heads % self.tp_size:
            raise HeadMapError(
                f"tensor parallel size {self.tp_size} does not divide {self.num_heads} query heads; choose one that"
                " does"
            )

    @cached_property
    def num_heads(self) -> int:
        return len(self.layer.heads)

    def group_of(self, head_idx: int) -> int:
        """The kv group a query head reads (HALO Eq 13: floor(head / heads per group))."""
        return head_idx * self.num_kv_groups // self.num_heads

    def groups_of(self, heads: Iterable[int]) -> list[int]:
        """The kv groups that some heads read, each once, ascending."""
        return sorted({self.group_of(head_idx) for head_idx in heads})

    @cached_property
    def ranks(self) -> tuple[HeadsByKind, ...]:
        """The whole heads of each rank, index = tensor-parallel rank; its columns of the output projection stand in
        their order, kind by kind, so fusion needs no permutation.
        """
        room = [self.num_heads // self.tp_size - len(fa) for fa in self._dealt_fa]
        if self.fa_balance == "queries":
            room = self._even_deal(self.num_heads - len(self.layer[FA]))
        dealt = {FA: self._dealt_fa} | {kind: _dealt(self.layer[kind], room) for kind in self.layer if kind != FA}
        return tuple(
            HeadsByKind(**{kind: owned[rank] for kind, owned in dealt.items()}) for rank in range(self.tp_size)
        )

    @cached_property
    def shared(self) -> HeadsByKind:
        """The heads that every rank computes, each for its own part of the queries; FA heads only."""
        whole = set(itertools.chain(*self._dealt_fa))
        return HeadsByKind(**{FA: [head_idx for head_idx in self.layer[FA] if head_idx not in whole]})

    def count(self, kind: str, tp_rank: int) -> HeadCount:
        """How many heads of a kind a rank has."""
        own, shared = self.ranks[tp_rank][kind], self.shared[kind]
        return HeadCount(len(own), len(shared), len(self.groups_of(own + shared)), tp_rank, self.tp_size)

    def _even_deal(self, count: int) -> list[int]:
        base, surplus = divmod(count, self.tp_size)
        return [base + ((rank - self.layer_idx) % self.tp_size < surplus) for rank in range(self.tp_size)]

    @cached_property
    def _dealt_fa(self) -> list[tuple[int, ...]]:
        """Whole kv groups first, largest first, into the rank with most room; what fits nowhere is split."""
        room = self._even_deal(len(self.layer[FA]))
        if self.fa_balance == "queries":
            room = [len(self.layer[FA]) // self.tp_size] * self.tp_size
        members: dict[int, list[int]] = {}
        for head_idx in self.layer[FA]:
            members.setdefault(self.group_of(head_idx), []).append(head_idx)
        dealt: list[list[int]] = [[] for _ in range(self.tp_size)]
        for group in sorted(members, key=lambda g: (-len(members[g]), g)):
            heads = members[group]
            fits = [rank for rank in range(self.tp_size) if room[rank] >= len(heads)]
            while heads and any(room):
                rank = min(fits, key=lambda r: room[r]) if fits else max(range(self.tp_size), key=lambda r: room[r])
                taken, heads = heads[: room[rank]], heads[room[rank] :]
                dealt[rank] += taken
                room[rank] -= len(taken)
        return [tuple(sorted(heads)) for heads in dealt]

    def split_groups(self, kind: str | None = None) -> tuple[int, ...]:
        """Kv groups whose heads (of one kind, or of any) stand on more than one rank."""
        shared = self.shared.heads if kind is None else self.shared[kind]
        holders = {self.group_of(head_idx): set(range(self.tp_size)) for head_idx in shared}
        for rank, owned in enumerate(self.ranks):
            for head_idx in owned.heads if kind is None else owned[kind]:
                holders.setdefault(self.group_of(head_idx), set()).add(rank)
        return tuple(sorted(group for group, ranks in holders.items() if len(ranks) > 1))


def _dealt(heads: tuple[int, ...], room: list[int]) -> list[tuple[int, ...]]:
    """Heads in ascending order to ranks, each head's place going to the rank with most room; takes up that room."""
    counts = [0] * len(room)
    for _ in heads:
        rank = max(range(len(room)), key=room.__getitem__)
        counts[rank] += 1
        room[rank] -= 1
    rest = iter(heads)
    return [tuple(itertools.islice(rest, count)) for count in counts]
