# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The machine: GPUs and what torch makes of them, CPUs, memory, limits."""

from __future__ import annotations

import os
import resource
import shutil
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tools.doctor_lines import GIB, Check, Line, answer_of, fail, ok, one_line, warn

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

SMI_FIELDS = (
    "name,compute_cap,driver_version,memory.total,memory.used,persistence_mode,ecc.mode.current,"
    "ecc.errors.uncorrected.volatile.total"
)
BF16_CAPABILITY = 8.0
RANK_MEMORY = 2 * GIB  # importing torch and Megatron takes 0.8 GB a rank
MIN_SHM = GIB  # NCCL and the workers of a DataLoader put their buffers there; containers start with 64 MB
MIN_FILES = 4096  # a rank holds a file open for every shard of a dataset and every peer


@dataclass(frozen=True)
class Gpu:
    """A GPU as the driver sees it; memory in MiB, ``ecc_errors`` since the driver was loaded; 0 where it is not
    counted.
    """

    name: str
    capability: str
    driver: str
    memory: int
    used: int
    persistence: bool
    ecc: str
    ecc_errors: int


def gpus() -> list[Gpu]:
    """The GPUs that the driver shows to this process.

    Raises:
        OSError: nvidia-smi is there and does not work.
    """
    if shutil.which("nvidia-smi") is None:
        return []
    rows = answer_of("nvidia-smi", f"--query-gpu={SMI_FIELDS}", "--format=csv,noheader,nounits").splitlines()
    found = []
    for row in filter(str.strip, rows):
        name, capability, driver, memory, used, persistence, ecc, errors = (cell.strip() for cell in row.split(","))
        found.append(
            Gpu(name, capability, driver, _count(memory), _count(used), persistence != "Disabled", ecc, _count(errors))
        )
    return found


def _count(cell: str) -> int:
    return int(cell) if cell.isdigit() else 0  # [N/A]: this GPU does not count it


def checks(found: Sequence[Gpu], problem: str) -> list[Check]:
    """The checks of the topics GPU and machine, given the GPUs found, or why they could not be asked for."""
    return [
        Check("GPU", "driver", lambda: driver(found, problem)),
        Check("GPU", "torch", lambda: torch_on(found)),
        Check("machine", "CPUs", cpus),
        Check("machine", "memory", memory),
        Check("machine", "/dev/shm", lambda: shared_memory("/dev/shm")),
        Check("machine", "limits", lambda: limits(os.path.isdir("/sys/class/infiniband"))),
    ]


def named(found: Sequence[Gpu]) -> str:
    """The GPUs of a node as ``8 x NVIDIA H200``."""
    return ", ".join(f"{number} x {name}" for name, number in Counter(gpu.name for gpu in found).items()) or "none"


def driver(found: Sequence[Gpu], problem: str) -> Iterator[Line]:
    """What nvidia-smi shows, and whether it is healthy and free."""
    promised = int(os.environ.get("SLURM_GPUS_ON_NODE", "0"))
    if problem:
        yield fail(
            "GPUs", f"nvidia-smi does not work: {problem}", "the driver is broken, or its mount into the container"
        )
    elif len(found) < promised:
        yield fail(
            "GPUs",
            f"{named(found)}, but SLURM gave {promised}",
            "start the container with its GPU hook, or take another node",
        )
    elif not found:
        yield ok("GPUs", "none")
    else:
        first = found[0]
        yield ok(
            "GPUs",
            f"{named(found)}, {first.memory / 1024:.0f} GiB, compute capability {first.capability}, driver"
            f" {first.driver}",
        )
    if busy := [str(index) for index, gpu in enumerate(found) if gpu.used > 2048]:
        yield warn(
            "GPU memory",
            f"in use already on GPU {', '.join(busy)}",
            "somebody else's process, or one left behind: nvidia-smi",
        )
    if ill := [str(index) for index, gpu in enumerate(found) if gpu.ecc_errors]:
        yield fail(
            "GPU memory",
            f"uncorrected ECC errors on GPU {', '.join(ill)}",
            "do not train on this node: have it drained",
        )
    if any(gpu.ecc == "Disabled" for gpu in found):
        yield warn(
            "GPU ECC", "disabled: a flipped bit would go unnoticed", "have it enabled: nvidia-smi -e 1 and a reboot"
        )
    if not all(gpu.persistence for gpu in found):
        yield warn(
            "GPU persistence", "off: the first use after a pause takes seconds", "have it enabled: nvidia-smi -pm 1"
        )


