# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Speed of making RULER's prompts, by task and length (for ``tools/benchmark.py prompts``)."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra_mcore.evaluation.ruler.haystack import read_haystack
from hydra_mcore.evaluation.ruler.prompts import TASKS
from hydra_mcore.evaluation.ruler.sets import draw_prompts
from hydra_mcore.evaluation.ruler.source import Source
from hydra_mcore.evaluation.ruler.wording import RULER
from hydra_mcore.selection.probes import tokenizer_in
from tools.benchmark_data import train_tokenizer, write_corpus

SEED = 1_000_000


def rows(tokenizer: Path | None, lengths: Sequence[int], prompts: int, folder: Path) -> Iterator[list[Any]]:
    """Table rows, one a task: prompts a second of one core at each length, the first prompt's tables included.

    Without a tokenizer, it is one of 32,768 words trained on Python's library, which is the haystack, too, over and over.
    """
    corpus, text = write_corpus(folder / "library.jsonl", megabytes=4), folder / "library.txt"
    text.write_text("\n\n".join(json.loads(line)["text"] for line in corpus.open()), encoding="utf-8")
    known = tokenizer_in(tokenizer or train_tokenizer(corpus, folder / "tokenizer"))
    haystack = read_haystack(known, text, repeat=True)
    for task in TASKS:
        source = Source(known, RULER, haystack)
        yield [task, *(_speed(task, length, prompts, source) for length in lengths)]


def _speed(task: str, length: int, prompts: int, source: Source) -> str:
    start = time.process_time()
    for _ in draw_prompts(task, length, prompts, SEED, source):
        pass
    return f"{prompts / (time.process_time() - start):.3g}"
