# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Stand in for a GPU: Triton and flash-linear-attention compile for it, and nothing runs on it.

Triton asks a driver for which GPU to compile. Here the driver is a stand-in that names one. Every launch becomes a
compilation, with the signature, the constants and the alignment that the launch had. The tuner's trial runs compile
too. Tensors live on the CPU and are never read by a kernel, so their values mean nothing.
"""

from __future__ import annotations

import itertools
import math
import re
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

# NVIDIA's limits, the same for compute capability 9.0 and 10.0
SHARED_BYTES = 227 * 1024  # of a block
REGISTERS = 65536  # of a block
TENSOR_MEMORY_COLUMNS = 512


@dataclass(frozen=True)
class Needs:
    """What a compiled kernel needs of a GPU."""

    warps: int
    stages: int
    registers: int  # a thread
    shared: int  # bytes a block
    spilled: int  # bytes a thread of memory beside registers
    tensor_memory: int  # columns

    @property
    def fits(self) -> bool:
        """Whether a GPU can launch it."""
        registers = self.registers * self.warps * 32
        return self.shared <= SHARED_BYTES and registers <= REGISTERS and self.tensor_memory <= TENSOR_MEMORY_COLUMNS

    @property
    def cost(self) -> float:
        """What the tuner is told instead of a time."""
        return self.spilled if self.fits else math.inf


@dataclass(frozen=True)
class Compiled:
    """A kernel that a call launched (``chosen``), or that the tuner tried."""

    kernel: str
    caller: str
    shape: str
    chosen: bool
    binary: str  # its hash
    needs: Needs


class Compiler:
    """Takes the place of this process's GPU, for good; to be made before flash-linear-attention is imported.

    Args:
        capability: of the GPU, times ten: 90 or 100.
    """

    def __init__(self, capability: int) -> None:
        self.compiled: list[Compiled] = []
        self._capability, self._tuning, self._best = capability, False, math.inf
        # What the tuner's next configurations are but for their pipeline stages, and which of these fit.
        self._pending: Iterator[str] = iter(())
        self._fitting: set[str] = set()
        self._caller = self._shape = ""
        self._needs: dict[str, Needs] = {}
        self._tuners: set[Autotuner] = set()
        triton.runtime.driver.set_active(self)
        torch.cuda.get_device_capability = lambda device=0: divmod(capability, 10)
        torch.cuda.get_device_name = lambda device=0: f"a GPU of compute capability {capability / 10}"
        torch.cuda.device_count = lambda: 1
        self._catch_launches()
        self._catch_tuning()

    def compile(self, caller: str, shape: str, function: Callable[[], object]) -> None:
        """Compile every kernel that the function launches, and note who called and for which shape."""
        self._caller, self._shape = caller, shape
        for tuner in self._tuners:
            tuner.cache.clear()  # each call is tuned for itself, in whatever order they come
        function()

    # What Triton asks of a driver.

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_benchmarker(self) -> Callable[..., list[float]]:
        return self._try

    @property
    def utils(self) -> Compiler:
        return self

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED_BYTES, "multiprocessor_count": 132}

    # What becomes of launches.

    def _try(self, launch: Callable[[], object], quantiles: object = None) -> list[float]:
        """Compile one of a tuner's configurations, unless one before it is as good as can be, or differs from it in
        pipeline stages alone and fits.
        """
        cost, distinct = math.inf, next(self._pending)
        if self._best > 0 and distinct not in self._fitting:
            self._tuning = True
            try:
                launch()
                needed = self.compiled[-1].needs
                cost = needed.cost
                if needed.fits:
                    self._fitting.add(distinct)
            finally:
                self._tuning = False
            self._best = min(self._best, cost)
        return [cost] * 3

    def _catch_launches(self) -> None:
        launch = JITFunction.run

        def compile_only(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
            compiled = launch(kernel, *args, grid=grid, warmup=True, **options)
            if compiled.hash not in self._needs:
                self._needs[compiled.hash] = needs(compiled)
            needed = self._needs[compiled.hash]
            self.compiled.append(
                Compiled(compiled.name, self._caller, self._shape, not self._tuning, compiled.hash, needed)
            )
            return compiled

        JITFunction.run = compile_only

    def _catch_tuning(self) -> None:
        prune = Autotuner.prune_configs

        def begin(tuner: Autotuner, arguments: dict[str, Any]) -> list[triton.Config]:
            self._best = math.inf
            self._tuners.add(tuner)
            alike: dict[str, list[triton.Config]] = defaultdict(list)
            for config in prune(tuner, arguments):
                alike[f"{config.kwargs} {config.num_warps}"].append(config)
            self._pending = itertools.chain.from_iterable([name] * len(those) for name, those in alike.items())
            self._fitting = set()
            return list(itertools.chain.from_iterable(alike.values()))

        Autotuner.prune_configs = begin


def needs(compiled: Any) -> Needs:
    """Read what a compiled kernel needs, from Triton's description and from the binary itself."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.kernel)
        file.flush()
        tool = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        said = subprocess.run(tool, check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", said)
    registers, stack, local = map(int, found.groups())
    about = compiled.metadata
    return Needs(about.num_warps, about.num_stages, registers, about.shared, stack + local, about.tmem_size or 0)
