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

import os
import sys
from importlib.metadata import version

import torch

from hydra_mcore.compat import accelerators
from hydra_mcore.compat.patching import Patch, applied

__all__ = ["MEGATRON_VERSION", "Patch", "applied", "install", "is_cpu_only"]

MEGATRON_VERSION = "0.19.2"


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
    from hydra_mcore.compat import cpu, datasets, noise, optimizer, patching, reading, saving

    if not applied():
        noise.silence(is_cpu_only())
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


def _disable_compiler() -> None:
    """Run what Megatron wraps in torch.compile() as plain Python: compiling for the CPU takes minutes."""
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # read when torch._dynamo is first imported, here or in a child
    if "torch._dynamo" in sys.modules and os.environ["TORCHDYNAMO_DISABLE"] == "1":
        import torch._dynamo.config

        torch._dynamo.config.disable = True
