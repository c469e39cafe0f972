# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Megatron-Core on a machine without a GPU: gloo for the network, CPU tensors for everything else.

Never installed when torch sees a GPU.  ``torch.cuda.is_available()`` keeps saying False.  The factories of tensors are
wrapped instead of pushing a TorchFunctionMode: a mode is local to one thread, and costs a quarter of a small model's
step, as every operation passes through it.  ``tensor.to("cuda")`` is not mapped: nothing that we use calls it.
"""

import contextlib
import ctypes
import functools
import os
from collections import defaultdict
from collections.abc import Callable
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import torch
from torch.distributed import ProcessGroupGloo
from torch.utils._device import _device_constructors

from hydra_mcore.compat.patching import Patch

_CPU = torch.device("cpu")
_CORE = "megatron.core"
_TRAINING = "megatron.training"
_RANDOM = f"{_CORE}.tensor_parallel.random"
_COMMON = f"{_TRAINING}.utils.common_utils"
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h


class _Stream:
    """Stands for ``torch.cuda.Stream``: on a CPU everything is done when the call returns."""

    device = _CPU

    def __init__(self, *_args: Any, **_kwargs: Any) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def synchronize(self) -> None: ...


def _constant(value: Any) -> Callable[[Any], Any]:
    """Return a patch maker whose replacement ignores its arguments and answers ``value``."""

    def make(original: Any) -> Any:
        @functools.wraps(original)
        def replacement(*_args: Any, **_kwargs: Any) -> Any:
            return value

        return replacement

    return make


def _call(function: Callable[..., Any]) -> Callable[[Any], Any]:
    """Return a patch maker whose replacement is ``function``."""
    return lambda _original: function


def _on_cpu(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Wrap a tensor factory so that a CUDA ``device`` keyword means the CPU."""

    @functools.wraps(original)
    def factory(*args: Any, **kwargs: Any) -> torch.Tensor:
        device = kwargs.get("device")
        if device is not None and str(device).startswith("cuda"):
            kwargs["device"] = _CPU
        return original(*args, **kwargs)

    return factory


