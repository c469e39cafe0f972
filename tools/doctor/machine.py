# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The machine: GPUs and what torch makes of them, CPUs, memory, limits."""

import os
import resource
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tools.doctor.lines import GIB, Line, answer_of, fail, ok, one_line, warn

SMI_FIELDS = "name,compute_cap,driver_version,memory.total,memory.used,ecc.errors.uncorrected.volatile.total"
BF16_CAPABILITY = 8.0
RANK_MEMORY = 2 * GIB  # importing torch and Megatron takes 0.8 GB a rank
MIN_SHM = GIB  # NCCL and the workers of a DataLoader put their buffers there; containers start with 64 MB
MIN_FILES = 4096  # a rank holds a file open for every shard of a dataset and every peer
BUSY_MIB = 2048
DRAIN = "do not train on this node: have it drained"


@dataclass(frozen=True)
class Gpu:
    """A GPU as the driver sees it; memory in MiB, uncorrected ECC errors since the driver was loaded, 0 if not told."""

    name: str
    capability: str
    driver: str
    memory: int
    used: int
    ecc_errors: int


def gpus() -> list[Gpu]:
    """The GPUs that the driver shows to this process.

    Raises:
        OSError: nvidia-smi is there and does not work.
    """
    if shutil.which("nvidia-smi") is None:
        return []
    rows = answer_of("nvidia-smi", f"--query-gpu={SMI_FIELDS}", "--format=csv,noheader,nounits").splitlines()
    cells = [[cell.strip() for cell in row.split(",")] for row in rows if row.strip()]
    return [Gpu(name, capability, driver, *map(_count, counts)) for name, capability, driver, *counts in cells]


def _count(cell: str) -> int:
    return int(cell) if cell.isdigit() else 0  # [N/A]: this GPU does not count it


def named(found: Sequence[Gpu]) -> str:
    """The GPUs of a node as ``8 x NVIDIA H200``."""
    return ", ".join(f"{number} x {name}" for name, number in Counter(gpu.name for gpu in found).items()) or "none"


def driver(found: Sequence[Gpu], problem: str) -> Iterator[Line]:
    """What nvidia-smi shows, and whether it is healthy and free."""
    promised = int(os.environ.get("SLURM_GPUS_ON_NODE", "0"))
    if problem:
        fix = "the driver is broken, or its mount into the container"
        yield fail("GPUs", f"nvidia-smi does not work: {problem}", fix)
    elif len(found) < promised:
        fix = "start the container with its GPU hook, or take another node"
        yield fail("GPUs", f"{named(found)}, but SLURM gave {promised}", fix)
    elif not found:
        yield ok("GPUs", "none")
    else:
        about = f"{found[0].memory / 1024:.0f} GiB, compute capability {found[0].capability}, driver {found[0].driver}"
        yield ok("GPUs", f"{named(found)}, {about}")
    if busy := [str(index) for index, gpu in enumerate(found) if gpu.used > BUSY_MIB]:
        fix = "somebody else's process, or one left behind: nvidia-smi"
        yield warn("GPU memory", f"in use already on GPU {', '.join(busy)}", fix)
    if ill := [str(index) for index, gpu in enumerate(found) if gpu.ecc_errors]:
        yield fail("GPU memory", f"uncorrected ECC errors on GPU {', '.join(ill)}", DRAIN)


def torch_on(found: Sequence[Gpu]) -> Iterator[Line]:
    """Torch's CUDA build against the driver and the GPUs, one multiplication on each of them."""
    try:
        import torch
    except Exception as error:
        fix = "pip install --force-reinstall torch, with the version of constraints.txt"
        yield fail("torch", f"does not load: {one_line(error)}", fix)
        return
    build = f"{torch.__version__}, built for {f'CUDA {torch.version.cuda}' if torch.version.cuda else 'the CPU'}"
    if not torch.cuda.is_available():
        unseen = f"{build}, sees no GPU: {_why_no_cuda(torch)}"
        yield fail("torch", unseen, "a torch built for a CUDA that this driver knows") if found else ok("torch", build)
        return
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    yield ok("torch", f"{build}, cuDNN {torch.backends.cudnn.version()}, NCCL {nccl}")
    built_for = {arch.split("_")[1].rstrip("af") for arch in torch.cuda.get_arch_list()}
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        what, capability = f"GPU {index}", f"compute capability {major}.{minor}"
        if major not in {int(arch) // 10 for arch in built_for}:
            found_here = f"{capability}: torch is built for {', '.join(sorted(built_for))}"
            yield fail(what, found_here, "another build of torch")
            continue
        dtype = torch.bfloat16 if major >= BF16_CAPABILITY else torch.float16
        ones = torch.ones(1024, 1024, dtype=dtype, device=f"cuda:{index}")
        if not bool((ones @ ones == 1024).all()):
            yield fail(what, "multiplies wrongly", DRAIN)
        elif major < BF16_CAPABILITY:
            yield warn(what, f"{capability} has no bfloat16", "train in float32: take bf16 out of the recipe")
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
    threads, ranks = os.environ.get("OMP_NUM_THREADS", "unset"), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if threads.isdigit() and int(threads) * ranks > usable:
        fix = f"export OMP_NUM_THREADS={max(1, usable // ranks)}, or ask SLURM for more: --cpus-per-task"
        yield warn("CPUs", f"{usable} for {ranks} x OMP_NUM_THREADS={threads}: they wait for each other", fix)
    else:
        yield ok("CPUs", f"{usable}; OMP_NUM_THREADS {threads}")


def memory(meminfo: str = "/proc/meminfo") -> Iterator[Line]:
    with open(meminfo, encoding="ascii") as lines:
        kib = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
    total, free = kib["MemTotal"] * 1024, kib["MemAvailable"] * 1024
    found = f"{free / GIB:.1f} of {total / GIB:.0f} GiB free"
    enough = free >= RANK_MEMORY
    yield ok("memory", found) if enough else warn("memory", found, "a rank takes 1 GiB before it has a model")


def shared_memory(folder: str = "/dev/shm") -> Iterator[Line]:
    fix = "in containers: --shm-size=16g or --ipc=host"
    if not os.path.isdir(folder):
        yield fail("/dev/shm", "missing: NCCL and data workers need it", f"mount a tmpfs there; {fix}")
        return
    space = shutil.disk_usage(folder)
    found = f"{space.free / GIB:.2f} of {space.total / GIB:.2f} GiB free"
    enough = space.free >= MIN_SHM
    yield ok("/dev/shm", found) if enough else warn("/dev/shm", found, f"{fix}; else remove what was left in it")


def limits(infiniband: bool = os.path.isdir("/sys/class/infiniband")) -> Iterator[Line]:
    """Open files, and memory that may be locked, which InfiniBand needs."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < MIN_FILES:
        able = hard == resource.RLIM_INFINITY or hard >= MIN_FILES
        fix = f"ulimit -n {MIN_FILES if able else 'unlimited, by an administrator'}, in slurm/env.sh for jobs"
        yield warn("open files", f"at most {soft}", fix)
    else:
        yield ok("open files", "any number" if soft == resource.RLIM_INFINITY else f"at most {soft}")
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if not infiniband:
        yield ok("locked memory", "no InfiniBand here")
    elif soft != resource.RLIM_INFINITY:
        fix = "ulimit -l unlimited; SLURM: LimitMEMLOCK=infinity for slurmd, PropagateResourceLimitsExcept=MEMLOCK"
        yield fail("locked memory", f"at most {soft >> 10} KiB: NCCL cannot use InfiniBand", fix)
    else:
        yield ok("locked memory", "unlimited")
