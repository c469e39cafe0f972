# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The manifest of prepared data: what it was made from, what it holds, and how training takes all of its shards.

``PREFIX.json`` describes ``PREFIX-00000.bin``, ``PREFIX-00000.idx``, ``PREFIX-00001.bin`` and so on. Until the last of
them is written, ``PREFIX.unfinished.json`` holds the same of those that are complete, and where to go on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron.core.datasets.utils import get_blend_from_list

from hydra_mcore.config import ConfigError
from hydra_mcore.files import from_fields, read_json, shown, write_json
from hydra_mcore.progress import Progress

FORMAT = 1
SUFFIXES = (".bin", ".idx")
_SHARD = re.compile(r"(.+)-\d{5}")


@dataclass(frozen=True)
class ShardFile:
    """One file of a shard."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Shard:
    """One .bin/.idx pair: what is in it, what was skipped while it was filled; until all is finished, the source's
    position after it.
    """

    name: str
    documents: int
    tokens: int
    max_id: int
    skipped: dict[str, int]
    files: dict[str, ShardFile]  # by suffix
    after: Any

    def __post_init__(self) -> None:
        if not _SHARD.fullmatch(self.name) or Path(self.name).name != self.name:
            raise ConfigError(f"{shown(self.name)} is no name of a shard")
        if (
            set(self.files) != set(SUFFIXES)
            or min(self.documents, self.tokens) < 1
            or min(self.max_id, *self.skipped.values(), 0) < 0
        ):
            raise ConfigError("a shard has a document and a token or more, and the files .bin and .idx")


@dataclass(frozen=True)
class Manifest:
    """``run`` holds the JSON facts that decide every byte of the shards: source, tokenizer, limits, versions."""

    run: dict[str, Any]
    shards: list[Shard] = field(default_factory=list)

    @property
    def documents(self) -> int:
        return sum(shard.documents for shard in self.shards)

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)

    @property
    def max_id(self) -> int:
        return max(shard.max_id for shard in self.shards)

    @property
    def skipped(self) -> dict[str, int]:
        """Documents left out, by reason."""
        return dict(sum((Counter(shard.skipped) for shard in self.shards), Counter()))

    def save(self, path: Path) -> None:
        totals = {"documents": self.documents, "tokens": self.tokens, "skipped": self.skipped}
        shards = [dataclasses.asdict(shard) for shard in self.shards]
        raw = {"format": FORMAT, **totals, "run": self.run, "shards": shards}
        write_json(path, raw | {"checksum": _checksum(raw)})

    @classmethod
    def load(cls, path: Path) -> Manifest:
        """Raises ConfigError for a file that is no manifest."""
        raw = read_json(path, ConfigError)
        if not isinstance(raw, dict) or "format" not in raw:
            raise ConfigError(f"{path}: no manifest of tools/prepare_data.py; choose another name, or remove the file")
        if raw["format"] != FORMAT:
            raise ConfigError(
                f"{path}: format {shown(raw['format'])}, this version reads {FORMAT}; prepare the data again"
            )
        file = from_fields(_ManifestFile, raw, str(path), ConfigError)
        raw.pop("checksum", None)
        if file.checksum not in ("", _checksum(raw)):
            raise ConfigError(f"{path}: is not what was written (its checksum differs); prepare the data again")
        return cls(file.run, file.shards)

    def check_run(self, run: dict[str, Any], path: Path, partly: bool = False) -> None:
        """Raise ConfigError when this manifest belongs to other facts, naming the first that differs; ``partly``: where
        ``run`` holds some of them only.
        """
        found = {name: self.run.get(name) for name in run} if partly else self.run
        if difference := _difference(found, json.loads(json.dumps(run))):
            name, found, wanted = difference
            raise ConfigError(
                f"{path}: is of other data: {name} is {shown(found)} there, {shown(wanted)} here; go on as it was"
                " begun, choose another --out, or remove the file"
            )

    def check_files(self, folder: Path, contents: bool = False) -> None:
        """Raise ConfigError for a shard that is missing or of another size or, with ``contents``, of another
        checksum.
        """
        for shard in Progress(self.shards, desc="checksums", unit="shard", disable=not contents):
            for suffix, facts in shard.files.items():
                path = folder / f"{shard.name}{suffix}"
                size = path.stat().st_size if path.is_file() else None
                if size != facts.bytes:
                    found = "is missing" if size is None else f"has {size} bytes"
                    raise ConfigError(f"{path}: {found}, the manifest says {facts.bytes} bytes; prepare the data again")
                if contents and sha256(path) != facts.sha256:
                    raise ConfigError(f"{path}: is not what was written (its sha256 differs); prepare the data again")


@dataclass(frozen=True)
class _ManifestFile:
    """What stands in a manifest's file; the sums follow from the shards."""

    format: int
    documents: int
    tokens: int
    skipped: dict[str, int]
    run: dict[str, Any]
    shards: list[Shard]
    checksum: str = ""  # older ones have none


