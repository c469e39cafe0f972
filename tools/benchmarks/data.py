# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Measure tokens a second and memory of tools/prepare_data.py, beside the tokenizers library alone.

The command itself runs, on real text.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hydra_mcore.corpus.manifest import Manifest, finished_path
from hydra_mcore.corpus.sources import FileSource, batches
from tools.benchmarks.report import Report

TIMES = 8  # how much larger the larger corpus is
COLUMNS = [
    "vocabulary", "tokens", "encode_batch, tokens/s", "prepare_data, tokens/s", "of encode_batch", "peak MiB",
    f"peak MiB at {TIMES}x"
]  # fmt: skip


def run(args: argparse.Namespace) -> Report:
    notes = (
        f"Python's library as JSON Lines, {args.megabytes} MB and {TIMES}x as much; {args.workers} workers; speeds are"
        " tokens for each second of a core, those of reader and writer counted, without the start. Peak: resident"
        f" memory of the largest process. Median of {args.repeats}."
    )
    with tempfile.TemporaryDirectory() as folder:
        found = list(rows(args.tokenizers, args.megabytes, args.repeats, args.workers, Path(folder)))
    return Report("Preparing data", notes, COLUMNS, found)


class Cost(NamedTuple):
    """What a call of the command took: seconds of all its processes' cores, MiB of its largest process."""

    tokens: int
    core_seconds: float
    peak_mib: float


def rows(tokenizers: Sequence[Path], megabytes: float, repeats: int, workers: int, folder: Path) -> Iterator[list[Any]]:
    """Table rows, one a tokenizer; without tokenizers, one of 32,768 words trained on the text.

    The command's speed is that of the documents by which the larger corpus exceeds the smaller one: starting costs the
    same for both. Ours and theirs take turns, and the median of both counts.
    """
    small, large = (
        write_corpus(folder / "small.jsonl", megabytes),
        write_corpus(folder / "large.jsonl", megabytes * TIMES),
    )
    for number, tokenizer in enumerate(tokenizers or [train_tokenizer(small, folder / "tokenizer")]):
        speeds, alone, peaks = [], [], []
        for repeat in range(repeats):
            alone.append(encode_batch_speed(tokenizer, small))
            costs = [
                prepare(corpus, tokenizer, folder / f"{corpus.stem}-{number}-{repeat}", workers)
                for corpus in (small, large)
            ]
            speeds.append((costs[1].tokens - costs[0].tokens) / (costs[1].core_seconds - costs[0].core_seconds))
            peaks.append([cost.peak_mib for cost in costs])
        ours, theirs = statistics.median(speeds), statistics.median(alone)
        words = Tokenizer.from_file(str(tokenizer / "tokenizer.json")).get_vocab_size()
        memory = [f"{statistics.median(column):.0f}" for column in zip(*peaks, strict=True)]
        yield [words, costs[1].tokens, f"{theirs:.0f}", f"{ours:.0f}", f"{100 * ours / theirs:.0f}%", *memory]


def write_corpus(path: Path, megabytes: float) -> Path:
    """JSON Lines of Python's own library, over and over, until so many megabytes are full."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    texts = [text for file in files if (text := file.read_text(errors="replace")).strip()]
    with path.open("w") as out:
        for text in itertools.cycle(texts):
            out.write(json.dumps({"text": text}) + "\n")
            if out.tell() >= megabytes * 1e6:
                return path


def train_tokenizer(corpus: Path, folder: Path, words: int = 32_768) -> Path:
    """A byte-level BPE tokenizer of the corpus."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    end = "<|endoftext|>"
    trainer = trainers.BpeTrainer(
        vocab_size=words,
        special_tokens=[end],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((json.loads(line)["text"] for line in corpus.open()), trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end).save_pretrained(folder)
    return folder


def encode_batch_speed(folder: Path, corpus: Path) -> float:
    """Tokens a second of one core by ``Tokenizer.encode_batch``, in the batches that the command's workers get."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    work = [
        [document.text for document in batch.documents] for batch in batches(FileSource([str(corpus)], "text"), None)
    ]
    start = time.process_time()
    tokens = 0
    for texts in work:
        tokens += sum(map(len, tokenizer.encode_batch(texts, add_special_tokens=False)))
    return tokens / (time.process_time() - start)


def prepare(corpus: Path, tokenizer: Path, out: Path, workers: int) -> Cost:
    """Run the command; shards are small, so that the smaller corpus fills some, too."""
    command = [
        sys.executable,
        str(Path(__file__).parents[1] / "prepare_data.py"),
        "--input",
        str(corpus),
        "--tokenizer",
        str(tokenizer),
    ]
    flags = ["--out", str(out), "--workers", str(workers), "--shard-tokens", "1e6"]
    child = subprocess.Popen([*command, *flags], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise subprocess.CalledProcessError(child.returncode, command)
    return Cost(Manifest.load(finished_path(out)).tokens, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)
