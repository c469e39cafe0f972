# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Texts to prepare, and preparing them within the test process."""

import gc
import gzip
import json
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from hydra_mcore.corpus import shards, sources
from hydra_mcore.corpus.sources import Batch
from hydra_mcore.corpus.tokenize import BatchEncoder, Encoder


def make_texts() -> list[str]:
    """Documents of very different lengths, in several scripts."""
    rng = random.Random(0)
    words = "def return self key 12 34; été 東京 \n\t <|other|> the quick needle".split(" ")
    return [" ".join(rng.choices(words, k=rng.choice([1, 3, 40, 400]))) + f" {number}" for number in range(60)]


def encode_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker's own encoding without worker processes, and batches of a few documents."""

    def in_this_process(
        batches: Iterator[Batch], encoder: Encoder, workers: int
    ) -> Iterator[tuple[Batch, list[np.ndarray]]]:
        encode = BatchEncoder(encoder)
        for batch in batches:
            ids, ends = encode([document.text for document in batch.documents])
            yield batch, np.split(ids, ends[:-1])

    monkeypatch.setattr(shards, "encode_batches", in_this_process)
    monkeypatch.setattr(sources, "BATCH_CHARACTERS", 2000)
    gc.freeze()  # Megatron collects garbage when it joins shards, and a test process has a lot to look through


def write_lines(path: Path, texts: list[str]) -> Path:
    lines = "".join(
        json.dumps({"id": number, "text": text}) + "\n" + "\n" * (number % 5 == 0) for number, text in enumerate(texts)
    )
    path.write_bytes(gzip.compress(lines.encode()) if path.suffix == ".gz" else lines.encode())
    return path


def written(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name.startswith("out")}