def _checksum(raw: dict[str, Any]) -> str:
    """The sha256 of everything in a manifest. Without it, a position or sum that a bad disk changed would leave
    documents out silently.
    """
    return hashlib.sha256(json.dumps(raw, sort_keys=True).encode()).hexdigest()


def finished_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.json")


def unfinished_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.unfinished.json")


def held_out_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.held_out.txt")


def noted_revision(prefix: Path, dataset: str) -> str | None:
    """The commit of a dataset at which data under the prefix was begun or finished; None where there is no such
    data.
    """
    for path in (finished_path(prefix), unfinished_path(prefix)):
        if path.exists() and (source := Manifest.load(path).run["source"]).get("dataset") == dataset:
            return source["revision"]
    return None


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def prefix_of_shard(shard_prefix: str) -> str | None:
    """The prefix of the finished data that a shard belongs to, None where there is no manifest."""
    found = _SHARD.fullmatch(shard_prefix)
    return found[1] if found and finished_path(found[1]).is_file() else None


def expand_blend(blend: Sequence[str]) -> list[str]:
    """Megatron's list of data prefixes, [weight,] prefix ..., each prepared prefix in it replaced by its shards.

    A prefix's weight is dealt to its shards by their tokens, so that they stand for their concatenation. Without
    weights, prefixes count by their tokens.

    Raises:
        ConfigError: a prefix that is not prepared to the end, or prepared and other ones together without weights.
    """
    prefixes, weights = get_blend_from_list(list(blend))
    manifests = [_manifest(prefix) for prefix in prefixes]
    if not any(manifests):
        return list(blend)
    if weights is None:
        if None in manifests:
            lacking = prefixes[manifests.index(None)]
            raise ConfigError(
                f"data-path: {lacking} has no manifest that says its tokens; write weights, as in [0.7, A, 0.3, B]"
            )
        weights = [manifest.tokens for manifest in manifests]
    expanded = []
    for weight, prefix, manifest in zip(weights, prefixes, manifests, strict=True):
        if manifest is None:
            expanded += [str(weight), prefix]
            continue
        for shard in manifest.shards:
            expanded += [str(weight * shard.tokens / manifest.tokens), str(Path(prefix).parent / shard.name)]
    return expanded if len(expanded) > 2 else expanded[1:]


def dataset_names(blend: Sequence[str]) -> list[str]:
    """What the prefixes of a ``data-path`` hold: the name of a dataset of the hub, else that of the files."""
    names = []
    for prefix in get_blend_from_list(list(blend))[0] if blend else ():
        manifest = _manifest(prefix)
        source = manifest.run["source"] if manifest else {}
        hub = source.get("dataset") if "files" not in source else None  # a path is of no use to who reads the name
        names.append(hub or Path(prefix).name)
    return list(dict.fromkeys(names))


def _manifest(prefix: str) -> Manifest | None:
    """The manifest of a prefix, None for a plain .bin/.idx pair, or where nothing is prepared."""
    if Path(f"{prefix}.idx").is_file():
        return None
    if finished_path(prefix).is_file():
        return Manifest.load(finished_path(prefix))
    if unfinished_path(prefix).is_file():
        raise ConfigError(
            f"training data {prefix}: is not prepared to the end; give its tools/prepare_data.py command again"
        )
    return None


def _difference(found: Any, wanted: Any, name: str = "") -> tuple[str, Any, Any] | None:
    """The first place where two JSON values differ: its name and both values."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        pairs = [(key, found.get(key), wanted.get(key)) for key in {**found, **wanted}]
    elif isinstance(found, list) and isinstance(wanted, list) and len(found) == len(wanted):
        pairs = [(index, *values) for index, values in enumerate(zip(found, wanted, strict=True))]
    elif isinstance(found, list) and isinstance(wanted, list):
        return f"{name} (number)", len(found), len(wanted)
    else:
        return None if found == wanted else (name, found, wanted)
    return next(
        (more for key, a, b in pairs if (more := _difference(a, b, f"{name}.{key}" if name else str(key)))), None
    )
