# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""What a run folder's filesystem does: renames, locks, fsync, mmap, and how much fits into it."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tools.doctor_lines import GIB, Check, Line, fail, ok, one_line, warn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

TOPIC = "files"
ROUNDS = 100
BLOCK = 16 << 20
SLOW_FSYNC_S = 1.0
MIN_INODES = 10_000  # a checkpoint is a few files a rank, a run some hundred
MIN_SPACE = 20 * GIB
LOCKS = {"flock": fcntl.flock, "fcntl lock": fcntl.lockf}
FLEETING = {"tmpfs": "the machine's memory", "ramfs": "the machine's memory", "overlay": "the container"}
LOCAL_DISK = "keep run folders on another filesystem, and HF_HOME on a local disk"


def checks(folder: Path) -> list[Check]:
    """The checks of this topic; each works in a hidden folder of its own, which it removes."""
    steps = {
        "run folder": run_folder,
        "rename": renames,
        "write": writes,
        "exclusive creation": exclusive,
        "locks": locks,
        "space": space,
    }
    return [Check(TOPIC, name, lambda step=step: step(folder)) for name, step in steps.items()]


def usable(folder: Path) -> bool:
    """Whether there is a folder to try things in; ``run_folder`` says why not."""
    return os.path.isdir(folder) and os.access(folder, os.W_OK | os.X_OK)


def run_folder(folder: Path, mounts: Path = Path("/proc/mounts")) -> Iterator[Line]:
    if not os.path.isdir(folder):  # pathlib's raises where a folder above it is closed
        yield fail(
            "run folder", f"{folder}: no such folder", f"mkdir -p {folder}, on a filesystem that all nodes share"
        )
        return
    if not usable(folder):
        yield fail("run folder", f"{folder}: not writable", "choose a folder of yours, or have its permissions changed")
        return
    rows = [line.split()[:3] for line in mounts.read_text(encoding="utf-8").splitlines()]
    above = {str(folder.resolve()), *map(str, folder.resolve().parents)}
    kind = max(
        ((len(place), index, kind) for index, (_, place, kind) in enumerate(rows) if place in above),
        default=(0, 0, "unknown"),
    )[2]
    if kind in FLEETING:
        yield warn("run folder", f"{folder} ({kind}): ends with {FLEETING[kind]}", "put run folders on a disk")
    else:
        yield ok("run folder", f"{folder} ({kind})")


def renames(folder: Path) -> Iterator[Line]:
    """A checkpoint counts when a small file is renamed over an old one: whoever reads must see the old or the new one,
    whole.
    """
    if not usable(folder):
        return
    with tempfile.TemporaryDirectory(prefix=".doctor_", dir=folder) as scratch:
        target, beside = Path(scratch, "target"), Path(scratch, "beside")
        target.write_bytes(b"0" * 4096)
        reader = _fork(lambda: _read_until_end(target))
        for index in range(ROUNDS):
            beside.write_bytes(b"%d" % (index % 10) * 4096)
            os.replace(beside, target)
        beside.write_bytes(b"end")
        os.replace(beside, target)
        if _status(reader):
            yield fail(
                "rename of files", "a reader saw a missing or half-written file", f"not atomic here: {LOCAL_DISK}"
            )
        else:
            yield ok("rename of files", "over an existing one: atomic for readers")
        old, new = Path(scratch, "old"), Path(scratch, "new")
        (old / "inside").mkdir(parents=True)
        (old / "inside" / "file").write_bytes(b"x")
        try:
            os.rename(old, new)
        except OSError as error:
            yield fail("rename of folders", one_line(error), f"checkpoints are moved into place whole: {LOCAL_DISK}")
        else:
            yield ok("rename of folders", "works")


def _read_until_end(target: Path) -> int:
    deadline = time.monotonic() + 15
    while time.monotonic() < deadline:
        try:
            seen = target.read_bytes()
        except OSError:
            return 1
        if seen == b"end":
            return 0
        if len(seen) != 4096 or seen.count(seen[:1]) != 4096:
            return 1
    return 1


