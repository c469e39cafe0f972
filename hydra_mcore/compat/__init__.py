# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The only code that knows where the pinned Megatron-Core assumes a GPU, Transformer Engine or Apex.

Importing this package changes nothing.  ``install()`` does, and only what this machine needs.  It first decides whether
Transformer Engine and Apex are used (``accelerators.py``):

==============  ==================================  ============================================
group           installed when                      fixes
==============  ==================================  ============================================
``datasets``    the package has no Makefile (wheel) ``make`` is run for helpers that are there
``optimizer``   always                              saving and resuming the distributed optimizer
``saving``      always                              kills, signals and failures during a save
``reading``     always                              checkpoints that are damaged, or made to run code
``cpu``         torch sees no GPU                   CUDA calls, device names, generators
==============  ==================================  ============================================
"""

import logging
import os
import sys
import warnings
from importlib.metadata import version

import torch

from hydra_mcore.compat import accelerators
from hydra_mcore.compat.patching import Patch, applied

__all__ = ["MEGATRON_VERSION", "Patch", "applied", "install", "is_cpu_only"]

MEGATRON_VERSION = "0.19.2"

# Said at import, at loading, or while training on every machine without TE and Apex; no user can act on them.
_NOISE = (
    r".*Apex (is|are) not installed",
    r"Only transformer-engine>=1\.7\.0 supports MoE",
    # each rank loads by itself:
    r"torch\.distributed is disabled, unavailable or uninitialized, assuming the intent is to load",
)


def is_cpu_only() -> bool:
    """Tell whether torch sees no GPU, so that tensors live on the CPU and the network is gloo."""
    return not torch.cuda.is_available()


def install() -> tuple[Patch, ...]:
    """Put in place the patches this machine needs; calling it again changes nothing.

    Megatron-Core is imported here.  Where Transformer Engine or Apex is installed, it must not have been imported
    before: it decides at its import what it takes from them.

    Returns:
        The patches in place.

    Raises:
        RuntimeError: the installed megatron-core is not the version the patches were written for.
        InputError: there is a GPU, and a Transformer Engine that cannot be used.
    """
    found = version("megatron-core")
    if found != MEGATRON_VERSION:
        raise RuntimeError(f"hydra_mcore needs megatron-core {MEGATRON_VERSION}, found {found}: pip install -e .")
    accelerators.choose(is_cpu_only())
    # Here and not at the top: importing this package must stay free of side effects.
    from hydra_mcore.compat import cpu, datasets, optimizer, patching, reading, saving

    _quiet()
    if is_cpu_only():
        _disable_compiler()
        cpu.prepare()
        patching.apply(cpu.PATCHES)
    if datasets.needed():
        patching.apply(datasets.PATCHES)
    patching.apply(datasets.INDEX_PATCHES)
    patching.apply(optimizer.PATCHES)
    patching.apply(saving.PATCHES)
    patching.apply(reading.PATCHES)
    return applied()


def _quiet() -> None:
    """Silence, once, what Megatron-Core says to everybody without a GPU, TE or Apex."""
    if applied():
        return
    for message in _NOISE:
        warnings.filterwarnings("ignore", message=message)
    if is_cpu_only():
        logging.getLogger("torch.utils.cpp_extension").addFilter(_NotAbout("No CUDA runtime is found"))
        # The two generators it compares are one here.
        logging.getLogger("megatron.core.tensor_parallel.random").addFilter(_NotAbout("CPU RNG state changed"))


class _NotAbout(logging.Filter):
    """Drops the log records that start with a text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self.text)


def _disable_compiler() -> None:
    """Run what Megatron wraps in torch.compile() as plain Python: compiling for the CPU takes minutes."""
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # read when torch._dynamo is first imported, here or in a child
    if "torch._dynamo" in sys.modules and os.environ["TORCHDYNAMO_DISABLE"] == "1":
        import torch._dynamo.config

        torch._dynamo.config.disable = True
