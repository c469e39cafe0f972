# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Compile every Triton kernel that training, evaluation and decoding call, on a machine without a GPU."""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import itertools
import multiprocessing
import os
import sys
import tempfile
import traceback
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from hydra_mcore.errors import InputError, first_line
from hydra_mcore.model.precision import DTYPES
from tools.benchmarks.kernel_compiler import SHARED_BYTES, Compiled, Compiler, Needs
from tools.benchmarks.report import Report
from tools.benchmarks.shapes import CAPABILITIES

BESIDE = Path(__file__).resolve().parents[2] / ".venv" / "kernels"  # where make env puts the package
NOTES = (
    "In each cell: registers a thread / KiB of shared memory a block / bytes a thread of memory beside registers, if"
    " any, the largest of all calls. Limits: 255 and {shared}. Where a kernel has several configurations, the first"
    " counts that needs no such memory, else the one that needs the least; those that differ in pipeline stages alone"
    " are one, if it fits. A GPU takes the fastest, which may be another. {versions}."
)
COUNTS = "{binaries} binaries, of which {tried} were only tried and {misfits} fit not."


class Found(NamedTuple):
    """What was compiled for a GPU, and the calls that ended in an error, a line each."""

    gpu: str
    compiled: list[Compiled]
    failed: list[str]


def run(args: argparse.Namespace) -> Report:
    """A process for each GPU, since flash-linear-attention looks at the GPU once, when it is imported.

    Raises:
        InputError: flash-linear-attention is not installed.
    """
    with _environment():
        pool = concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1)
        with pool:
            results = [pool.submit(compile_for, gpu, args) for gpu in args.gpus]
            found = [result.result() for result in results]
        versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("fla-core", "triton"))
    return report(found, versions)


def compile_for(gpu: str, args: argparse.Namespace) -> Found:
    """Compile what the flags name for one GPU; this process is of no other use then."""
    warnings.filterwarnings("ignore")  # of packages that this process does not use
    compiler, failed = Compiler(CAPABILITIES[gpu]), []
    from tools.benchmarks.kernel_calls import calls  # it imports what must find the compiler

    for kind, head_dim, dtype in itertools.product(args.calls, args.head_dims, args.dtypes):
        shape = f"{head_dim}, {dtype}"
        print(f"{gpu}: {kind}, {shape}", file=sys.stderr, flush=True)
        for name, call in calls(kind, head_dim, DTYPES[dtype], not args.forward):
            try:
                compiler.compile(kind, shape, call)
            except Exception as error:  # whatever a compiler raises: the other kernels are still of interest
                traceback.print_exc()
                failed.append(f"{gpu}: {kind}, {shape}, {name}: {first_line(error)}")
    return Found(gpu, compiler.compiled, failed)


def report(found: Sequence[Found], versions: str) -> Report:
    """A table for each GPU; a failure where a call ended in an error or a kernel fits not."""
    notes = NOTES.format(shared=SHARED_BYTES // 1024, versions=versions)
    first, *others = (_table(each, notes if each is found[0] else "") for each in found)
    failures = []
    for each in found:
        failures += each.failed
        failures += [f"{each.gpu}: {kernel} fits not" for kernel in _misfits(each)]
    return dataclasses.replace(first, more=others, failure="; ".join(failures))


def _misfits(found: Found) -> list[str]:
    """Kernels that a call would launch and the GPU cannot."""
    return sorted({each.kernel for each in found.compiled if each.chosen and not each.needs.fits})


def _table(found: Found, notes: str) -> Report:
    """A row for each kernel, a column for each shape."""
    cells: dict[str, dict[str, list[Needs]]] = defaultdict(lambda: defaultdict(list))
    callers: dict[str, set[str]] = defaultdict(set)
    shapes: dict[str, None] = {}  # in the order of the flags
    for each in found.compiled:
        shapes[each.shape] = None
        if each.chosen:
            cells[each.kernel][each.shape].append(each.needs)
            callers[each.kernel].add(each.caller)
    rows = [
        [kernel, ", ".join(sorted(callers[kernel])), *(_cell(cells[kernel][shape]) for shape in shapes)]
        for kernel in sorted(cells, key=lambda kernel: sorted(callers[kernel]))
    ]
    binaries = {each.binary: each.needs for each in found.compiled}
    launched = {each.binary for each in found.compiled if each.chosen}
    counts = COUNTS.format(
        binaries=len(binaries),
        tried=len(binaries.keys() - launched),
        misfits=sum(not needs.fits for needs in binaries.values()),
    )
    return Report(
        f"Kernels compiled for {found.gpu}", f"{notes} {counts}".strip(), ("kernel", "called by", *shapes), rows
    )


def _cell(needs: Sequence[Needs]) -> str:
    if not needs:
        return "-"
    spilled = max(each.spilled for each in needs)
    shared = max(each.shared for each in needs) / 1024
    return f"{max(each.registers for each in needs)} / {shared:.1f}" + (f" / {spilled}" if spilled else "")


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    """For the processes that compile: where the package is, and a cache that is gone afterwards."""
    before = os.environ.copy(), list(sys.path)
    with tempfile.TemporaryDirectory(prefix="kernels_") as cache:
        os.environ.update(TRITON_CACHE_DIR=cache, FLA_CACHE_RESULTS="0", OMP_NUM_THREADS="1")
        try:
            if importlib.util.find_spec("fla") is None:
                sys.path.append(str(BESIDE))  # behind all others: what .venv has counts first
                importlib.invalidate_caches()
            if importlib.util.find_spec("fla") is None:
                raise InputError("no flash-linear-attention: make env, or pip install -e .[kernels]")
            yield
        finally:
            os.environ.clear()
            os.environ.update(before[0])
            sys.path[:] = before[1]
