# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""What Megatron's data sets lack: a Makefile for helpers that the wheel has compiled, and care for the indices that
they keep.
"""

import functools
import importlib
import importlib.util
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydra_mcore.compat.patching import Patch
from hydra_mcore.errors import InputError, first_line
from hydra_mcore.files import replacing

_DATASETS = "megatron.core.datasets"
_BUILDERS = {  # module -> the function of it that saves and reads indices, and the last one that it saves
    "gpt_dataset": ("GPTDataset._build_document_sample_shuffle_indices", "numpy.save(path_to_shuffle_index"),
    "blended_dataset": ("BlendedDataset._build_indices", "numpy.save(path_to_dataset_sample_index"),
}


def _make_compile_helpers(_original: Callable[[], None]) -> Callable[[], None]:
    def compile_helpers() -> None:
        """Check that the compiled helpers load; the wheel ships them.

        Raises:
            ImportError: the installed megatron-core has no compiled helpers for this Python.
        """
        importlib.import_module("megatron.core.datasets.helpers_cpp")

    return compile_helpers


class _WholeArrays:
    """numpy, for a module that saves arrays which other runs may be looking for: beside, then rename."""

    def __init__(self, numpy: types.ModuleType) -> None:
        self._numpy = numpy

    def __getattr__(self, name: str) -> Any:
        return getattr(self._numpy, name)

    def save(self, path: str, array: Any, **keywords: Any) -> None:
        with replacing(Path(path)) as beside, beside.open("wb") as file:
            self._numpy.save(file, array, **keywords)


def _make_load(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def load(path: str, **keywords: Any) -> Any:
        """The original; raises InputError for a damaged index."""
        try:
            return original(path, **keywords)
        except Exception as error:  # of damaged arrays numpy and its reader of pickles raise anything
            raise InputError(
                f"{path}: a damaged index of the data ({first_line(error)}); remove its folder, it is made again"
            ) from None

    return load


PATCHES = (
    Patch(
        target="megatron.core.datasets.utils:compile_helpers",
        caller="megatron.training.initialize:_compile_dependencies",
        marker="compile_helpers()",
        reason="Runs `make` in a folder where the wheel ships no Makefile, then exits: every pretrain() dies.",
        make=_make_compile_helpers,
    ),
)

INDEX_PATCHES = (
    *(
        Patch(
            target=f"{_DATASETS}.{module}:numpy",
            caller=f"{_DATASETS}.{module}:{builder}",
            marker=last_save,
            reason=(
                "An index that is half written, by a run that was killed or still writes, looks finished to the next"
                " run."
            ),
            make=_WholeArrays,
        )
        for module, (builder, last_save) in _BUILDERS.items()
    ),
    *(
        Patch(
            target=f"{_DATASETS}.{module}:safe_numpy_load",
            caller=f"{_DATASETS}.{module}:{builder}",
            marker="safe_numpy_load(",
            reason="A damaged index is an error of numpy's that does not name the file.",
            make=_make_load,
        )
        for module, (builder, _) in _BUILDERS.items()
    ),
)


def needed() -> bool:
    """Tell whether the installed Megatron-Core lacks the Makefile (a source checkout has it)."""
    spec = importlib.util.find_spec("megatron.core.datasets")
    return spec is not None and not (Path(str(spec.origin)).parent / "Makefile").exists()
