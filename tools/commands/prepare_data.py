# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Text to token shards, from the flags of ``tools/prepare_data.py``."""

from __future__ import annotations

import argparse
import dataclasses
import time
from itertools import chain, islice
from pathlib import Path

from hydra_mcore.config import CARD_NAME, ModelCard
from hydra_mcore.corpus.folders import listed
from hydra_mcore.corpus.manifest import Manifest, finished_path, noted_revision
from hydra_mcore.corpus.shards import Limits, begun, prepare, run_facts
from hydra_mcore.corpus.sources import DatasetSource, FileSource, Source, batches
from hydra_mcore.corpus.tokenize import BatchEncoder, Encoder, load_encoder
from hydra_mcore.errors import InputError
from hydra_mcore.files import checked, read_json

SAMPLE_BATCHES = 4  # tokenized for --dry-run


def run(args: argparse.Namespace) -> None:
    """Check everything that is quick to check, then prepare."""
    limits = Limits(args.tokens, args.shard_tokens, args.min_tokens, args.max_tokens, args.held_out)
    if limits.max_tokens is not None and limits.max_tokens < limits.min_tokens:
        raise InputError(
            f"--max-tokens {limits.max_tokens} is below --min-tokens {limits.min_tokens}; no document is both"
        )
    if args.skip_existing and finished_path(args.out).exists():
        print(f"{args.out}.json: is there already, {judged(args, limits).tokens} tokens")
        return
    source = open_source(args)
    if source.left_out:
        print(f"left out of the folders: {listed(source.left_out)}")
    encoder = load_encoder(args.tokenizer, args.eod)
    if args.model:
        check_vocabulary(args.model, encoder)
    if args.dry_run:
        announce(args, source, encoder, limits)
        return
    manifest = prepare(source, encoder, limits, args.out, args.workers, args.skip_broken)
    skipped = "".join(f", {number} left out: {reason}" for reason, number in manifest.skipped.items())
    print(
        f"{args.out}.json: {manifest.tokens} tokens, {manifest.documents} documents, {len(manifest.shards)}"
        f" shard{'' if len(manifest.shards) == 1 else 's'}{skipped}"
    )
    if args.tokens and manifest.tokens < args.tokens:
        print(f"the source ends before --tokens {args.tokens}")


def judged(args: argparse.Namespace, limits: Limits) -> Manifest:
    """Finished data, where it is what was asked for as far as that can be told on a machine without text, tokenizer and
    network.

    Raises:
        InputError: other limits or another dataset of the hub, or files that are missing or of another size.
    """
    path = finished_path(args.out)
    manifest = Manifest.load(path)
    facts, source = {"limits": dataclasses.asdict(limits)}, manifest.run["source"]
    if args.dataset and not {"dataset", "files"} <= source.keys():  # a folder may have another name here
        asked = {"dataset": args.dataset, "config": args.dataset_config, "split": args.split, "text_key": args.text_key}
        asked |= {"revision": args.revision or source.get("revision")}
        facts["source"] = asked
    manifest.check_run(facts, path, partly=True)
    manifest.check_files(args.out.parent)
    return manifest


def open_source(args: argparse.Namespace) -> Source:
    if args.dataset:
        revision = args.revision or noted_revision(args.out, args.dataset)
        return DatasetSource(args.dataset, args.dataset_config, args.split, revision, args.text_key)
    if args.dataset_config or args.revision:
        raise InputError("--dataset-config and --revision belong to --dataset, not to --input")
    return FileSource(args.input, args.text_key)


def check_vocabulary(model: Path, encoder: Encoder) -> None:
    """Raise InputError for a tokenizer that may give ids the model has no embedding for."""
    if (model / CARD_NAME).is_file():
        words = ModelCard.load(model).shape.vocab_size
    else:
        path = model / "config.json" if model.is_dir() else model
        if not path.is_file():
            raise InputError(
                f"--model {model}: no {CARD_NAME} and no config.json with a vocab_size; give a checkpoint or a folder"
            )
        raw = read_json(path, what="--model")
        words = checked(raw.get("vocab_size") if isinstance(raw, dict) else None, int, f"--model {path}: vocab_size")
    if encoder.vocab_size > words:
        raise InputError(
            f"the tokenizer has {encoder.vocab_size} words, model {model} only {words}; take the model's own tokenizer"
        )


def announce(args: argparse.Namespace, source: Source, encoder: Encoder, limits: Limits) -> None:
    """What would be done and, from the first batches, how long it may take."""
    facts = run_facts(source, encoder, limits)
    files, done = facts["source"].get("files", []), begun(args.out, facts).tokens
    megabytes = f", {sum(file['bytes'] for file in files) / 1e6:.1f} MB" if files else ""
    print(f"source: {args.dataset or f'{len(files)} files'}{megabytes}")
    print(f"tokenizer: {encoder.vocab_size} words, end of document {encoder.eod}, stored as {facts['dtype']}")
    if finished_path(args.out).exists():
        print(f"{finished_path(args.out)} is there: nothing would be prepared, only checked")
    encode = BatchEncoder(encoder)
    texts = [[document.text for document in batch.documents] for batch in islice(batches(source, None), SAMPLE_BATCHES)]
    start = time.perf_counter()
    tokens = sum(len(encode(some)[0]) for some in texts)
    speed = tokens / (time.perf_counter() - start)
    characters = sum(map(len, chain.from_iterable(texts)))
    print(f"speed: {speed:.0f} tokens/s a worker on the first {characters / 1e6:.1f}M characters")
    if args.tokens:
        hours = (args.tokens - done) / speed / args.workers / 3600
        print(
            f"{args.tokens:.3g} tokens, {done} of them done: {hours:.2f} hours with {args.workers} workers, if reading"
            " keeps up"
        )
