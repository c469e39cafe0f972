# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Documents out of text, JSON Lines and Parquet files, or out of a streamed Hugging Face dataset.

A source gives its documents in a fixed order, each with the position after it: a JSON value from which the source goes
on with the next document, in another process too. What cannot be read as text is a document too, with its fault:
whether that is an error is not for the source to say.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import pyarrow
import pyarrow.parquet
from huggingface_hub import HfApi

from hydra_mcore.corpus.folders import LINES, NAMED_LINES, PACKING, TEXT, find_files, is_kind, printable
from hydra_mcore.corpus.hub import SILENCE, check_name, unreachable
from hydra_mcore.errors import InputError, first_line

if TYPE_CHECKING:
    from datasets import IterableDataset

ENDS = 2**16  # bytes at each end of a file that tell it from another one of the same size
BATCH_CHARACTERS = 2**18  # the work that one call of a worker gets
_COMMIT = re.compile("[0-9a-f]{40}")

Position = Any  # a JSON value; None is the start


class Document(NamedTuple):
    """A text and where it stands; ``fault`` says why there is no text."""

    text: str
    where: str
    fault: str = ""


class Batch(NamedTuple):
    """Some documents in a row, and the position after the last one."""

    documents: list[Document]
    after: Position


class Source(Protocol):
    """Where documents come from; ``left_out`` counts what is there beside them, by kind."""

    left_out: Counter[str]

    def facts(self) -> dict[str, Any]:
        """JSON facts that tell this source from another one."""

    def documents(self, position: Position) -> Iterator[tuple[Document, Position]]:
        """The documents after a position, each with the position after it."""


def batches(source: Source, position: Position) -> Iterator[Batch]:
    """Cut a source's documents into batches; where they are cut depends on nothing but the position and the
    documents.
    """
    documents, characters = [], 0
    for document, after in source.documents(position):
        documents.append(document)
        characters += len(document.text) + 1  # so that documents without text, too, fill a batch
        if characters >= BATCH_CHARACTERS:
            yield Batch(documents, after)
            documents, characters = [], 0
    if documents:
        yield Batch(documents, after)


class FileSource:
    """Files on this machine: a ``.txt`` is one document, a line of ``.jsonl`` and a row of ``.parquet`` one each.

    ``left_out`` counts what folders hold beside them, by kind.

    Its positions are [file, documents (lines, rows) of it that are done].

    Args:
        inputs: files, globs, or folders that are searched at any depth, as ``find_files`` does.
        text_key: key of a JSON object, name of a Parquet column.

    Raises:
        InputError: as ``find_files``.
    """

    def __init__(self, inputs: Sequence[str], text_key: str) -> None:
        found = find_files(inputs)
        self.paths, self.left_out, self.text_key = found.paths, found.left_out, text_key

    def facts(self) -> dict[str, Any]:
        """Raises InputError for a file that cannot be read."""
        return {"files": [file_facts(path) for path in self.paths], "text_key": self.text_key}

    def documents(self, position: Position) -> Iterator[tuple[Document, Position]]:
        """Raises InputError for a file that cannot be opened or read on."""
        first, done = position or (0, 0)
        for index in range(first, len(self.paths)):
            for document, count in self._read(self.paths[index], done if index == first else 0):
                yield document, [index, count]

    def _read(self, path: Path, done: int) -> Iterator[tuple[Document, int]]:
        """A file's documents beyond the first ``done``, each with its number, counted from 1."""
        reader = (
            _read_text if is_kind(path, TEXT) else _read_lines if is_kind(path, LINES + NAMED_LINES) else _read_parquet
        )
        try:
            yield from reader(path, done, self.text_key)
        except (OSError, EOFError, pyarrow.ArrowException) as error:
            raise InputError(f"{path}: cannot be read ({first_line(error)})") from None


