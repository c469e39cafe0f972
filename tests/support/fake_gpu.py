# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""A GPU that has no memory and computes nothing, in a process of its own: what touches the wrong device still fails.

Tensors are torch's fake ones: each has a shape, a dtype and a device, "cuda" or "cpu", and no values. Operations check
devices as real ones do. Torch and Megatron are told that there is a GPU, so the patches for CPUs stay away. Autograd's
engine needs a driver, so nothing here runs backward.
"""

from __future__ import annotations

import contextlib
import linecache
import sys
from collections.abc import Iterator, Sequence
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.attention.bias
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from hydra_mcore.ops.fla_kernels import Kernels

_HOPPER = SimpleNamespace(
    major=9, minor=0, name="a fake GPU", total_memory=1 << 37, multi_processor_count=132, L2_cache_size=1 << 25
)


ROOTS = tuple(Path(find_spec(name).origin).parent for name in ("hydra_mcore", "megatron.core"))
COLLECTIVES = (
    "all_reduce", "broadcast", "all_gather", "all_gather_into_tensor", "_all_gather_base", "reduce_scatter",
    "reduce_scatter_tensor", "_reduce_scatter_base", "all_to_all_single",
)  # fmt: skip


class _Stream:
    """Of a GPU that is always idle."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.cuda_stream = 0

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def synchronize(self) -> None: ...


def pretend() -> None:
    """Tell this process, for good, that it has a GPU; to be called before ``compat.install``."""
    stand_ins: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "synchronize": lambda device=None: None,
        "current_stream": lambda device=None: _Stream(),
        "default_stream": lambda device=None: _Stream(),
        "stream": lambda stream: contextlib.nullcontext(),
        "Stream": _Stream,
        "Event": _Stream,
        "get_device_properties": lambda device=None: _HOPPER,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_name": lambda device=None: _HOPPER.name,
        "manual_seed": lambda seed: None,
        "empty_cache": lambda: None,
        "_lazy_init": lambda: None,
    }
    for name, stand_in in stand_ins.items():
        setattr(torch.cuda, name, stand_in)
    torch.cuda.default_generators = (SimpleNamespace(set_state=lambda state: None),)
    torch.cuda.random.get_rng_state = torch.cuda.get_rng_state = lambda device="cuda": torch.zeros(
        16, dtype=torch.uint8
    )
    torch.cuda.random.set_rng_state = torch.cuda.set_rng_state = lambda state, device="cuda": None
    # neither asks the driver for anything
    torch._subclasses.fake_tensor.init_gpu_context = lambda device: None
    FakeTensorMode.avoid_device_init = property(lambda mode: True)
    for name in COLLECTIVES:
        setattr(torch.distributed, name, _collective)
    F.scaled_dot_product_attention = _attention
    torch.nn.attention.bias.causal_lower_right = _causal_lower_right


def _collective(*arguments: Any, **keywords: Any) -> Any:
    """NCCL takes tensors of the GPU alone; what the others would send is of the right shape."""
    for value in (*arguments, *keywords.values()):
        for x in value if isinstance(value, list | tuple) else (value,):
            assert not isinstance(x, Tensor) or x.is_cuda, "NCCL takes tensors of the GPU alone"
    return SimpleNamespace(wait=lambda: None) if keywords.get("async_op") else None


def _causal_lower_right(queries: int, keys: int) -> Tensor:
    """Torch's own is a tensor of another kind, which cannot be a fake one too."""
    return torch.ones(queries, keys, dtype=torch.bool, device="cuda")


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """In torch's own, which kernel is best is asked of the driver."""
    assert attn_mask is None or attn_mask.device == query.device
    return ((query @ key.mT).softmax(-1) @ value).to(query.dtype)


@contextlib.contextmanager
def fake_ranks(tp_size: int, tp_rank: int) -> Iterator[None]:
    """Megatron's process groups on one of several ranks; what the others would send is of the right shape."""
    from megatron.core import parallel_state, tensor_parallel
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group(
        "fake", store=FakeStore(), rank=tp_rank, world_size=tp_size, timeout=timedelta(seconds=60)
    )
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp_size, create_gloo_process_groups=False)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


