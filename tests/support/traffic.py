# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Count the bytes that this rank sends in one process group.

::

    with sent_bytes(group) as forward:
        loss = layer(x).sum()
    with sent_bytes(group) as backward:
        loss.backward()
    assert forward == Counter(all_gather=4096)

Counted where torch.distributed hands a tensor to the group: so it does not matter by which name a caller got hold of a
function (Megatron-Core binds several at import), and communication for which there is no rule here is an error, not a
gap. Not counted still lower, by a TorchDispatchMode: torch's causal_lower_right, which attention needs, fails under
    one.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

# Method of a group: our name for it, which argument holds the tensors that count, bytes sent of their n in a group of
# p. The rules are those of hydra_mcore/costs/communication.py.
_ALL_GATHER = ("all_gather", 1, lambda n, p: (p - 1) * n)
_REDUCE_SCATTER = ("reduce_scatter", 0, lambda n, p: (p - 1) * n)
_ALL_TO_ALL = ("all_to_all", 1, lambda n, p: (p - 1) * n // p)
_RULES: dict[str, tuple[str, int, Callable[[int, int], int]]] = {
    "_allgather_base": _ALL_GATHER,
    "all_gather_single": _ALL_GATHER,  # the same, as torch 2.15 calls it; so below
    "_reduce_scatter_base": _REDUCE_SCATTER,
    "reduce_scatter_single": _REDUCE_SCATTER,
    "alltoall_base": _ALL_TO_ALL,
    "all_to_all_single": _ALL_TO_ALL,
    "allreduce": ("all_reduce", 0, lambda n, p: 2 * (p - 1) * n // p),
    "send": ("send", 0, lambda n, p: n),
}
_NO_RULE = (
    "allgather allgather_coalesced allgather_into_tensor_coalesced all_gather_single_coalesced allreduce_coalesced"
    " alltoall broadcast gather gather_single gather_into_tensor reduce reduce_scatter reduce_scatter_tensor_coalesced"
    " reduce_scatter_single_coalesced scatter"
).split()


@contextlib.contextmanager
def sent_bytes(group: dist.ProcessGroup) -> Iterator[Counter]:
    """Bytes sent in ``group`` inside the block, by kind of communication."""
    counted: Counter = Counter()
    with contextlib.ExitStack() as patches:
        for method in (*_RULES, *_NO_RULE):
            if hasattr(dist.ProcessGroup, method):
                patches.enter_context(
                    mock.patch.object(dist.ProcessGroup, method, _counting(method, group.group_name, counted))
                )
        yield counted


def _counting(method: str, group_name: str, counted: Counter) -> Callable[..., Any]:
    original = getattr(dist.ProcessGroup, method)

    def counting(self: dist.ProcessGroup, *args: Any, **kwargs: Any) -> Any:
        if self.group_name == group_name:
            assert method in _RULES, f"{method}: no rule for what it sends"
            label, tensors, sent = _RULES[method]
            assert label != "all_to_all" or not (args[2] or args[3]), "all-to-all of unequal parts"
            counted[label] += sent(_bytes(args[tensors]), self.size())
        return original(self, *args, **kwargs)

    return counting


def _bytes(tensors: torch.Tensor | list[torch.Tensor]) -> int:
    return sum(
        tensor.numel() * tensor.element_size()
        for tensor in ([tensors] if isinstance(tensors, torch.Tensor) else tensors)
    )
