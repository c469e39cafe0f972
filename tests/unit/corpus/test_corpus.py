# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Text to token shards: every kind of source, any number of workers, killed at any step, broken input."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset
from transformers import AutoTokenizer

from hydra_mcore.config import ConfigError
from hydra_mcore.corpus import shards, sources, tokenize
from hydra_mcore.corpus.manifest import Manifest, expand_blend
from hydra_mcore.corpus.shards import Limits, prepare
from hydra_mcore.corpus.sources import Batch, DatasetSource, Document, FileSource
from hydra_mcore.corpus.tokenize import BatchEncoder, Encoder, encode_batches, fingerprint, load_encoder
from hydra_mcore.errors import InputError
from tests.support.corpora import encode_in_this_process, make_texts, write_lines, written
from tests.support.paths import ROOT, TINY_TEACHER

END = 0  # end of document of the tokenizer


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return load_encoder(TINY_TEACHER)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return make_texts()


@pytest.fixture
def serial(monkeypatch: pytest.MonkeyPatch) -> None:
    encode_in_this_process(monkeypatch)


def write_parquet(path: Path, texts: list[str]) -> Path:
    path.parent.mkdir(exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table({"id": range(len(texts)), "text": texts}), path, row_group_size=7)
    return path


def source_of(kind: str, folder: Path, texts: list[str]) -> sources.Source:
    """The texts as a source of some kind, spread over two files where it may be."""
    half = len(texts) // 2
    if kind == "txt":
        for number, text in enumerate(texts):
            (folder / f"{number:03d}.txt").write_text(text)
        return FileSource([str(folder / "*.txt")], "text")
    if kind in ("jsonl", "jsonl.gz"):
        paths = [
            write_lines(folder / f"{name}.{kind}", some) for name, some in (("b", texts[:half]), ("a", texts[half:]))
        ]
        return FileSource([str(path) for path in paths], "text")
    for number, some in enumerate((texts[:half], texts[half:])):
        write_parquet(folder / "set" / f"{number}.parquet", some)
    return (
        DatasetSource(str(folder / "set"), None, "train", None, "text")
        if kind == "dataset"
        else FileSource([str(folder)], "text")
    )


def documents_of(manifest: Manifest, folder: Path) -> list[list[int]]:
    datasets = [IndexedDataset(str(folder / shard.name)) for shard in manifest.shards]
    return [dataset[index].tolist() for dataset in datasets for index in range(len(dataset))]