class HostReads(TorchDispatchMode):
    """Notes where the host asks for a value of the GPU's, and answers with True or 0.

    ``places`` has the lines of hydra_mcore or Megatron that asked, in their order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, aten = kwargs or {}, torch.ops.aten
        x = args[0] if args and isinstance(args[0], Tensor) else None
        on_gpu, to = x is not None and x.device.type == "cuda", kwargs.get("device")
        if function is aten._local_scalar_dense.default:
            if on_gpu:
                self.places.append(_place())
                return x.dtype == torch.bool or (0.0 if x.is_floating_point() else 0)
            try:
                return function(*args, **kwargs)
            except DataDependentOutputException:  # the host's own copy of a value of the GPU's
                return False if x.dtype == torch.bool else 0
        if function is aten.nonzero.default:
            self.places.append(_place())
            return torch.zeros(1, x.dim(), dtype=torch.long, device=x.device)
        if function is aten._to_copy.default and on_gpu and to is not None and torch.device(to).type == "cpu":
            self.places.append(_place())
        return function(*args, **kwargs)


def _place() -> str:
    """The innermost line of the project's or of Megatron's that is being run: path below the package, and its text."""
    frame = sys._getframe(2)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        for root in ROOTS:
            if path.is_relative_to(root):
                line = linecache.getline(str(path), frame.f_lineno).strip()
                return f"{path.relative_to(root.parent)}: {line}"
        frame = frame.f_back
    return "elsewhere"


@contextlib.contextmanager
def fake_memory() -> Iterator[HostReads]:
    """What is made within has no values; yields where the host asked for some."""
    with FakeTensorMode(allow_non_fake_inputs=True), HostReads() as reads:
        yield reads


def _gradients(outputs: Any, inputs: Sequence[Tensor], *_: Any, **__: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x) for x in inputs)


def without_autograd() -> None:
    """Have ``torch.autograd.grad`` answer with tensors of the right shape, for good: its engine needs a driver."""
    torch.autograd.grad = _gradients


# Flash-linear-attention's functions as far as shapes, dtypes and devices go.


def _states(v: Tensor, d: int, cu_seqlens: Tensor | None) -> Tensor:
    rows = v.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return v.new_empty(rows, v.shape[2], d, v.shape[3], dtype=torch.float32)


def _check(
    q: Tensor, tensors: Sequence[Tensor | None], cu_seqlens: Tensor | None, cu_seqlens_cpu: Tensor | None
) -> None:
    """What a kernel would read from a wrong place."""
    assert q.is_cuda
    assert all(x is None or x.device == q.device for x in (*tensors, cu_seqlens)), "a tensor on another device"
    assert cu_seqlens_cpu is None or cu_seqlens_cpu.device.type == "cpu"
    assert (cu_seqlens is None) == (cu_seqlens_cpu is None), "the kernel would read boundaries from the GPU"
    assert cu_seqlens is None or q.shape[0] == 1


def _delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    _check(q, (k, v, g, beta, initial_state), cu_seqlens, cu_seqlens_cpu)
    assert q.dtype == k.dtype == v.dtype and g.dtype == beta.dtype == torch.float32
    out = v * beta[..., None].to(v.dtype) + (q * k).sum(-1, keepdim=True)
    return out, _states(v, q.shape[-1], cu_seqlens) if output_final_state else None


def _delta_few(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    return _delta(q, k, v, g, beta, scale, initial_state, output_final_state)


def _linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g_gamma: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    _check(q, (k, v, g_gamma, initial_state), cu_seqlens, cu_seqlens_cpu)
    assert q.dtype == k.dtype == v.dtype and g_gamma.dtype == torch.float32
    return v + (q * k).sum(-1, keepdim=True), _states(v, q.shape[-1], cu_seqlens) if output_final_state else None


def _linear_few(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g_gamma: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    return _linear(q, k, v, g_gamma, scale, initial_state, output_final_state)


def _conv(
    x: Tensor,
    weight: Tensor,
    activation: str | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
) -> tuple[Tensor, None]:
    _check(x, (weight,), cu_seqlens, cu_seqlens_cpu)
    return x * weight[:, 0], None


def _l2norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    assert x.is_cuda
    return x * 1.0


KERNELS = Kernels(
    delta=_delta,
    delta_few=_delta_few,
    channel_delta=_delta,
    channel_delta_few=_delta_few,
    linear=_linear,
    linear_few=_linear_few,
    conv=_conv,
    l2norm=_l2norm,
)
