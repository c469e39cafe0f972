# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Documents to token ids in several processes; the order does not depend on how many.

A worker imports this module and neither torch nor transformers, so it starts at once and stays small.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import Tokenizer

from hydra_mcore.commands import deaf_children
from hydra_mcore.corpus.hub import check_name, unreachable
from hydra_mcore.errors import InputError
from hydra_mcore.tokenizer import open_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hydra_mcore.corpus.sources import Batch

_encode_texts: BatchEncoder  # in a worker only
AHEAD = 4  # batches a worker that are read before their turn to be written: what keeps memory flat
# Parts of a serialised tokenizer that do not take part in encoding a text without special tokens.
_WITHOUT_EFFECT = ("version", "truncation", "padding", "post_processor", "decoder")


@dataclass(frozen=True)
class Encoder:
    """A tokenizer that can be sent to workers; ``eod`` is the id put after every document, every id is below
    ``vocab_size``.
    """

    serialised: str
    eod: int
    vocab_size: int

    @property
    def dtype(self) -> type[np.number]:
        """The integers that tokens are stored in, by Megatron's rule: 16 bits where the vocabulary fits."""
        return np.uint16 if self.vocab_size < 65_500 else np.int32


def fingerprint(serialised: str) -> str:
    """sha256 over all of a serialised tokenizer that decides which ids a text becomes: vocabulary, merges, splitting
    ...
    """
    facts = {key: value for key, value in json.loads(serialised).items() if key not in _WITHOUT_EFFECT}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def load_fast_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """A Hugging Face tokenizer: a folder, a checkpoint of ours that has one beside it, or a name on the hub.

    Raises:
        InputError: no tokenizer, or none that the ``tokenizers`` library runs.
    """
    beside = os.path.join(name, "tokenizer")
    folder, problem = beside if name and os.path.isdir(beside) else str(name), ""
    if not os.path.isdir(folder):
        check_name("tokenizer", folder)
        problem = unreachable()
    try:
        tokenizer = open_tokenizer(folder, local_files_only=bool(problem))
    except InputError as error:
        if not problem:
            raise
        raise InputError(
            f"tokenizer {name}: neither a folder nor in the cache, and {problem}; give a folder with its files"
        ) from error
    if not tokenizer.is_fast:
        raise InputError(f"tokenizer {name}: has no fast form, which the workers need; convert it to a tokenizer.json")
    return tokenizer


def load_encoder(name: str | Path, eod: str | None = None) -> Encoder:
    """The tokenizer ``load_fast_tokenizer`` finds, with the token that ends documents: None takes its end-of-sequence
    token.

    Raises:
        InputError: no such tokenizer, or no such token.
    """
    tokenizer = load_fast_tokenizer(name)
    eod = tokenizer.eos_token if eod is None else eod
    if eod is None:
        raise InputError(f"tokenizer {name}: has no end-of-sequence token; name one that ends documents with --eod")
    ids = tokenizer.encode(eod, add_special_tokens=False)
    if len(ids) != 1:
        raise InputError(f"tokenizer {name}: {eod!r} is {len(ids)} tokens; --eod takes exactly one")
    return Encoder(tokenizer.backend_tokenizer.to_str(), ids[0], max(tokenizer.get_vocab().values()) + 1)


def encode_batches(
    batches: Iterable[Batch], encoder: Encoder, workers: int
) -> Iterator[tuple[Batch, list[np.ndarray]]]:
    """Each batch with the ids [n] of its documents, the end of document included, in the order they came in.

    Raises:
        InputError: a worker died.
    """
    spawn = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
    pool = ProcessPoolExecutor(workers, spawn, _start_worker, (encoder,))
    waiting: deque = deque()
    try:
        for batch in batches:
            with deaf_children():  # a submit may start a worker
                waiting.append((batch, pool.submit(_encode, [document.text for document in batch.documents])))
            if len(waiting) > AHEAD * workers:
                yield _next(waiting)
        while waiting:
            yield _next(waiting)
    except BrokenProcessPool:
        raise InputError(
            "a worker died, perhaps for lack of memory; give fewer --workers, the same command goes on"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _next(waiting: deque) -> tuple[Batch, list[np.ndarray]]:
    batch, future = waiting.popleft()
    ids, ends = future.result()
    return batch, np.split(ids, ends[:-1])


def _start_worker(encoder: Encoder) -> None:
    global _encode_texts
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _encode_texts = BatchEncoder(encoder)


def _end_with_parent() -> None:
    """A killed parent cannot end its workers, and their own ends of the pipes would keep them waiting forever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _encode(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    return _encode_texts(texts)


class BatchEncoder:
    """The tokenizer within a worker, on one core."""

    def __init__(self, encoder: Encoder) -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        self.tokenizer = Tokenizer.from_str(encoder.serialised)
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.eod, self.dtype = encoder.eod, encoder.dtype

    def __call__(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """The ids of all texts in one array, and where each text ends in it."""
        encodings = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        rows = [np.array([*encoding.ids, self.eod], dtype=self.dtype) for encoding in encodings]
        return np.concatenate(rows), np.cumsum([len(row) for row in rows])