class DatasetSource:
    """A dataset of the Hugging Face hub, or a local folder of one, streamed by ``datasets``.

    On the hub it is held at one commit, so that a run that goes on next week reads the same documents. The hub is asked
    no sooner
    than it must be: for the newest commit, where none is given, and for documents. Its positions are [documents done,
        what
    ``datasets`` calls the state of the stream].

    Args:
        revision: a commit, branch or tag of the hub; None is the newest commit.

    Raises:
        InputError: neither a folder nor a name that the hub can have.
    """

    def __init__(self, name: str, config: str | None, split: str, revision: str | None, text_key: str) -> None:
        self.name, self.config, self.split, self.text_key = name, config, split, text_key
        self.local = os.path.isdir(name)
        if not self.local:
            check_name("dataset", name)
        self.revision = revision
        self.left_out: Counter[str] = Counter()
        if self.local:
            links = sum(path.is_symlink() and path.is_dir() for path in Path(name).rglob("*"))
            self.left_out += Counter({"linked folders, which datasets does not follow": links})

    def facts(self) -> dict[str, Any]:
        """Raises InputError where the hub has no such dataset or does not answer, or for a file that cannot be read."""
        if not self.local and not _COMMIT.fullmatch(self.revision or ""):
            self._require_hub()
            try:
                self.revision = HfApi().dataset_info(self.name, revision=self.revision, timeout=SILENCE).sha
            except Exception as error:  # of any of the libraries in between
                raise self._cannot_be_opened(error) from None
        facts = {
            "dataset": self.name,
            "config": self.config,
            "split": self.split,
            "revision": self.revision,
            "text_key": self.text_key,
        }
        if self.local:
            facts["files"] = [file_facts(path) for path in sorted(Path(self.name).rglob("*")) if path.is_file()]
        return facts

    @cached_property
    def _stream(self) -> IterableDataset:
        from datasets import load_dataset, logging  # takes seconds: not for files

        logging.set_verbosity(logging.CRITICAL)  # it logs the traceback of an error that it raises as well
        if not self.local:
            self._require_hub()
        try:
            return load_dataset(self.name, self.config, split=self.split, streaming=True, revision=self.revision)
        except Exception as error:
            raise self._cannot_be_opened(error) from None

    def _require_hub(self) -> None:
        if problem := unreachable():
            raise InputError(f"dataset {self.name}: no such folder, and {problem}; give a folder, or a network")

    def _cannot_be_opened(self, error: Exception) -> InputError:
        return InputError(
            f"dataset {self.name}: cannot be opened ({first_line(error)}); check name, configuration and split"
        )

    def documents(self, position: Position) -> Iterator[tuple[Document, Position]]:
        """Raises InputError where the dataset cannot be opened or the stream breaks off."""
        done, state = position or (0, None)
        stream = self._stream
        if state is not None:
            stream.load_state_dict(state)
        try:
            for number, row in enumerate(stream, start=done + 1):
                where = f"dataset {self.name}, split {self.split}, document {number}"
                yield _document(row.get(self.text_key), where, self.text_key), [number, stream.state_dict()]
        except (
            Exception
        ) as error:  # between here and the files of a dataset there are a dozen libraries with errors of their own
            raise InputError(
                f"dataset {self.name}: the stream broke off ({first_line(error)}); the same command goes on there"
            ) from None


def file_facts(path: Path) -> dict[str, Any]:
    """A file's name, its size in bytes, and a sha256 of its size and both ends, which is quick whatever the size.

    Raises:
        InputError: a file that cannot be read.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest = hashlib.sha256(str(size).encode())
            digest.update(file.read(ENDS))
            file.seek(max(0, size - ENDS))
            digest.update(file.read(ENDS))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    return {"path": printable(path), "bytes": size, "ends_sha256": digest.hexdigest()}


def _read_text(path: Path, done: int, text_key: str) -> Iterator[tuple[Document, int]]:
    if not done:
        yield _decoded(path.read_bytes(), str(path)), 1


def _read_lines(path: Path, done: int, text_key: str) -> Iterator[tuple[Document, int]]:
    # opened here, since pyarrow takes no name that is not UTF-8
    with path.open("rb") as raw, io.BufferedReader(pyarrow.input_stream(raw, PACKING.get(path.suffix.lower()))) as file:
        for number, line in enumerate(itertools.islice(file, done, None), start=done + 1):
            if not line.strip():
                continue
            document = _decoded(line, f"{path}, line {number}")
            if not document.fault:
                try:
                    row = json.loads(document.text)
                except (ValueError, RecursionError):
                    document = Document("", document.where, "not JSON")
                else:
                    document = _document(row.get(text_key) if isinstance(row, dict) else None, document.where, text_key)
            yield document, number


def _read_parquet(path: Path, done: int, text_key: str) -> Iterator[tuple[Document, int]]:
    with path.open("rb") as raw, pyarrow.parquet.ParquetFile(raw) as file:
        if text_key not in file.schema_arrow.names:
            raise InputError(
                f"{path}: no column {text_key!r}; choose with --text-key among {', '.join(file.schema_arrow.names)}"
            )
        row = 0
        for group in range(file.num_row_groups):
            if row + file.metadata.row_group(group).num_rows <= done:
                row += file.metadata.row_group(group).num_rows
                continue
            for some in file.iter_batches(256, row_groups=[group], columns=[text_key]):
                # as bytes, since pyarrow gives up a whole batch for one row that is not UTF-8
                for value in some.column(0).cast(pyarrow.large_binary()).to_pylist():
                    row += 1
                    if row > done:
                        where = f"{path}, row {row}"
                        yield _document(None, where, text_key) if value is None else _decoded(value, where), row


def _decoded(raw: bytes, where: str) -> Document:
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        return Document("", where, "not UTF-8")
    return Document(text, where, "" if text.strip() else "empty")


def _document(text: Any, where: str, text_key: str) -> Document:
    """A document out of a parsed row."""
    if isinstance(text, list):
        return Document("", where, f"a list under {text_key!r}; write chats as text first (docs/data.md)")
    if not isinstance(text, str):
        return Document("", where, f"no text under {text_key!r}")
    try:
        text.encode()
    except UnicodeEncodeError:
        return Document("", where, "half of a surrogate pair")  # JSON can write it, no tokenizer can read it
    return Document(text, where, "" if text.strip() else "empty")
