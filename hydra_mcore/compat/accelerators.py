# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Whether Transformer Engine (TE) and NVIDIA's Apex are used: the one place that decides, before Megatron-Core is
imported.

Megatron-Core takes both where they are, and catches ImportError only.  On a CPU their kernels fail at the first
optimizer step.  A half installation raises other errors, or it loads and fails when an optimizer is built.  So:

===========================  =====================  ==========================================
found                        without a GPU          with a GPU (not yet run on one)
===========================  =====================  ==========================================
Transformer Engine           hidden                 used; an error if it does not load
NVIDIA's Apex                hidden                 used; hidden with a line if it does not load
another package named apex   hidden                 hidden with a line
===========================  =====================  ==========================================

It imports neither torch nor Megatron-Core by itself.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import re
import sys
import warnings
from pathlib import Path

from packaging.version import Version

from hydra_mcore.commands import first_of_machine
from hydra_mcore.errors import MachineError, first_line

OLDEST_TE = "2.19"  # setup.py asks for the same
TE = ("transformer_engine", "transformer_engine_torch")
APEX = ("apex", "amp_C", "fused_weight_gradient_mlp_cuda")  # Megatron-Core imports its compiled parts by themselves

_WITHOUT_TE = "or go on without it: pip uninstall transformer-engine"
_NOT_NVIDIAS = "pip uninstall apex; NVIDIA's comes from github.com/NVIDIA/apex"
_REBUILD_APEX = "build it for this torch with APEX_CPP_EXT=1 APEX_CUDA_EXT=1, or pip uninstall apex"
# The packages with the CUDA libraries that TE opens by itself: named for CUDA 13, for CUDA 12.
_LIBRARIES = {
    "curand": ("nvidia-curand", "nvidia-curand-cu12"),
    "cudnn": ("nvidia-cudnn-cu13", "nvidia-cudnn-cu12"),
    "nvrtc": ("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12"),
    "cublas": ("nvidia-cublas", "nvidia-cublas-cu12"),
    "cudart": ("nvidia-cuda-runtime", "nvidia-cuda-runtime-cu12"),
}


class Unusable(MachineError):
    """An installation that cannot be used.

    Attributes:
        found: what is wrong with it.
        fix: what helps.
    """

    def __init__(self, found: str, fix: str) -> None:
        super().__init__(f"{found}: {fix}")
        self.found = found
        self.fix = fix


def choose(on_cpu: bool) -> None:
    """Hide what cannot be used, import what is used; calling it again changes nothing.

    Args:
        on_cpu: torch sees no GPU.

    Raises:
        Unusable: a GPU, and a Transformer Engine that is too old or does not load.  Going on without it would be
            slower than what its owner expects, and nobody would notice.
    """
    if on_cpu:
        for names in (TE, APEX):
            # Whoever loaded it by now wants it: tests run TE's own Python on a CPU, with stand-ins for its kernels.
            if sys.modules.get(names[0]) is None:
                _hide(names)
        return
    if transformer_engine() is None:
        _hide(TE)  # a folder that an uninstallation left behind can be imported too
    try:
        nvidia_apex()
    except Unusable as unusable:
        _hide(APEX)
        if first_of_machine():
            print(f"Apex is not used: {unusable}", file=sys.stderr, flush=True)


def transformer_engine() -> str | None:
    """Import Transformer Engine for torch and return its version; None if it is not installed.

    Raises:
        Unusable: it is too old, or does not load.
    """
    spec = importlib.util.find_spec(TE[0])
    if spec is None or spec.origin is None:
        return None
    try:
        version = importlib.metadata.version("transformer-engine")
        old = Version(version).release < Version(OLDEST_TE).release  # 2.19.0.dev0 and 2.19.0+5be0a1f count as 2.19.0
        if not old:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it warns of a missing extension for torch; the import raises then
                importlib.import_module("transformer_engine.pytorch")
    except Exception as error:  # seen: AssertionError, FileNotFoundError, ImportError, OSError, RuntimeError
        found = f"Transformer Engine does not load ({first_line(error).rstrip('.')})"
        raise Unusable(found, f"{_fix(error)}; {_WITHOUT_TE}") from error
    if old:
        found = f"Transformer Engine {version} is too old, >={OLDEST_TE} is needed"
        raise Unusable(found, f"{_install(f'>={OLDEST_TE}')}; {_WITHOUT_TE}")
    return version


def nvidia_apex() -> bool:
    """Import NVIDIA's Apex and tell whether it is there.

    Raises:
        Unusable: another package has its name, or it does not load.
    """
    spec = importlib.util.find_spec(APEX[0])
    if spec is None:
        return False
    places = list(spec.submodule_search_locations or [spec.origin])
    if not any(Path(place, "optimizers", "fused_adam.py").exists() for place in places):
        raise Unusable(f"{places[0]} is not NVIDIA's Apex", _NOT_NVIDIAS)
    try:
        for module in ("amp_C", "apex.multi_tensor_apply", "apex.optimizers"):
            importlib.import_module(module)
    except Exception as error:
        raise Unusable(f"NVIDIA's Apex does not load ({first_line(error)})", _REBUILD_APEX) from error
    return True


def _hide(names: tuple[str, ...]) -> None:
    """Let every import of these packages, and of what is inside, raise ImportError."""
    inside = [loaded for loaded in sys.modules if loaded.partition(".")[0] in names]
    sys.modules.update(dict.fromkeys((*names, *inside)))


def _install(version: str) -> str:
    return f"pip install --no-build-isolation 'transformer-engine[pytorch]{version}'"


def _fix(error: Exception) -> str:
    """What helps where Transformer Engine raises this error when it is imported."""
    for library, (cuda13, cuda12) in _LIBRARIES.items():
        if re.search(rf"\b{library}\b.*(not found|or later)", str(error), re.IGNORECASE):
            return f"pip install --upgrade {cuda13} ({cuda12} for CUDA 12)"
    halves = AssertionError | FileNotFoundError | RuntimeError | importlib.metadata.PackageNotFoundError
    if isinstance(error, halves):
        return f"it is half installed; {_install('')}"
    if isinstance(error, ModuleNotFoundError):
        return f"pip install {error.name}"
    rebuild = "pip install --force-reinstall --no-deps --no-cache-dir --no-build-isolation transformer-engine-torch"
    return f"it was built for another torch or CUDA; {rebuild} transformer-engine-cu13 (-cu12 for CUDA 12)"
