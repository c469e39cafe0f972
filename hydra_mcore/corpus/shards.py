# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Shards of Megatron's IndexedDataset, written so that a kill at any moment loses only the shard in the making.

A shard is written beside its name and renamed when it is whole; then the manifest lists it, with the position of the
source after it. What was killed goes on from the last listed shard, and since everything is decided by the documents,
the same bytes come out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import math
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from hydra_mcore.commands import sole_writer
from hydra_mcore.corpus.manifest import (
    SUFFIXES,
    Manifest,
    Shard,
    ShardFile,
    finished_path,
    held_out_path,
    sha256,
    unfinished_path,
)
from hydra_mcore.corpus.sources import Batch, Document, Source, batches
from hydra_mcore.corpus.tokenize import Encoder, encode_batches, fingerprint
from hydra_mcore.errors import InputError
from hydra_mcore.files import write_text
from hydra_mcore.progress import Progress

DECISIVE = ("tokenizers", "transformers", "datasets", "pyarrow")  # packages that stand between a text and its tokens


@dataclass(frozen=True)
class Limits:
    """In tokens, ends of documents counted: when to stop, when to begin a new shard, which documents to keep.

    The first ``held_out`` documents are not trained on: they become plain text beside the shards.
    """

    tokens: int | None = None
    shard_tokens: int = 500_000_000
    min_tokens: int = 1
    max_tokens: int | None = None
    held_out: int = 0


def run_facts(source: Source, encoder: Encoder, limits: Limits) -> dict[str, Any]:
    """All that decides the shards; see ``Manifest``."""
    tokenizer = {"fingerprint": fingerprint(encoder.serialised), "vocab_size": encoder.vocab_size, "eod": encoder.eod}
    return {
        "source": source.facts(),
        "tokenizer": tokenizer,
        "dtype": np.dtype(encoder.dtype).name,
        "limits": dataclasses.asdict(limits),
        "versions": {name: version(name) for name in DECISIVE},
    }


def prepare(
    source: Source, encoder: Encoder, limits: Limits, out: Path, workers: int, skip_broken: bool = False
) -> Manifest:
    """Write all shards and the manifest, going on where an earlier call with the same facts was stopped.

    Args:
        out: the PREFIX of what is written.
        workers: processes that tokenize; the result does not depend on it.
        skip_broken: leave out and count documents that have a fault or are empty, instead of refusing them.

    Raises:
        InputError: other data under this prefix, another process that writes it, a broken document, no document at all,
            a disk that is full.
    """
    run = run_facts(source, encoder, limits)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with sole_writer(out):
            if finished_path(out).exists():
                manifest = _checked(out, run)
            else:
                manifest = begun(out, run)
                try:
                    _go_on(manifest, source, encoder, out, workers, skip_broken)
                finally:  # of a shard that is not finished, for whatever reason
                    for path in out.parent.glob(f"{glob.escape(out.name)}-?????.*.partial"):
                        path.unlink()
                manifest.save(finished_path(out))
            unfinished_path(out).unlink(missing_ok=True)
            return manifest
    except OSError as error:
        raise InputError(
            f"{error.filename or out}: {error.strerror}; fix that and give the same command again, it goes on"
        ) from None


def begun(out: Path, run: dict[str, Any]) -> Manifest:
    """What is complete of the shards of a run; raises ConfigError when other data was begun under the prefix."""
    path = unfinished_path(out)
    if not path.exists():
        return Manifest(run)
    manifest = Manifest.load(path)
    manifest.check_run(run, path)
    manifest.check_files(out.parent)
    return manifest


def _checked(out: Path, run: dict[str, Any]) -> Manifest:
    """Finished data, when it is of this run and still what was written."""
    manifest = Manifest.load(finished_path(out))
    manifest.check_run(run, finished_path(out))
    manifest.check_files(out.parent, contents=True)
    return manifest


def _go_on(manifest: Manifest, source: Source, encoder: Encoder, out: Path, workers: int, skip_broken: bool) -> None:
    """Add what is missing to the shards of an unfinished manifest."""
    limits = Limits(**manifest.run["limits"])
    after = manifest.shards[-1].after if manifest.shards else _hold_out(source, limits.held_out, out, skip_broken)
    with (
        Progress(total=limits.tokens, initial=manifest.tokens, unit="tok", unit_scale=True, desc="prepare") as bar,
        contextlib.closing(encode_batches(batches(source, after), encoder, workers)) as work,
    ):
        _write(manifest, _Keeper(limits, skip_broken), work, out, encoder.dtype, bar)
    _join_short_tail(manifest, out, encoder.dtype)
    # how a source writes a position may depend on where it was begun, so finished data has none
    manifest.shards[:] = [dataclasses.replace(shard, after=None) for shard in manifest.shards]


def _hold_out(source: Source, count: int, out: Path, skip_broken: bool) -> Any:
    """Write the first ``count`` documents as text to ``held_out_path``; returns the position after them."""
    texts: list[str] = []
    after = None
    if count:
        for document, position in source.documents(None):
            after = position
            if _readable(document, skip_broken):
                texts.append(document.text)
            if len(texts) == count:
                break
        write_text(held_out_path(out), "\n\n".join(texts))
    return after