KINDS = ["txt", "jsonl", "jsonl.gz", "parquet", "dataset"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_source_gives_its_documents_in_order(
    kind: str, tmp_path: Path, texts: list[str], encoder: Encoder, serial: None
) -> None:
    manifest = prepare(source_of(kind, tmp_path, texts), encoder, Limits(shard_tokens=3000), tmp_path / "out", 1)
    tokenizer = AutoTokenizer.from_pretrained(TINY_TEACHER)
    expected = [[*tokenizer.encode(text, add_special_tokens=False), END] for text in texts]
    assert documents_of(manifest, tmp_path) == expected
    assert (manifest.documents, manifest.tokens) == (len(texts), sum(map(len, expected)))
    assert manifest.max_id == max(map(max, expected)) and len(manifest.shards) > 2
    assert all(shard.tokens >= 1500 for shard in manifest.shards)
    assert {path.name for path in tmp_path.glob("out*")} == {
        "out.json", *(f"{shard.name}{suffix}" for shard in manifest.shards for suffix in (".bin", ".idx"))
    }  # fmt: skip
    assert Manifest.load(tmp_path / "out.json") == manifest


@pytest.mark.parametrize("kind", KINDS)
def test_a_source_goes_on_from_every_position(kind: str, tmp_path: Path, texts: list[str]) -> None:
    texts = [*texts[:10], " ", *texts[10:12]]
    pairs = list(source_of(kind, tmp_path, texts).documents(None))
    assert [document.text for document, _ in pairs] == texts and pairs[10][0].fault == "empty"
    for number, (_, after) in enumerate(pairs, start=1):
        again = source_of(kind, tmp_path, texts).documents(json.loads(json.dumps(after)))
        assert [document for document, _ in again] == [document for document, _ in pairs[number:]]


def test_workers_change_nothing(
    tmp_path: Path, texts: list[str], encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "BATCH_CHARACTERS", 500)
    outputs = []
    for workers in (1, 3):
        (tmp_path / str(workers)).mkdir()
        source = FileSource([str(write_lines(tmp_path / "in.jsonl", texts))], "text")
        prepare(source, encoder, Limits(shard_tokens=4000), tmp_path / str(workers) / "out", workers)
        outputs.append(written(tmp_path / str(workers)))
    assert outputs[0] == outputs[1] and len(outputs[0]) > 4


def test_documents_are_read_a_few_batches_ahead_only(encoder: Encoder) -> None:
    """What makes memory independent of the size of the corpus."""
    drawn = 0

    def endless() -> Iterator[Batch]:
        nonlocal drawn
        while True:
            drawn += 1
            yield Batch([Document("some text", "here")], None)

    work = encode_batches(endless(), encoder, workers=2)
    for number in range(1, 30):
        next(work)
        assert drawn <= number + 2 * tokenize.AHEAD
    work.close()


STEPS = ((Path, "replace"), (Path, "unlink"), (shards.ShardWriter, "add"), (shards.ShardWriter, "append"))


def killed_at(step: int, job: Callable[[], object]) -> bool:
    """Whether the job, in a process of its own, was killed by SIGKILL just before one of the ``STEPS``, counted over
    all.
    """

    def die_there() -> None:
        left = step

        def counting(original: Callable) -> Callable:
            def call(*args: object, **kwargs: object) -> object:
                nonlocal left
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(*args, **kwargs)

            return call

        for owner, name in STEPS:
            setattr(owner, name, counting(getattr(owner, name)))
        job()

    process = multiprocessing.get_context("fork").Process(target=die_there)
    process.start()
    process.join(60)
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("kind", ["jsonl", pytest.param("dataset", marks=pytest.mark.slow)])
def test_killed_before_any_step_the_same_bytes_come_out(
    kind: str, tmp_path: Path, texts: list[str], encoder: Encoder, serial: None
) -> None:
    # the tail of both is short, so the last shards are joined, too
    limits, long = Limits(shard_tokens=2000), [text for text in texts if len(text) > 100][:17]

    def job(name: str) -> None:
        (tmp_path / name).mkdir(exist_ok=True)
        prepare(source_of(kind, tmp_path, long), encoder, limits, tmp_path / name / "out", workers=1)

    job("whole")
    whole = written(tmp_path / "whole")
    step = 0
    while killed_at(step := step + 1, lambda: job(f"cut-{step}")):
        job(f"cut-{step}")
        assert written(tmp_path / f"cut-{step}") == whole, f"killed before step {step}"
    assert step > 30


def test_limits(tmp_path: Path, texts: list[str], encoder: Encoder, serial: None) -> None:
    source = FileSource([str(write_lines(tmp_path / "in.jsonl", texts))], "text")
    rows = documents_of(prepare(source, encoder, Limits(), tmp_path / "all", 1), tmp_path)
    kept = [row for row in rows if 20 <= len(row) <= 500]
    found = prepare(source, encoder, Limits(min_tokens=20, max_tokens=500), tmp_path / "some", 1)
    assert documents_of(found, tmp_path) == kept and 0 < len(kept) < len(rows)
    assert found.skipped == {
        "too short": sum(len(row) < 20 for row in rows),
        "too long": sum(len(row) > 500 for row in rows),
    }
    first = sum(map(len, rows[:9]))
    for budget, number in ((first, 9), (first + 1, 10)):
        found = prepare(source, encoder, Limits(tokens=budget), tmp_path / f"first-{budget}", 1)
        assert documents_of(found, tmp_path) == rows[:number]


def test_held_out_documents_are_text_and_in_no_shard(
    tmp_path: Path, texts: list[str], encoder: Encoder, serial: None
) -> None:
    source = source_of("jsonl", tmp_path, texts)
    everything = documents_of(prepare(source, encoder, Limits(), tmp_path / "all", 1), tmp_path)
    rest = prepare(source, encoder, Limits(held_out=3), tmp_path / "rest", 1)
    assert documents_of(rest, tmp_path) == everything[3:]
    assert (tmp_path / "rest.held_out.txt").read_text() == "\n\n".join(texts[:3])
    assert not (tmp_path / "all.held_out.txt").exists()
    with pytest.raises(InputError, match=r"limits\.held_out is 3 there, 4 here"):
        prepare(source, encoder, Limits(held_out=4), tmp_path / "rest", 1)


def test_rows_that_are_not_utf8_do_not_take_others_with_them(tmp_path: Path) -> None:
    raw = pyarrow.array([b"one", b"\xff", b"three", None], type=pyarrow.binary())
    table = pyarrow.table({"text": pyarrow.Array.from_buffers(pyarrow.string(), 4, raw.buffers())})
    pyarrow.parquet.write_table(table, tmp_path / "in.parquet")
    found = [document for document, _ in FileSource([str(tmp_path)], "text").documents(None)]
    assert [(document.text, document.fault) for document in found] == [
        ("one", ""), ("", "not UTF-8"), ("three", ""), ("", "no text under 'text'")
    ]  # fmt: skip
    assert found[1].where == f"{tmp_path / 'in.parquet'}, row 2"


def test_other_data_under_the_same_name(tmp_path: Path, texts: list[str], encoder: Encoder, serial: None) -> None:
    def job(limits: Limits, texts: list[str]) -> Manifest:
        return prepare(
            FileSource([str(write_lines(tmp_path / "in.jsonl", texts))], "text"), encoder, limits, tmp_path / "out", 1
        )

    limits = Limits(shard_tokens=5000)
    manifest = job(limits, texts)
    assert job(limits, texts) == manifest
    with pytest.raises(ConfigError, match=r"limits.tokens is None there, 99 here"):
        job(Limits(tokens=99, shard_tokens=5000), texts)
    with pytest.raises(ConfigError, match=r"source.files.0.bytes is \d+ there"):
        job(limits, texts[1:])
    first = tmp_path / f"{manifest.shards[0].name}.bin"
    first.write_bytes(first.read_bytes()[:-1] + b"\x07")
    with pytest.raises(ConfigError, match=r"out-00000\.bin: is not what was written \(its sha256 differs\)"):
        job(limits, texts)
    (tmp_path / "out.json").rename(tmp_path / "out.unfinished.json")
    first.unlink()
    with pytest.raises(ConfigError, match=r"out-00000\.bin: is missing, the manifest says"):
        job(limits, texts)


def test_two_processes_do_not_write_the_same_data(tmp_path: Path, encoder: Encoder) -> None:
    (tmp_path / "a.txt").write_text("x")
    held = (
        "import sys\nfrom hydra_mcore.commands import sole_writer\nwith sole_writer(sys.argv[1]):\n   "
        " print(flush=True); sys.stdin.read()"
    )
    command, pipe = [sys.executable, "-c", held, str(tmp_path / "out")], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, cwd=ROOT) as holder:
        holder.stdout.readline()
        with pytest.raises(InputError, match=f"is being written by process {holder.pid} on "):
            prepare(FileSource([str(tmp_path)], "text"), encoder, Limits(), tmp_path / "out", 1)


