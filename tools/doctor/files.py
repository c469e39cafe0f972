# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""What a run folder's filesystem does: renames, locks, fsync, mmap, and how much fits into it."""

import errno
import fcntl
import mmap
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tools.doctor.lines import GIB, Line, fail, ok, one_line, warn

BLOCK = 16 << 20
MIN_SPACE = 20 * GIB
LOCKS = {"flock": fcntl.flock, "fcntl lock": fcntl.lockf}  # of the Hugging Face caches, of commands.sole_writer
FLEETING = {"tmpfs": "the machine's memory", "ramfs": "the machine's memory", "overlay": "the container"}
LOCAL_DISK = "keep run folders on another filesystem, and HF_HOME on a local disk"
REFUSED_WRITES = {
    errno.ENOSPC: "free space, or another folder",
    errno.EDQUOT: "your quota is used up",
    errno.EFBIG: "ulimit -f unlimited",
}


def usable(folder: Path) -> bool:
    """Whether there is a folder to try things in; ``run_folder`` says why not."""
    return os.path.isdir(folder) and os.access(folder, os.W_OK | os.X_OK)  # pathlib's raises below a closed folder


def scratch_in(folder: Path) -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix=".doctor_", dir=folder)


def run_folder(folder: Path, mounts: Path = Path("/proc/mounts")) -> Iterator[Line]:
    if not os.path.isdir(folder):
        fix = f"mkdir -p {folder}, on a filesystem that all nodes share"
        yield fail("run folder", f"{folder}: no such folder", fix)
        return
    if not usable(folder):
        yield fail("run folder", f"{folder}: not writable", "choose a folder of yours, or have its permissions changed")
        return
    kinds = {place: kind for _, place, kind, *_ in map(str.split, mounts.read_text(encoding="utf-8").splitlines())}
    real = folder.resolve()
    kind = next((kinds[str(place)] for place in (real, *real.parents) if str(place) in kinds), "unknown")
    if kind in FLEETING:
        yield warn("run folder", f"{folder} ({kind}): ends with {FLEETING[kind]}", "put run folders on a disk")
    else:
        yield ok("run folder", f"{folder} ({kind})")


def renames(folder: Path) -> Iterator[Line]:
    """Files are renamed over older ones, and checkpoints are moved into place whole."""
    with scratch_in(folder) as scratch:
        old, new = Path(scratch, "old"), Path(scratch, "new")
        try:
            for name in ("first", "second"):
                old.write_text(name)
                os.replace(old, new)
            seen = new.read_text()
            (old / "inside").mkdir(parents=True)
            os.rename(old, Path(scratch, "moved"))
        except OSError as error:
            yield fail("rename", one_line(error), LOCAL_DISK)
            return
    if seen == "second":
        yield ok("rename", "of a file over another, and of a folder")
    else:
        yield fail("rename", "the older of two files is read", LOCAL_DISK)


def writes(folder: Path) -> Iterator[Line]:
    """A block is written, made durable, and read back through mmap, as datasets are."""
    with scratch_in(folder) as scratch:
        path, content = Path(scratch, "block"), os.urandom(1 << 20) * (BLOCK >> 20)
        start = time.monotonic()
        try:
            with open(path, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            yield fail("write and fsync", one_line(error), REFUSED_WRITES.get(error.errno, LOCAL_DISK))
            return
        yield ok("write and fsync", f"{BLOCK >> 20} MiB in {time.monotonic() - start:.2f} s")
        fix = f"datasets are read through mmap: {LOCAL_DISK}"
        try:
            with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
                same = view[:] == content
        except OSError as error:
            yield fail("mmap", one_line(error), fix)
        else:
            yield ok("mmap", "reads what was written") if same else fail("mmap", "reads differ", fix)


def locks(folder: Path) -> Iterator[Line]:
    """Both kinds of locks must keep a second process out."""
    with scratch_in(folder) as scratch:
        path = Path(scratch, "lock")
        for what, lock in LOCKS.items():
            with open(path, "w") as file:
                try:
                    lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError as error:
                    fix = "nothing stops a second run in a folder; HF_HOME on a local disk; for Lustre: mount -o flock"
                    yield warn(what, one_line(error), fix)
                    continue
                entered = _entered(path, lock)
            if entered:
                fix = f"downloads, caches and runs would be damaged: {LOCAL_DISK}"
                yield fail(what, "two processes hold it at once", fix)
            else:
                yield ok(what, "keeps a second process out")


def _entered(path: Path, lock: Callable[[object, int], object]) -> bool:
    """Whether another process can have the lock too."""
    pid = os.fork()
    if not pid:
        entered = 1
        try:
            entered = try_lock(path, lock)
        finally:
            os._exit(entered)
    return os.waitpid(pid, 0)[1] != 0


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
    free, largest = shutil.disk_usage(folder).free, largest_checkpoint(folder)
    takes = f"a checkpoint takes {_size(largest)}" if largest else "tools/plan.py says what a checkpoint takes"
    found = f"{_size(free)} free; {takes}"
    if largest and free < largest:
        yield fail("space", found, "free space: the next save would fail")
    elif free < (2 * largest or MIN_SPACE):
        yield warn("space", found, "keep room for two checkpoints at least")
    else:
        yield ok("space", found)


def largest_checkpoint(folder: Path) -> int:
    """Bytes of the largest checkpoint, RUN/iter_* or RUN/STAGE/iter_*; 0 without one."""
    saved = [*folder.glob("iter_*"), *folder.glob("*/iter_*")]
    return max((sum(path.stat().st_size for path in one.rglob("*") if path.is_file()) for one in saved), default=0)


def _size(size: int) -> str:
    return f"{size / GIB:,.1f} GiB" if size >= GIB / 10 else f"{size / (1 << 20):.1f} MiB"


STEPS = (renames, writes, locks, space)  # the checks of a folder that can be written
