#!/usr/bin/env python3
# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Turn text into the token shards that training reads (Megatron's IndexedDataset)."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hydra_mcore.corpus.shards import Limits
    from hydra_mcore.corpus.sources import Source
    from hydra_mcore.corpus.tokenize import Encoder

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hydra_mcore.commands import one_line_errors
from hydra_mcore.recipe import parse_with_recipe  # light, so that --help is quick

EXAMPLES = """\
How it works: documents are read one after the other, tokenized by --workers processes, ended with the end-of-document
token and written in the order they were read: PREFIX-00000.bin and .idx, PREFIX-00001.bin ..., and last PREFIX.json,
which says what they hold and were made from. Training takes them all as data-path: PREFIX.

Stopped or killed, the same command goes on after the last complete shard, with as many workers as you like, and writes
the same bytes. Given again when all is done, it checks the checksums.

examples:
  15 billion tokens of FineWeb-Edu, streamed (needs a network; nothing but the shards is kept)
      python tools/prepare_data.py --dataset HuggingFaceFW/fineweb-edu --dataset-config sample-100BT --tokens 15e9 \\
          --tokenizer runs/a/teacher --model runs/a/teacher --out data/fineweb
  long documents for stage extend
      python tools/prepare_data.py --dataset HuggingFaceFW/fineweb-edu --dataset-config sample-100BT \\
          --min-tokens 16384 --tokens 10e9 --tokenizer runs/a/teacher --out data/fineweb-long
  files of your own
      python tools/prepare_data.py --input books/ 'web/*.jsonl.gz' --tokenizer Qwen/Qwen3-1.7B --out data/mine
  how long would that take?
      python tools/prepare_data.py --input books/ --tokenizer Qwen/Qwen3-1.7B --out data/mine --dry-run
  everything from the section "prepare" of a recipe
      python tools/prepare_data.py --config examples/qwen3-1.7b/recipe.yaml
"""
SAMPLE_BATCHES = 4  # tokenized for --dry-run


def parser() -> argparse.ArgumentParser:
    layout = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(prog="prepare_data", description=__doc__, epilog=EXAMPLES, formatter_class=layout)
    recipe = "recipe: YAML files whose section prepare holds these flags"
    p.add_argument("--config", nargs="+", metavar="FILE", help=recipe)
    add_source(p)
    add_result(p)
    p.add_argument(
        "--skip-broken",
        action="store_true",
        help="leave out, and count, what is empty, not UTF-8, not JSON or without text",
    )
    cores, each = len(os.sched_getaffinity(0)), "processes (default: one a core)"
    p.add_argument("--workers", type=count, default=cores, metavar="N", help=each)
    dry_run = "tokenize the first megabyte, say what would be done and how fast, and stop"
    p.add_argument("--dry-run", action="store_true", help=dry_run)
    return p


def add_source(p: argparse.ArgumentParser) -> None:
    source = p.add_mutually_exclusive_group(required=True)
    kinds = (
        "files, globs, folders: .txt (one document each), .jsonl (also .gz, .zst, .bz2), .parquet (one document a line"
        " or row)"
    )
    source.add_argument("--input", nargs="+", metavar="PATH", help=kinds)
    hub = "a dataset of the Hugging Face hub, or a folder of one, streamed by datasets"
    source.add_argument("--dataset", metavar="NAME", help=hub)
    p.add_argument("--dataset-config", metavar="NAME", help="configuration of the dataset, such as sample-100BT")
    p.add_argument("--split", default="train", metavar="NAME", help="split of the dataset (default train)")
    commit = "commit of the dataset on the hub (default: the one that --out notes, else the newest)"
    p.add_argument("--revision", metavar="COMMIT", help=commit)
    key = "where a JSON object or a row has its text (default text)"
    p.add_argument("--text-key", default="text", metavar="KEY", help=key)