def _cuda_type_name(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def tensor_type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = original(self, *args, **kwargs)
        if isinstance(answer, str) and not answer.startswith("torch.cuda."):
            return answer.replace("torch.", "torch.cuda.", 1)
        return answer

    return tensor_type


def _cpu_placement(original: Any) -> Any:
    @functools.wraps(original, updated=())
    def shard_metadata(offsets: Any, sizes: Any, placement: str) -> Any:
        return original(offsets, sizes, placement.replace("/cuda", "/cpu"))

    return shard_metadata


def _allow_no_cuda(original: Callable[..., Any]) -> Callable[..., Any]:
    return functools.wraps(original)(functools.partial(original, allow_no_cuda=True))


def _private_generator(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def build_pretraining_data_loader(dataset: Any, consumed_samples: int) -> Any:
        loader = original(dataset, consumed_samples)
        if isinstance(loader, torch.utils.data.DataLoader):
            loader.generator = torch.Generator().manual_seed(0)
            loader.pin_memory = False
        return loader

    return build_pretraining_data_loader


def _set_rng_state(state: torch.Tensor, *_args: Any, **_kwargs: Any) -> None:
    torch.set_rng_state(state)


def _get_rng_state(*_args: Any, **_kwargs: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _manual_seed(seed: int) -> None:
    # Not torch.manual_seed(): that seeds every device and would call back into torch.cuda.
    torch.default_generator.manual_seed(int(seed))


@functools.cache
def _network(_process: int) -> Any:
    """The network of a process; a forked one has none of its parent's threads."""
    return ProcessGroupGloo.create_default_device()


def _on_one_network(original: type[ProcessGroupGloo]) -> type[ProcessGroupGloo]:
    class OnOneNetwork(original):
        """All groups of a process send through the same threads."""

        def __init__(self, store: Any, rank: int, size: int, *, timeout: timedelta, **more: Any) -> None:
            options = original._Options()
            options._devices, options._threads, options._timeout = [_network(os.getpid())], 2, timeout
            for name, value in more.items():  # torch 2.15 has one more than 2.9
                setattr(options, name, value)
            super().__init__(store, rank, size, options)

    return OnOneNetwork


# Only what states a Blackwell GPU keeps Megatron from insisting on CUDA_DEVICE_MAX_CONNECTIONS=1 under TP.
_PROPERTIES = SimpleNamespace(major=10, minor=0, name="cpu", total_memory=1 << 34, multi_processor_count=1)

# name, replacement maker, caller in Megatron, what the caller says, why.
_TORCH_CUDA: tuple[tuple[str, Callable[[Any], Any], str, str, str], ...] = (
    ("current_device", _constant(_CPU), f"{_CORE}.tensor_parallel.layers:ColumnParallelLinear.__init__",
     "device=torch.cuda.current_device()", "Used as the device of nearly every tensor Megatron allocates."),
    ("device_count", _constant(1), f"{_TRAINING}.initialize:_initialize_distributed",
     "if device_count > 0 and not skip_model_parallel_init", "Parallel groups and seeds are set up only if above 0."),
    ("set_device", _constant(None), f"{_TRAINING}.initialize:_initialize_distributed",
     "torch.cuda.set_device(args.local_rank)", "Raises without a driver."),
    ("synchronize", _constant(None), f"{_CORE}.timers:Timer.start",
     "torch.cuda.synchronize()", "Raises without a driver."),
    ("current_stream", _constant(_Stream()), f"{_TRAINING}.models.dist_utils:_ddp_wrap",
     "wait_stream(torch.cuda.current_stream())", "Raises without a driver."),
    ("stream", _call(lambda _stream: contextlib.nullcontext()), f"{_TRAINING}.models.dist_utils:_ddp_wrap",
     "with torch.cuda.stream(ddp_stream)", "Enters a stream of the driver."),
    ("Stream", _call(_Stream), f"{_TRAINING}.models.dist_utils:_ddp_wrap",
     "torch.cuda.Stream()", "The constructor raises without a driver."),
    ("get_rng_state", _call(_get_rng_state), f"{_TRAINING}.checkpointing:get_rng_state",
     "torch.cuda.get_rng_state()", "The 'cuda' generator is the CPU's default generator: dropout draws from it."),
    ("set_rng_state", _call(_set_rng_state), f"{_TRAINING}.checkpointing:load_checkpoint",
     "torch.cuda.set_rng_state(rng_state['cuda_rng_state'])", "As above; the stock call only queues for later."),
    ("manual_seed", _call(_manual_seed), f"{_RANDOM}:CudaRNGStatesTracker.add",
     "torch.cuda.manual_seed(seed)", "As above; the stock call only queues for later."),
    ("memory_stats", _call(lambda *_args: defaultdict(int)), f"{_TRAINING}.training:training_log",
     "torch.cuda.memory_stats()", "The stock answer has none of the keys that are read."),
    ("get_device_properties", _constant(_PROPERTIES), f"{_COMMON}:get_device_arch_version",
     "torch.cuda.get_device_properties(", "The argument check asks for the architecture."),
)  # fmt: skip

# The factories that Megatron calls with device="cuda" or that copy such a device from an argument.
_FACTORIES = ("tensor", "as_tensor", "empty", "zeros", "ones", "full", "arange", "linspace", "rand", "randn", "randint",
              "empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like")  # fmt: skip

PATCHES: tuple[Patch, ...] = (
    *(Patch(f"torch.cuda:{name}", caller, marker, reason, make) for name, make, caller, marker, reason in _TORCH_CUDA),
    *(
        Patch(
            target=f"torch:{name}",
            caller=f"{_CORE}.optimizer.clip_grads:get_grad_norm_fp32",
            marker="device='cuda'",
            reason='device="cuda" is written out at some hundred places.',
            make=_on_cpu,
        )
        for name in _FACTORIES
    ),
    Patch(
        target="torch.distributed.distributed_c10d:ProcessGroupGloo",
        caller=f"{_CORE}.parallel_state:create_group",
        marker="torch.distributed.new_group(",
        reason="Megatron makes two dozen groups, and gloo gives each a thread that wakes a hundred times a second.",
        make=_on_one_network,
    ),
    Patch(
        target="torch:Tensor.type",
        caller=f"{_CORE}.optimizer.clip_grads:clip_grad_by_total_norm_fp32",
        marker="'torch.cuda.FloatTensor'",
        reason="The optimizers sort parameters by the names of CUDA tensor types.",
        make=_cuda_type_name,
    ),
    Patch(
        target="torch:Tensor.cuda",
        caller=(
            f"{_CORE}.models.common.language_module.language_module:LanguageModule.setup_embeddings_and_output_layer"
        ),
        marker="weight.data.cuda()",
        reason="Raises without a driver.",
        make=_call(lambda self, *_args, **_kwargs: self),
    ),
    Patch(
        target="torch.nn:Module.cuda",
        caller=f"{_TRAINING}.models.dist_utils:prepare_existing_model_chunks_for_distributed_training",
        marker=".cuda(torch.cuda.current_device())",
        reason="Raises without a driver.",
        make=_call(lambda self, *_args, **_kwargs: self),
    ),
    Patch(
        target=f"{_RANDOM}:_get_cuda_rng_state",
        caller=f"{_RANDOM}:CudaRNGStatesTracker.fork",
        marker="_get_cuda_rng_state(",
        reason="Goes to torch.cuda.random directly.",
        make=_call(_get_rng_state),
    ),
    Patch(
        target=f"{_RANDOM}:_set_cuda_rng_state",
        caller=f"{_RANDOM}:CudaRNGStatesTracker.fork",
        marker="_set_cuda_rng_state(",
        reason="Queues the state until CUDA starts, which is never.",
        make=_call(_set_rng_state),
    ),
    Patch(
        target=f"{_CORE}.dist_checkpointing.strategies.torch:ShardMetadata",
        caller=f"{_CORE}.dist_checkpointing.strategies.torch:sharded_tensor_to_torch_sharded_tensor",
        marker='/cuda"',
        reason="Checkpoint shards are declared to lie on the GPU; torch compares that with the tensor's device.",
        make=_cpu_placement,
    ),
    Patch(
        target=f"{_TRAINING}.initialize:initialize_megatron",
        caller=f"{_TRAINING}.initialize:initialize_megatron",
        marker="if not allow_no_cuda:",
        reason="Asserts that CUDA is available, and pretrain() does not pass the argument that waives it.",
        make=_allow_no_cuda,
        rebind=(f"{_TRAINING}.training", _TRAINING),
    ),
    Patch(
        target=f"{_TRAINING}.datasets.data_samplers:build_pretraining_data_loader",
        caller=f"{_TRAINING}.datasets.data_samplers:build_pretraining_data_loader",
        marker="pin_memory=True",
        reason="iter(DataLoader) draws a seed from the default CPU generator, here also the one of dropout, so a "
        "resumed run would draw another dropout than an uninterrupted one. Pinned memory needs a GPU.",
        make=_private_generator,
        rebind=(f"{_TRAINING}.training",),
    ),
)


def prepare() -> None:
    """Fill torch's cached set of factories before they are wrapped, or ``with torch.device(...)`` misses them."""
    _device_constructors()
    _keep_freed_memory()


def _keep_freed_memory() -> None:
    """Have glibc keep blocks of over 32 MiB when they are freed, as torch does on a GPU.

    By default each goes back to the system, and the next operation pays for every page of its result again: recurrent
    heads read a prompt of 64K tokens 2.4 times slower.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
