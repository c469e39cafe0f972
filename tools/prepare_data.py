#!/usr/bin/env python3
# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Turn text into the token shards that training reads (Megatron's IndexedDataset)."""

from __future__ import annotations

import argparse
import glob
import logging
import os
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hydra_mcore.commands import check_inputs, one_line_errors
from hydra_mcore.corpus.hub import check_name
from hydra_mcore.recipe import parse_with_recipe  # light, so that --help is quick

EXAMPLES = """\
How it works: the command reads one document after the other. --workers processes tokenize them and add the
end-of-document token. It writes them in the order in which they were read, to PREFIX-00000.bin and .idx,
PREFIX-00001.bin and so on. PREFIX.json comes last. It says what they hold and what they were made from. Training takes
all of them as data-path: PREFIX.

After a stop or a kill, the same command continues behind the last complete shard. It may have another number of
workers, and writes the same bytes. If all is done, the same command compares the checksums. With --skip-existing it
looks only at the sizes of the files, and needs neither network nor text. So it takes data that were made elsewhere.

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
  the flags from a recipe's section prepare, as jobs give them
      python tools/prepare_data.py --config examples/qwen3-1.7b/recipe.yaml --skip-existing
"""


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
        help="leave out documents that are empty, not UTF-8, not JSON or without text, and count them",
    )
    cores, each = len(os.sched_getaffinity(0)), "processes that tokenize (default: one a core)"
    p.add_argument("--workers", type=count, default=cores, metavar="N", help=each)
    there = "do nothing if --out is finished; then no text is read, no tokenizer is loaded and no hub is asked"
    p.add_argument("--skip-existing", action="store_true", help=there)
    dry_run = "tokenize the first megabyte, say what would be done and how fast, and stop"
    p.add_argument("--dry-run", action="store_true", help=dry_run)
    return p


def add_source(p: argparse.ArgumentParser) -> None:
    source = p.add_mutually_exclusive_group(required=True)
    kinds = (
        "files, globs or folders. A .txt file is one document; .jsonl (also .gz, .zst, .bz2) has one a line, .parquet"
        " one a row"
    )
    source.add_argument("--input", nargs="+", metavar="PATH", help=kinds)
    hub = "dataset on the Hugging Face hub, or a folder that holds one; it is streamed"
    source.add_argument("--dataset", metavar="NAME", help=hub)
    p.add_argument("--dataset-config", metavar="NAME", help="configuration of the dataset, such as sample-100BT")
    p.add_argument("--split", default="train", metavar="NAME", help="split of the dataset (default train)")
    commit = "commit of the dataset on the hub (default: the one that --out notes, else the newest)"
    p.add_argument("--revision", metavar="COMMIT", help=commit)
    key = "key or column that holds the text of a JSON object or a row (default text)"
    p.add_argument("--text-key", default="text", metavar="KEY", help=key)


def add_result(p: argparse.ArgumentParser) -> None:
    beginning = "beginning of the names of all files that are written"
    p.add_argument("--out", type=Path, required=True, metavar="PREFIX", help=beginning)
    whose = "Hugging Face tokenizer: a folder, a checkpoint from tools/convert.py, or a name on the hub"
    p.add_argument("--tokenizer", required=True, metavar="DIR", help=whose)
    end = "token that ends documents (default: the tokenizer's end-of-sequence token)"
    p.add_argument("--eod", metavar="TOKEN", help=end)
    fits = (
        "checkpoint, Hugging Face folder or config.json. Its vocabulary must hold the tokenizer's; training checks"
        " this too"
    )
    p.add_argument("--model", type=Path, metavar="PATH", help=fits)
    most = "stop with the document that reaches N tokens, such as 15e9 (default: take all)"
    p.add_argument("--tokens", type=count, metavar="N", help=most)
    per_shard = "begin a new shard after about N tokens. A kill loses at most one shard (default 500e6)"
    p.add_argument("--shard-tokens", type=count, default=500_000_000, metavar="N", help=per_shard)
    shorter = "leave out documents of fewer tokens, counting the end-of-document token"
    p.add_argument("--min-tokens", type=count, default=1, metavar="N", help=shorter)
    p.add_argument("--max-tokens", type=count, metavar="N", help="leave out documents of more tokens")
    held_out = (
        "keep the first N documents out of training. PREFIX.held_out.txt gets their text, for calibration and"
        " evaluation"
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
    if not (args.skip_existing and Path(f"{args.out}.json").exists()):  # finished data need no text
        check_inputs(input=[path for path in args.input or () if not glob.has_magic(path)], model=args.model)
        if not os.path.exists(args.tokenizer):
            check_name("tokenizer", args.tokenizer)
    logging.getLogger("megatron").setLevel(logging.ERROR)  # its notes are about training
    warnings.filterwarnings("ignore", message="Could not determine rank")
    from tools.commands.prepare_data import run  # takes seconds: not for --help

    run(args)


if __name__ == "__main__":
    main()