def _readable(document: Document, skip_broken: bool) -> bool:
    """Whether a document is whole; raises InputError for a broken one that is not to be skipped."""
    if document.fault and not skip_broken:
        raise InputError(f"{document.where}: {document.fault}; fix it, or leave such documents out with --skip-broken")
    return not document.fault


def _write(
    manifest: Manifest,
    keeper: _Keeper,
    work: Iterator[tuple[Batch, list[np.ndarray]]],
    out: Path,
    dtype: type[np.number],
    bar: Progress,
) -> None:
    """Fill shards until the documents or the budget end; a shard ends with a batch, so that the source has a position
    there.
    """
    limits, writer = keeper.limits, None
    for batch, rows in work:
        for ids in keeper.kept(batch, rows):
            writer = writer or ShardWriter(out, len(manifest.shards), dtype)
            writer.add(ids)
            bar.update(len(ids))
            if manifest.tokens + writer.tokens >= (limits.tokens or math.inf):
                manifest.shards.append(writer.close(keeper.counted(), None))
                return
        if writer and writer.tokens >= limits.shard_tokens:
            manifest.shards.append(writer.close(keeper.counted(), batch.after))
            manifest.save(unfinished_path(out))
            writer = None
    skipped = keeper.counted()
    if writer:
        manifest.shards.append(writer.close(skipped, None))
    elif not manifest.shards:
        held_out = f"the first {keeper.limits.held_out} are held out (--held-out)" if keeper.limits.held_out else ""
        reason = f"skipped: {skipped}" if skipped else held_out or "the source is empty"
        raise InputError(f"no document is left for {out}: {reason}")
    elif skipped:
        last = manifest.shards[-1]
        manifest.shards[-1] = dataclasses.replace(last, skipped=dict(Counter(last.skipped) + Counter(skipped)))


def _join_short_tail(manifest: Manifest, out: Path, dtype: type[np.number]) -> None:
    """Put a last shard of less than half the size behind the one before it: shards that hold a few documents cannot be
    split.
    """
    if len(manifest.shards) < 2 or manifest.shards[-1].tokens >= manifest.run["limits"]["shard_tokens"] / 2:
        return
    *kept, last, tail = manifest.shards
    manifest.shards[:] = kept
    manifest.save(unfinished_path(out))  # killed from here on, both are written again
    writer = ShardWriter(out, len(kept), dtype)
    writer.append(out.parent, last)
    writer.append(out.parent, tail)
    manifest.shards.append(writer.close(dict(Counter(last.skipped) + Counter(tail.skipped)), None))
    for suffix in SUFFIXES:
        (out.parent / f"{tail.name}{suffix}").unlink()


class _Keeper:
    """Decides which documents are kept, and counts the others by reason."""

    def __init__(self, limits: Limits, skip_broken: bool) -> None:
        self.limits, self.skip_broken = limits, skip_broken
        self.skipped: Counter[str] = Counter()

    def kept(self, batch: Batch, rows: list[np.ndarray]) -> Iterator[np.ndarray]:
        """The ids of the documents to keep; raises InputError for a broken one that is not to be skipped."""
        for document, ids in zip(batch.documents, rows, strict=True):
            reason = document.fault
            if _readable(document, self.skip_broken):
                if len(ids) < self.limits.min_tokens:
                    reason = "too short"
                elif len(ids) > (self.limits.max_tokens or math.inf):
                    reason = "too long"
            if reason:
                self.skipped[reason] += 1
            else:
                yield ids

    def counted(self) -> dict[str, int]:
        """What was skipped since the last call."""
        counts, self.skipped = dict(self.skipped), Counter()
        return counts


class ShardWriter:
    """Writes shard ``number`` of a prefix beside its name; ``close`` makes it appear, whole."""

    def __init__(self, out: Path, number: int, dtype: type[np.number]) -> None:
        self.path = out.with_name(f"{out.name}-{number:05d}")
        self.builder = IndexedDatasetBuilder(self._beside(".bin"), dtype=dtype)
        self.documents = self.tokens = self.max_id = 0

    def _beside(self, suffix: str) -> str:
        return f"{self.path}{suffix}.partial"

    def add(self, ids: np.ndarray) -> None:
        """Append one document, ids [n]."""
        self.builder.add_document(ids, [len(ids)])
        self._count(1, len(ids), int(ids.max()))

    def append(self, folder: Path, shard: Shard) -> None:
        """Append all documents of a shard."""
        self.builder.add_index(str(folder / shard.name))
        self._count(shard.documents, shard.tokens, shard.max_id)

    def _count(self, documents: int, tokens: int, max_id: int) -> None:
        self.documents, self.tokens, self.max_id = (
            self.documents + documents,
            self.tokens + tokens,
            max(self.max_id, max_id),
        )

    def close(self, skipped: dict[str, int], after: Any) -> Shard:
        self.builder.finalize(self._beside(".idx"))
        files = {}
        for suffix in SUFFIXES:
            beside = Path(self._beside(suffix))
            with beside.open("rb") as file:
                os.fsync(file.fileno())  # the manifest must not outlive in a power cut what it describes
            files[suffix] = ShardFile(beside.stat().st_size, sha256(beside))
            beside.replace(f"{self.path}{suffix}")
        return Shard(self.path.name, self.documents, self.tokens, self.max_id, skipped, files, after)
