# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Peak memory of a block of code, on any device, from the tensors that it makes.

::

    with tracked_peak() as memory:
        model(x).sum().backward()
    assert memory.peak_bytes < 2**20
"""

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class _Memory(TorchDispatchMode):
    """Follows every storage from the operator that returns it to its end, backward passes included.

    What an operator allocates inside its kernel and does not return is not seen (a product in bfloat16 on a CPU makes a
    float32 copy of its result, for one).

    Attributes:
        live_bytes: of the storages made in the block that are still alive.
        peak_bytes: the largest value of ``live_bytes``.
        largest_elements: elements of the largest storage made in the block.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = self.peak_bytes = self.largest_elements = 0
        self._known: dict[int, weakref.ref] = {}  # by address of the storage

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for x in _tensors((args, kwargs)):  # made before the block, else known
            self._note(x, counts=False)
        result = func(*args, **(kwargs or {}))
        for x in _tensors(result):
            self._note(x, counts=True)
        return result

    def _note(self, x: torch.Tensor, counts: bool) -> None:
        storage = x.untyped_storage()
        address = storage._cdata
        if address in self._known:
            return
        size = storage.nbytes() if counts else 0

        def end(_: weakref.ref) -> None:
            self.live_bytes -= size
            del self._known[address]

        self._known[address] = weakref.ref(storage, end)
        self.live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        self.largest_elements = max(self.largest_elements, size // x.element_size())


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    return (x for x in tree_iter(tree) if isinstance(x, torch.Tensor) and x.layout == torch.strided)


@contextlib.contextmanager
def tracked_peak() -> Iterator[_Memory]:
    """Measure the bytes of all tensors that the block makes; what exists before it does not count."""
    with _Memory() as memory:
        yield memory