def test_a_blend_of_prepared_data_is_its_shards_by_tokens(
    tmp_path: Path, texts: list[str], encoder: Encoder, serial: None
) -> None:
    for name, some in (("a", texts), ("b", texts[:20])):
        source = FileSource([str(write_lines(tmp_path / f"{name}.jsonl", some))], "text")
        prepare(source, encoder, Limits(shard_tokens=3000 if name == "a" else 10**6), tmp_path / name, 1)
    a, b, plain = (str(tmp_path / name) for name in ("a", "b", "plain"))
    shards_a = Manifest.load(tmp_path / "a.json").shards
    total_a, total_b = sum(shard.tokens for shard in shards_a), Manifest.load(tmp_path / "b.json").tokens

    def weights(blend: list[str]) -> dict[str, float]:
        expanded = expand_blend(blend)
        return dict(zip(expanded[1::2], map(float, expanded[::2]), strict=True))

    named = {f"{a}-{number:05d}": shard.tokens for number, shard in enumerate(shards_a)}
    assert weights([a]) == pytest.approx(named)
    assert weights([a, b]) == pytest.approx({**named, f"{b}-00000": total_b})
    shares = {name: 0.7 * tokens / total_a for name, tokens in named.items()}
    assert weights(["0.7", a, "0.3", plain]) == pytest.approx({**shares, plain: 0.3})
    assert expand_blend([b]) == [f"{b}-00000"]
    assert expand_blend([plain]) == [plain] and expand_blend([f"{a}-00000"]) == [f"{a}-00000"]
    with pytest.raises(ConfigError, match="plain has no manifest that says its tokens"):
        expand_blend([a, plain])
    (tmp_path / "a.json").rename(tmp_path / "a.unfinished.json")
    with pytest.raises(ConfigError, match="is not prepared to the end"):
        expand_blend([a])


def test_fingerprint_is_of_what_decides_the_ids(tmp_path: Path, encoder: Encoder) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TINY_TEACHER)
    tokenizer.save_pretrained(tmp_path / "model" / "tokenizer")
    assert load_encoder(tmp_path / "model") == encoder  # as it stands beside a checkpoint
    tokenizer.backend_tokenizer.enable_truncation(8)
    assert fingerprint(tokenizer.backend_tokenizer.to_str()) == fingerprint(encoder.serialised)
    assert len(BatchEncoder(Encoder(tokenizer.backend_tokenizer.to_str(), 0, 1024))(["word " * 99])[0]) > 99
    tokenizer.add_tokens(["<new>"])
    assert fingerprint(tokenizer.backend_tokenizer.to_str()) != fingerprint(encoder.serialised)


def test_large_vocabularies_take_32_bits(tmp_path: Path, texts: list[str], encoder: Encoder, serial: None) -> None:
    source = FileSource([str(write_lines(tmp_path / "in.jsonl", texts))], "text")
    small = prepare(source, encoder, Limits(), tmp_path / "small", 1)
    large = prepare(source, Encoder(encoder.serialised, 65_499, 65_500), Limits(), tmp_path / "large", 1)
    assert (encoder.dtype, Encoder("", 0, 65_499).dtype) == (DType.optimal_dtype(1024), DType.optimal_dtype(65_499))
    assert [IndexedDataset(str(tmp_path / name)).index.dtype for name in ("small-00000", "large-00000")] == [
        np.uint16,
        np.int32,
    ]
    ended = [[*row[:-1], 65_499] for row in documents_of(small, tmp_path)]
    assert documents_of(large, tmp_path) == ended and large.max_id == 65_499
