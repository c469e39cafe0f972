# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Where a run may write, and what it says where it may not.

Root may write anywhere, until it gives that capability up.
"""

import ctypes
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hydra_mcore.errors import InputError
from hydra_mcore.files import check_writable
from hydra_mcore.model.checkpoints import TRACKER
from tests.support.commands import training_ended
from tests.support.launch import run_ranks
from tests.support.stages import FLAGS, make_run

OVERRIDES = 0b110  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH, by which root passes over permissions


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``read``: models and data, where nobody may write; ``own``: where a run may."""
    root = tmp_path_factory.mktemp("folders")
    make_run(root / "read")
    for path in (root / "read", *(root / "read").rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    (root / "own").mkdir()
    return root


def _bound(rank: int, work: Callable[..., object], *args: object) -> object:
    """Do the work as somebody whom permissions bind."""
    header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    libc = ctypes.CDLL(None)
    assert libc.capget(header, sets) == 0
    for index in (0, 1):  # what it has, and what it may take back
        sets[index] &= ~OVERRIDES
    assert libc.capset(header, sets) == 0
    return work(*args)


def _said(path: Path) -> str:
    try:
        check_writable(path, "run-dir")
    except InputError as error:
        return str(error)
    return ""


PROBLEMS = {
    "own": "",
    "own/new/and/deeper": "",
    "own/link": "",
    "read": "{root}/read cannot be written",
    "read/new/run": "{root}/read cannot be written",
    "read/data.bin": "{root}/read/data.bin is no folder",
    "read/data.bin/run": "{root}/read/data.bin is no folder",
    "own/dangling": "{root}/own/dangling is a link to nothing",
    "own/dangling/run": "{root}/own/dangling is a link to nothing",
    "own/circle/run": "{root}/own/circle is a link to nothing",
    "own/closed/run": "Permission denied",
    "own/" + "x" * 300: "File name too long",
}


def test_whether_a_folder_can_be_written(folder: Path) -> None:
    own = folder / "own"
    for link, target in (("link", own), ("dangling", own / "nowhere"), ("circle", own / "circle")):
        (own / link).symlink_to(target)
    (own / "closed").mkdir(mode=0)
    said = run_ranks(_bound, 1, lambda: [_said(folder / name) for name in PROBLEMS])[0]
    for line, (name, problem) in zip(said, PROBLEMS.items(), strict=True):
        assert line == (
            problem
            and f"run-dir {folder / name}: {problem.format(root=folder)}; "
            "change its permissions, or choose another folder"
        )


def _argv(folder: Path, run: str, *flags: str, stage: str = "extend") -> list[str]:
    read = folder / "read"
    argv = [
        "--stage",
        stage,
        "--run-dir",
        str(folder / run),
        "--start-from",
        str(read / "student"),
        "--teacher",
        str(read / "teacher"),
    ]
    return [*argv, *FLAGS, "--data-path", str(read / "data"), "--train-iters", "3", *flags]


def test_it_is_said_before_anything_is_built(folder: Path) -> None:
    read = folder / "read"
    cases = {
        ("read/run",): f"run-dir {read}/run/extend: {read} cannot be written",
        ("own/run", "--data-cache-path", f"{read}/cache"): f"data-cache-path {read}/cache: {read} cannot be written",
        (
            "own/run",
            "--tensorboard-dir",
            f"{read}/data.idx",
        ): f"tensorboard-dir {read}/data.idx: {read}/data.idx is no folder",
        (
            "own/run",
            "--wandb-project",
            "p",
            "--wandb-save-dir",
            f"{read}",
        ): f"wandb-save-dir {read}: {read} cannot be written",
    }
    found = run_ranks(_bound, 1, lambda: [training_ended(0, _argv(folder, *case)) for case in cases])[0]
    for (code, said), expected in zip(found, cases.values(), strict=True):
        problems = [line for line in said.splitlines() if line.startswith("train: ")]
        assert code == 2 and problems == [f"train: {expected}; change its permissions, or choose another folder"], said
    assert not (read / "run").exists() and not (folder / "own" / "run").exists()


@pytest.mark.slow
def test_data_that_may_only_be_read_is_indexed_below_the_run_folder(folder: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (folder / "read").rglob("*")}
    first: dict[str, int] = {}
    for stage in ("align", "distill"):
        assert run_ranks(_bound, 1, training_ended, 0, _argv(folder, "own/reads", stage=stage), timeout=250)[0][0] == 0
        assert (folder / "own" / "reads" / stage / TRACKER).read_text() == "3"
        indices = {path.name: path.stat().st_mtime_ns for path in (folder / "own" / "reads" / "cache").iterdir()}
        first = first or indices
    assert indices == first and len(first) == 4  # the second stage found what the first one wrote
    assert {path: path.stat().st_mtime_ns for path in (folder / "read").rglob("*")} == before


@pytest.mark.slow
def test_two_runs_build_one_cache_at_once(folder: Path) -> None:
    shared = str(folder / "own" / "shared")

    def both(rank: int) -> None:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(name)
        code, said = training_ended(rank, _argv(folder, f"own/at-once-{rank}", "--data-cache-path", shared))
        assert code == 0, said

    run_ranks(both, 2, timeout=250)
    arrays = [np.load(path) for path in Path(shared).glob("*.npy")]
    assert len(arrays) == 3 and not list(Path(shared).glob("*.partial"))


def test_an_index_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    from megatron.core.datasets import blended_dataset, gpt_dataset

    class Stops:
        """An array whose bytes cannot all be had."""

        def __array__(self, *_: object, **__: object) -> np.ndarray:
            assert [path.suffix for path in tmp_path.iterdir()] == [".partial"]
            raise OSError("the disk is gone")

    for module in (gpt_dataset, blended_dataset):
        with pytest.raises(OSError, match="the disk is gone"):
            module.numpy.save(str(tmp_path / "index.npy"), Stops(), allow_pickle=True)
        assert list(tmp_path.iterdir()) == []
        module.numpy.save(str(tmp_path / "index.npy"), np.arange(3), allow_pickle=True)
        assert module.numpy.load(tmp_path / "index.npy").tolist() == [0, 1, 2]
        (tmp_path / "index.npy").unlink()


@pytest.mark.parametrize(
    "damage",
    [lambda data: data[:-9], lambda data: b"", lambda data: bytes(len(data)), lambda _: b"cos\nsystem\n(S'true'\ntR."],
)
def test_a_damaged_index_is_named(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    from megatron.core.datasets import blended_dataset, gpt_dataset

    path = tmp_path / "index.npy"
    np.save(path, np.arange(30))
    path.write_bytes(damage(path.read_bytes()))
    for module in (gpt_dataset, blended_dataset):
        with pytest.raises(
            InputError, match=r"index\.npy: a damaged index of the data \(.+\); remove its folder, it is made again"
        ):
            module.safe_numpy_load(str(path), allow_pickle=True, mmap_mode="r")