def add_result(p: argparse.ArgumentParser) -> None:
    beginning = "beginning of the names of all files that are written"
    p.add_argument("--out", type=Path, required=True, metavar="PREFIX", help=beginning)
    whose = "Hugging Face tokenizer: a folder, a checkpoint from tools/convert.py, or a name on the hub"
    p.add_argument("--tokenizer", required=True, metavar="DIR", help=whose)
    end = "token that ends documents (default: the tokenizer's end-of-sequence token)"
    p.add_argument("--eod", metavar="TOKEN", help=end)
    fits = (
        "checkpoint, Hugging Face folder or config.json whose vocabulary must hold the tokenizer's; training checks"
        " it, too"
    )
    p.add_argument("--model", type=Path, metavar="PATH", help=fits)
    most = "stop with the document that reaches so many, as in 15e9 (default: all)"
    p.add_argument("--tokens", type=count, metavar="N", help=most)
    per_shard = "begin a new shard after about so many: what a kill can cost (default 500e6)"
    p.add_argument("--shard-tokens", type=count, default=500_000_000, metavar="N", help=per_shard)
    shorter = "leave shorter documents out (end of document counted)"
    p.add_argument("--min-tokens", type=count, default=1, metavar="N", help=shorter)
    p.add_argument("--max-tokens", type=count, metavar="N", help="leave longer documents out")
    held_out = (
        "keep the first N documents out of training, as text in PREFIX.held_out.txt, for calibration and evaluation"
    )
    p.add_argument("--held-out", type=count, default=0, metavar="N", help=held_out)


def count(text: str) -> int:
    """A number of tokens or processes: 15000, 15e3."""
    value = float(text)
    if not (1 <= value < float("inf")) or value != int(value):
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return int(value)


@one_line_errors("prepare_data")
def main(argv: list[str] | None = None) -> None:
    args = parse_with_recipe(parser(), "prepare", argv)
    from hydra_mcore.compat import install

    install()
    logging.getLogger("megatron").setLevel(logging.ERROR)  # its notes are about training
    warnings.filterwarnings("ignore", message="Could not determine rank")
    run(args)


def run(args: argparse.Namespace) -> None:
    """Check everything that is quick to check, then prepare."""
    from hydra_mcore.corpus.folders import listed
    from hydra_mcore.corpus.shards import Limits, prepare
    from hydra_mcore.corpus.tokenize import load_encoder
    from hydra_mcore.errors import InputError

    limits = Limits(args.tokens, args.shard_tokens, args.min_tokens, args.max_tokens, args.held_out)
    if limits.max_tokens is not None and limits.max_tokens < limits.min_tokens:
        raise InputError(
            f"--max-tokens {limits.max_tokens} is below --min-tokens {limits.min_tokens}; no document is both"
        )
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
        f" shards{skipped}"
    )
    if args.tokens and manifest.tokens < args.tokens:
        print(f"the source ends before --tokens {args.tokens}")


def open_source(args: argparse.Namespace) -> Source:
    from hydra_mcore.corpus.manifest import noted_revision
    from hydra_mcore.corpus.sources import DatasetSource, FileSource
    from hydra_mcore.errors import InputError

    if args.dataset:
        revision = args.revision or noted_revision(args.out, args.dataset)
        return DatasetSource(args.dataset, args.dataset_config, args.split, revision, args.text_key)
    if args.dataset_config or args.revision:
        raise InputError("--dataset-config and --revision belong to --dataset, not to --input")
    return FileSource(args.input, args.text_key)


def check_vocabulary(model: Path, encoder: Encoder) -> None:
    """Raise InputError for a tokenizer that may give ids the model has no embedding for."""
    from hydra_mcore.config import CARD_NAME, ModelCard
    from hydra_mcore.errors import InputError
    from hydra_mcore.files import checked, read_json

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
    from itertools import islice

    from hydra_mcore.corpus.manifest import finished_path
    from hydra_mcore.corpus.shards import begun, run_facts
    from hydra_mcore.corpus.sources import batches
    from hydra_mcore.corpus.tokenize import BatchEncoder

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
    print(
        f"speed: {speed:.0f} tokens/s a worker on the first"
        f" {sum(len(text) for some in texts for text in some) / 1e6:.1f}M characters"
    )
    if args.tokens:
        hours = (args.tokens - done) / speed / args.workers / 3600
        print(
            f"{args.tokens:.3g} tokens, {done} of them done: {hours:.2f} hours with {args.workers} workers, if reading"
            " keeps up"
        )


if __name__ == "__main__":
    main()
