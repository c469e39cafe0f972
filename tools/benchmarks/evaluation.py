# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Measure how fast evaluation makes prompts, and how fast models read them.

The prompts are made as evaluation makes them, without a cache. Random models of the tiny teacher's shape run as
evaluation runs them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from hydra_mcore.config import HydraOptions, ModelCard, ModelShape
from hydra_mcore.evaluation.parallel import ParallelModel
from hydra_mcore.heads import HeadMap
from hydra_mcore.model.build import build_model
from hydra_mcore.model.runtime import process_groups
from hydra_mcore.ruler.haystack import read_haystack
from hydra_mcore.ruler.material import PromptMaterial
from hydra_mcore.ruler.prompts import TASKS
from hydra_mcore.ruler.sets import draw_prompts
from hydra_mcore.ruler.wording import RULER
from hydra_mcore.tokenizer import open_tokenizer
from tools.benchmarks.data import train_tokenizer, write_corpus
from tools.benchmarks.report import Report

SEED = 1_000_000
ANSWER = 16  # tokens whose predictions are looked at
FA_HEADS = {"all heads FA": 8, "3:1": 2, "no FA heads": 0}  # of the 8 in each layer


def run(args: argparse.Namespace) -> Report:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with tempfile.TemporaryDirectory() as folder:
        speeds = list(prompt_rows(args.tokenizer, args.lengths, args.prompts, Path(folder)))
    notes = "4 layers x 8 heads of 16 channels: flat where time is linear in length."
    columns = ("model", *map(str, args.read), "last / first")
    reading = Report("Microseconds a token of one prompt", notes, columns, list(reading_rows(args.read)))
    notes = f"{args.prompts} of each task and length."
    return Report("Prompts a second of one core", notes, ("task", *map(str, args.lengths)), speeds, more=(reading,))


def prompt_rows(tokenizer: Path | None, lengths: Sequence[int], prompts: int, folder: Path) -> Iterator[list[Any]]:
    """Table rows, one a task: prompts a second of one core at each length, the first prompt's tables included.

    Without a tokenizer, it is one of 32,768 words trained on Python's library, which is the haystack, too, over and
    over.
    """
    corpus, text = write_corpus(folder / "library.jsonl", megabytes=4), folder / "library.txt"
    text.write_text("\n\n".join(json.loads(line)["text"] for line in corpus.open()), encoding="utf-8")
    known = open_tokenizer(tokenizer or train_tokenizer(corpus, folder / "tokenizer"))
    haystack = read_haystack(known, text, repeat=True)
    for task in TASKS:
        material = PromptMaterial(known, RULER, haystack)
        yield [task, *(_speed(task, length, prompts, material) for length in lengths)]


def _speed(task: str, length: int, prompts: int, material: PromptMaterial) -> str:
    start = time.process_time()
    for _ in draw_prompts(task, length, prompts, SEED, material):
        pass
    return f"{prompts / (time.process_time() - start):.3g}"


def reading_rows(lengths: Sequence[int]) -> Iterator[list[Any]]:
    """Table rows, one a model of the tiny teacher's shape: microseconds a token of one prompt, by length."""
    shape = ModelShape(
        num_layers=4, hidden_size=128, num_heads=8, num_kv_groups=4, head_dim=16, ffn_hidden_size=384, vocab_size=1024,
        native_length=512
    )  # fmt: skip
    with process_groups():
        for name, count in FA_HEADS.items():
            kept = itertools.product(range(shape.num_layers), range(count))
            head_map = HeadMap.from_fa(kept, shape.num_layers, shape.num_heads, shape.num_kv_groups)
            options = HydraOptions.teacher() if count == shape.num_heads else HydraOptions()
            card = ModelCard(shape=shape, head_map=head_map, options=options, fingerprint="")
            model = ParallelModel([build_model(card).eval()])
            _micros_a_token(model, min(lengths))  # the first one warms up
            micros = [_micros_a_token(model, length) for length in lengths]
            yield [name, *(f"{each:.0f}" for each in micros), f"{micros[-1] / micros[0]:.2f}"]


def _micros_a_token(model: ParallelModel, length: int) -> float:
    ids_bs = torch.randint(model.chunks[0].vocab_size, (1, length))
    start = time.perf_counter()
    model.predicted(ids_bs, length - ANSWER)
    return 1e6 * (time.perf_counter() - start) / length