def writes(folder: Path) -> Iterator[Line]:
    """A block is written, made durable, and read back by another process through mmap, as datasets are."""
    if not usable(folder):
        return
    with tempfile.TemporaryDirectory(prefix=".doctor_", dir=folder) as scratch:
        path, content = Path(scratch, "block"), os.urandom(1 << 20) * (BLOCK >> 20)
        start = time.monotonic()
        try:
            with open(path, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            parent = os.open(scratch, os.O_RDONLY)
            os.fsync(parent)
            os.close(parent)
        except OSError as error:
            mends = {
                errno.ENOSPC: "free space, or another folder",
                errno.EDQUOT: "your quota is used up",
                errno.EFBIG: "ulimit -f unlimited",
            }
            yield fail("write and fsync", one_line(error), mends.get(error.errno, LOCAL_DISK))
            return
        seconds = time.monotonic() - start
        found = f"{BLOCK >> 20} MiB in {seconds:.2f} s"
        if seconds > SLOW_FSYNC_S:
            yield warn(
                "write and fsync",
                f"{found}: slow",
                "checkpoints will take long: a faster filesystem, or save less often",
            )
        else:
            yield ok("write and fsync", found)
        if _status(_fork(lambda: _differs(path, content))):
            yield fail(
                "mmap", "cannot be read back so, or reads differ", f"datasets are read through mmap: {LOCAL_DISK}"
            )
        else:
            yield ok("mmap", "another process reads what was written")


def _differs(path: Path, content: bytes) -> int:
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        return int(view[:] != content)


def exclusive(folder: Path) -> Iterator[Line]:
    """Two processes create the same files, and each file must have one creator."""
    if not usable(folder):
        return
    with tempfile.TemporaryDirectory(prefix=".doctor_", dir=folder) as scratch:
        winners = [_status(child) for child in [_fork(lambda: _create_all(scratch)) for _ in range(2)]]
    if sum(winners) != ROUNDS:
        yield fail(
            "exclusive creation", f"{sum(winners)} creators of {ROUNDS} files", f"O_EXCL does not hold: {LOCAL_DISK}"
        )
    else:
        yield ok("exclusive creation", "one creator a file")


def _create_all(scratch: str) -> int:
    """Create the files in turn and return how many of them were new."""
    created = 0
    for index in range(ROUNDS):
        try:
            os.close(os.open(os.path.join(scratch, str(index)), os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            created += 1
        except FileExistsError:
            pass
    return created


def locks(folder: Path) -> Iterator[Line]:
    """Both kinds of locks must keep a second process out, and let it in afterwards."""
    if not usable(folder):
        return
    with tempfile.TemporaryDirectory(prefix=".doctor_", dir=folder) as scratch:
        path = Path(scratch, "lock")
        for what, lock in LOCKS.items():
            with open(path, "w") as file:
                try:
                    lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError as error:
                    yield warn(
                        what,
                        one_line(error),
                        "the Hugging Face caches need it: HF_HOME on a local disk; for Lustre: mount -o flock",
                    )
                    continue
                entered = _status(_fork(lambda lock=lock: try_lock(path, lock)))
                lock(file, fcntl.LOCK_UN)
                entered_later = _status(_fork(lambda lock=lock: try_lock(path, lock)))
            if entered or not entered_later:
                why = "two processes hold it at once" if entered else "it is not given back"
                yield fail(what, why, f"downloads and caches would be damaged: {LOCAL_DISK}")
            else:
                yield ok(what, "keeps a second process out")


def try_lock(path: Path, lock: Callable[[object, int], object]) -> int:
    """Return 1 if the lock can be had, 0 if somebody else has it."""
    with open(path, "r+") as file:
        try:
            lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return 0
    return 1


def space(folder: Path) -> Iterator[Line]:
    """Free space against the largest checkpoint in the folder: a save needs room before an old one is removed."""
    if not usable(folder):
        return
    free, largest = shutil.disk_usage(folder).free, largest_checkpoint(folder)
    if largest and free < largest:
        yield fail(
            "space", f"{_size(free)} free, a checkpoint takes {_size(largest)}", "free space: the next save would fail"
        )
    elif free < 2 * largest or (not largest and free < MIN_SPACE):
        why = f"a checkpoint takes {_size(largest)}" if largest else "tools/plan.py says what a checkpoint takes"
        yield warn("space", f"{_size(free)} free; {why}", "keep room for two checkpoints at least")
    else:
        yield ok("space", f"{_size(free)} free" + (f", a checkpoint takes {_size(largest)}" if largest else ""))
    inodes = os.statvfs(folder)
    if inodes.f_files and inodes.f_favail < MIN_INODES:
        yield warn("inodes", f"{inodes.f_favail} left", "remove small files: no new ones can be made soon")
    else:
        yield ok("inodes", f"{inodes.f_favail:,} left" if inodes.f_files else "not limited")


def largest_checkpoint(folder: Path) -> int:
    """Bytes of the largest checkpoint, RUN/iter_* or RUN/STAGE/iter_*; 0 without one."""
    saved = [*folder.glob("iter_*"), *folder.glob("*/iter_*")]
    return max((sum(path.stat().st_size for path in one.rglob("*") if path.is_file()) for one in saved), default=0)


def _size(size: int) -> str:
    return f"{size / GIB:,.1f} GiB" if size >= GIB / 10 else f"{size / (1 << 20):.1f} MiB"


def _fork(answer: Callable[[], int]) -> int:
    """Start a process that ends with a small number, 255 if it raises."""
    pid = os.fork()
    if not pid:
        status = 255
        try:
            status = answer()
        finally:
            os._exit(status)
    return pid


def _status(pid: int) -> int:
    return os.WEXITSTATUS(os.waitpid(pid, 0)[1])