def torch_on(found: Sequence[Gpu]) -> Iterator[Line]:
    """Torch's CUDA build against the driver and the GPUs, one multiplication on each of them."""
    try:
        import torch
    except Exception as error:
        yield fail(
            "torch",
            f"does not load: {one_line(error)}",
            "pip install --force-reinstall torch, with the version of constraints.txt",
        )
        return
    build = f"{torch.__version__}, built for {f'CUDA {torch.version.cuda}' if torch.version.cuda else 'the CPU'}"
    if not torch.cuda.is_available():
        if found:
            yield fail(
                "torch",
                f"{build}, sees no GPU: {_why_no_cuda(torch)}",
                "a torch built for a CUDA that this driver knows",
            )
        else:
            yield ok("torch", build)
        return
    yield ok(
        "torch",
        f"{build}, cuDNN {torch.backends.cudnn.version()}, NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}",
    )
    built_for = {arch.split("_")[1].rstrip("af") for arch in torch.cuda.get_arch_list()}
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        what = f"GPU {index}"
        if major not in {int(arch) // 10 for arch in built_for}:
            yield fail(
                what,
                f"compute capability {major}.{minor}: torch is built for {', '.join(sorted(built_for))}",
                "another build of torch",
            )
            continue
        ones = torch.ones(
            1024, 1024, dtype=torch.bfloat16 if major >= BF16_CAPABILITY else torch.float16, device=f"cuda:{index}"
        )
        if not bool((ones @ ones == 1024).all()):
            yield fail(what, "multiplies wrongly", "do not train on this node: have it drained")
        elif major < BF16_CAPABILITY:
            yield warn(
                what,
                f"compute capability {major}.{minor} has no bfloat16",
                "use --fp16 in place of --bf16 in the recipe",
            )
        else:
            yield ok(what, "multiplies rightly in bfloat16")


def _why_no_cuda(torch: object) -> str:
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0") == "":
        return "CUDA_VISIBLE_DEVICES is empty"
    try:
        torch.cuda.init()
    except Exception as error:
        return one_line(error)
    return "no reason given"


def cpus() -> Iterator[Line]:
    """CPUs that this process may use, against OMP_NUM_THREADS for each of the node's ranks."""
    usable = len(os.sched_getaffinity(0))
    threads = os.environ.get("OMP_NUM_THREADS")
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if threads is None:
        yield ok("CPUs", f"{usable}; OMP_NUM_THREADS unset: torchrun makes it 1 for several ranks")
    elif not threads.isdigit() or not int(threads):
        yield warn("CPUs", f"{usable}; OMP_NUM_THREADS={threads!r} is no number of threads", "export OMP_NUM_THREADS=1")
    elif int(threads) * ranks > usable:
        mend = f"export OMP_NUM_THREADS={max(1, usable // ranks)}, or ask SLURM for more: --cpus-per-task"
        yield warn("CPUs", f"{usable} for {ranks} x OMP_NUM_THREADS={threads}: they wait for each other", mend)
    else:
        yield ok("CPUs", f"{usable}; OMP_NUM_THREADS={threads}")


def memory(meminfo: str = "/proc/meminfo") -> Iterator[Line]:
    with open(meminfo, encoding="ascii") as lines:
        kib = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
    total, free = kib["MemTotal"] * 1024, kib["MemAvailable"] * 1024
    if free < RANK_MEMORY:
        yield warn(
            "memory",
            f"{free / GIB:.1f} of {total / GIB:.0f} GiB free",
            "a rank takes 1 GiB before it has a model: free some",
        )
    else:
        yield ok("memory", f"{free / GIB:.0f} of {total / GIB:.0f} GiB free")


def shared_memory(folder: str) -> Iterator[Line]:
    if not os.path.isdir(folder):
        yield fail(
            "/dev/shm",
            "missing: NCCL and data workers need it",
            "mount a tmpfs there; in containers: --shm-size=16g or --ipc=host",
        )
        return
    space = shutil.disk_usage(folder)
    if space.free < MIN_SHM:
        found = f"{space.free / GIB:.2f} of {space.total / GIB:.2f} GiB free"
        yield warn("/dev/shm", found, "in containers: --shm-size=16g or --ipc=host; else remove what was left in it")
    else:
        yield ok("/dev/shm", f"{space.free / GIB:.0f} of {space.total / GIB:.0f} GiB free")


def limits(infiniband: bool) -> Iterator[Line]:
    """Open files, and memory that may be locked, which InfiniBand needs."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < MIN_FILES:
        able = hard == resource.RLIM_INFINITY or hard >= MIN_FILES
        mend = f"ulimit -n {MIN_FILES if able else 'unlimited, by an administrator'}, in slurm/env.sh for jobs"
        yield warn("open files", f"at most {soft}", mend)
    else:
        yield ok("open files", f"at most {_size(soft)}")
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if infiniband and soft != resource.RLIM_INFINITY:
        mend = (
            "ulimit -l unlimited; under SLURM: LimitMEMLOCK=infinity for slurmd, PropagateResourceLimitsExcept=MEMLOCK"
        )
        yield fail("locked memory", f"at most {soft >> 10} KiB: NCCL cannot use InfiniBand", mend)
    else:
        yield ok(
            "locked memory",
            "unlimited" if soft == resource.RLIM_INFINITY else f"at most {soft >> 10} KiB; no InfiniBand here",
        )


def _size(limit: int) -> str:
    return "any number" if limit == resource.RLIM_INFINITY else str(limit)
