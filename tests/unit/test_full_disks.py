# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Disks that refuse: every write names its file, leaves what was there, and commands say one line."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException

from hydra_mcore.commands import one_line_errors, sole_writer
from hydra_mcore.corpus.manifest import Manifest
from hydra_mcore.errors import InputError
from hydra_mcore.evaluation.records import Records
from hydra_mcore.evaluation.report import write_report
from hydra_mcore.files import disk_problem, disk_refusal, named, replacing, write_json
from hydra_mcore.model.checkpoints import write_tracker
from hydra_mcore.model.runtime import from_first_rank, process_groups
from hydra_mcore.ruler.needle_format import NeedleFormat
from hydra_mcore.ruler.sets import _save
from hydra_mcore.selection.figures import heat_map
from hydra_mcore.selection.journal import JournalWriter
from hydra_mcore.train.checkpoint_care import note_versions
from tests.support.paths import TINY_TEACHER
from tests.unit import test_damaged_files as damaged
from tests.unit.evaluation.test_evaluation_report import TEACHER, keep_all, text_loss, text_piece
from tests.unit.selection.test_selection_report import made_scores
from tests.unit.test_config import card


@contextlib.contextmanager
def limited(size: int) -> Iterator[None]:
    """No file may grow beyond so many bytes (``ulimit -f``); Python ignores the signal, the write fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def keep_text(folder: Path) -> None:
    Records(folder).keep(TEACHER, text_piece(200), text_loss(200, [3, 2, 4], [3, 2, 4]), np.zeros((2, 199)))


WRITERS: dict[str, Callable[[Path], object]] = {
    "head map": damaged.write_map,
    "card": lambda folder: card().save(folder),
    "tracker": lambda folder: write_tracker(folder, 10**60),
    "versions": note_versions,
    "needles": lambda folder: NeedleFormat.load(TINY_TEACHER / "needles.json").save(folder / "needles.json"),
    "scores": lambda folder: made_scores().save(folder / "scores.json"),
    "figure of heads": lambda folder: heat_map(folder / "heads.png", card().head_map, None, "x"),
    "manifest": lambda folder: Manifest({"source": {}}).save(folder / "data.json"),
    "journal": lambda folder: JournalWriter(folder, damaged.RUN, "replica0").add("a" * 99, [1.0] * 9),
    "record of a model": lambda folder: Records(folder).register([TEACHER]),
    "record of text": keep_text,
    "prompts": lambda folder: _save(folder / "set.safetensors", damaged.PROMPTS),
    "report": lambda folder: write_report(folder, None),
}


def test_a_lock_that_cannot_be_written_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"), one_line_errors("command"), limited(0), sole_writer(tmp_path / "out"):
        pytest.fail("held")
    assert (
        capsys.readouterr().err
        == f"command: {tmp_path}/out.lock: File too large; raise the limit on the size of files (ulimit -f)\n"
    )
    assert not list(tmp_path.iterdir())


def files_in(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("size", [0, 50])
@pytest.mark.parametrize("writer", WRITERS)
def test_a_write_that_fails_leaves_what_was_there(
    tmp_path: Path, writer: str, size: int, capsys: pytest.CaptureFixture[str]
) -> None:
    if writer == "report":
        keep_all(Records(tmp_path))
    elif writer != "journal":
        WRITERS[writer](tmp_path)
    before = files_in(tmp_path)
    with pytest.raises(SystemExit) as stopped, one_line_errors("command"), limited(size):
        WRITERS[writer](tmp_path)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.count("\n") == 1
    assert said.startswith(f"command: {tmp_path}/") and said.endswith(
        ": File too large; raise the limit on the size of files (ulimit -f)\n"
    )
    after = files_in(tmp_path)
    assert before.items() <= after.items(), "what was there is there"
    if writer != "journal":
        assert after == before, "and nothing else"


@pytest.mark.parametrize(
    ("number", "fix"),
    [
        *((number, "make room") for number in (errno.ENOSPC, errno.EDQUOT)),
        (errno.EFBIG, "raise the limit"),
        *((number, "check its permissions") for number in (errno.EROFS, errno.EACCES, errno.EPERM)),
        *(
            (number, "a file stands where a folder")
            for number in (errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY)
        ),
        *((number, "was it removed?") for number in (errno.ENOENT, errno.ESTALE)),
        (errno.ENAMETOOLONG, "a shorter name"),
        (errno.EIO, "check the disk"),
        (errno.ELOOP, "links"),
    ],
)
def test_every_refusal_has_its_fix(number: int, fix: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped, one_line_errors("command"):
        raise OSError(number, os.strerror(number), "a/file")
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.count("\n") == 1
    assert said.startswith(f"command: a/file: {os.strerror(number)}; ") and fix in said


def full() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a/file")


def chained(cause: BaseException | None, context: BaseException | None = None) -> RuntimeError:
    error = RuntimeError("what a library says")
    error.__cause__, error.__context__ = cause, context
    return error


WRAPPED = {
    "cause": chained(full()),
    "cause of a cause": chained(chained(full())),
    "context": chained(None, full()),
    "torch": CheckpointException("save", {0: (chained(full()), None)}),
    "Rust": SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    "copytree": shutil.Error([("from", "a/file", "[Errno 28] No space left on device: 'a/file'")]),
    "words": RuntimeError("[Errno 28] No space left on device: 'a/file'"),
}


@pytest.mark.parametrize("how", WRAPPED)
def test_wrapped_refusals_are_found(how: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped, one_line_errors("command"):
        raise WRAPPED[how]
    assert stopped.value.code == 2 and "No space left on device; make room\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        *(OSError("no number"), OSError(errno.ECONNREFUSED, "refused"), RuntimeError("os error 111"), KeyError(28)),
        *(chained(ValueError("x")), chained(None, FileNotFoundError(errno.ENOENT, "handled before"))),
    ],
)
def test_other_errors_keep_their_traceback(error: Exception) -> None:
    assert disk_refusal(error) is None
    with pytest.raises(type(error)), one_line_errors("command"):
        raise error


def test_the_first_rank_tells_the_others_of_its_disk(tmp_path: Path) -> None:
    def make() -> None:
        with limited(0):
            write_json(tmp_path / "x", [1])

    with process_groups(), pytest.raises(InputError, match=f"^{tmp_path}/x: File too large"):
        from_first_rank(make)


def test_dev_full(tmp_path: Path) -> None:
    with pytest.raises(OSError) as caught, named(tmp_path / "log"), open("/dev/full", "w") as file:
        file.write("x")
    assert disk_problem(caught.value) == f"{tmp_path}/log: No space left on device; make room"


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[None]:
    """A small disk of its own in memory; only root has such."""
    folder.mkdir(exist_ok=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("mounting needs root")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_real_disk_that_is_full_and_one_that_is_read_only(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    with mounted(disk, "size=64k"):
        keep_all(Records(disk))
        before = files_in(disk)
        with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as file:
            while file.write(b"x" * 4096):
                pass
        with pytest.raises(OSError) as caught:
            write_report(disk, None)
        assert disk_problem(caught.value).endswith("No space left on device; make room")
        (disk / "filler").unlink()
        assert files_in(disk) == before
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        for write in (
            lambda: write_report(disk, None),
            lambda: card().save(disk / "new"),
            lambda: write_tracker(disk, 1),
        ):
            with pytest.raises(OSError) as caught:
                write()
            assert caught.value.errno == errno.EROFS and str(disk) in disk_problem(caught.value)


def test_a_folder_that_goes_while_a_file_is_written(tmp_path: Path) -> None:
    with pytest.raises(OSError) as caught, replacing(tmp_path / "run" / "x") as beside:
        beside.write_text("x")
        shutil.rmtree(tmp_path / "run")
    assert "was it removed?" in disk_problem(caught.value)


def test_torch_says_what_the_disk_said(tmp_path: Path) -> None:
    """A checkpoint of real tensors, as conversions write it."""
    import torch.distributed.checkpoint as dcp

    with process_groups(), pytest.raises(BaseException) as caught, limited(1000):
        dcp.save({"a": torch.zeros(1000)}, checkpoint_id=tmp_path / "x")
    assert (refusal := disk_refusal(caught.value)) is not None and refusal.errno == errno.EFBIG


def test_json_files_stay_readable(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"a": 1})
    with pytest.raises(OSError), limited(3):
        write_json(tmp_path / "x.json", {"a": 2})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1} and len(list(tmp_path.iterdir())) == 1
