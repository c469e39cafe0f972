# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The dataset helpers of the wheel: compiled already, and without the Makefile that would compile them."""

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path

from hydra_mcore.compat.patching import Patch


def _make_compile_helpers(_original: Callable[[], None]) -> Callable[[], None]:
    def compile_helpers() -> None:
        """Check that the compiled helpers load; the wheel ships them.

        Raises:
            ImportError: the installed megatron-core has no compiled helpers for this Python.
        """
        importlib.import_module("megatron.core.datasets.helpers_cpp")

    return compile_helpers


PATCHES = (
    Patch(
        target="megatron.core.datasets.utils:compile_helpers",
        caller="megatron.training.initialize:_compile_dependencies",
        marker="compile_helpers()",
        reason="Runs `make` in a folder where the wheel ships no Makefile, then exits: every pretrain() dies.",
        make=_make_compile_helpers,
    ),
)


def needed() -> bool:
    """Tell whether the installed Megatron-Core lacks the Makefile (a source checkout has it)."""
    spec = importlib.util.find_spec("megatron.core.datasets")
    return spec is not None and not (Path(str(spec.origin)).parent / "Makefile").exists()
