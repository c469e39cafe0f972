# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Canaries: every patch is still needed by the pinned Megatron-Core; and what the patches do."""

import inspect
import multiprocessing
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hydra_mcore import compat
from hydra_mcore.compat import cpu, datasets, optimizer, patching, reading, saving
from tests.support.launch import model_parallel, run_ranks

EVERYWHERE = (
    *datasets.PATCHES,
    *datasets.INDEX_PATCHES,
    *optimizer.PATCHES,
    *saving.PATCHES,
    *reading.PATCHES,
)
ALL = (*cpu.PATCHES, *EVERYWHERE)
DISTRIBUTED = "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer"


def run_python(code: str) -> None:
    """Run ``code`` in a fresh interpreter, where nothing is patched, and fail with its output."""
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_version_is_the_one_the_patches_were_written_for() -> None:
    assert version("megatron-core") == compat.MEGATRON_VERSION == "0.19.2"


def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "version", lambda _name: "0.20.0")
    with pytest.raises(RuntimeError, match=r"needs megatron-core 0\.19\.2, found 0\.20\.0"):
        compat.install()


@pytest.mark.parametrize("patch", ALL, ids=lambda patch: patch.target.rpartition(".")[2])
def test_the_caller_still_has_the_need(patch: patching.Patch) -> None:
    place = patching.resolve(patch.caller)
    assert patch.marker in inspect.getsource(place), f"{patch.target}: look at {patch.caller} again"


def test_installing_twice_changes_nothing() -> None:
    before = compat.applied()
    zeros = torch.zeros
    assert compat.install() == before
    assert {patch.target for patch in before} == {patch.target for patch in ALL}
    assert torch.zeros is zeros


def test_importing_has_no_side_effect_and_torch_needs_every_patch() -> None:
    """In one fresh interpreter: import, the faults without patches, then patches after Megatron was imported."""
    run_python("""
        import os, sys, warnings, torch
        state = lambda: (dict(os.environ), list(warnings.filters), torch.zeros, torch.cuda.current_device)
        before = state()
        from hydra_mcore import compat
        assert state() == before and compat.applied() == ()
        assert not [name for name in sys.modules if name.startswith("megatron")]

        C = torch.cuda
        generator = torch.get_rng_state()
        def seeded():
            C.manual_seed(5)
            C.set_rng_state(torch.Generator().manual_seed(5).get_state())
            return not torch.equal(torch.get_rng_state(), generator)
        def types():
            return torch.zeros(1).type() == "torch.cuda.FloatTensor"
        checks = dict(
            current_device=lambda: torch.zeros(1, device=C.current_device()).device.type == "cpu",
            device_count=lambda: C.device_count() == 1,
            set_device=lambda: C.set_device(0) is None,
            synchronize=lambda: C.synchronize() is None,
            current_stream=lambda: C.current_stream().wait_stream(None) is None,
            Stream=lambda: C.Stream().wait_stream(None) is None,
            get_rng_state=lambda: torch.equal(C.get_rng_state(), torch.get_rng_state()),
            set_rng_state_and_manual_seed=seeded,
            memory_stats=lambda: C.memory_stats()["allocated_bytes.all.current"] == 0,
            get_device_properties=lambda: C.get_device_properties("cuda:0").major > 0,
            tensor_type=types,
            tensor_cuda=lambda: torch.zeros(1).cuda().device.type == "cpu",
            module_cuda=lambda: bool(torch.nn.Linear(1, 1).cuda()),
            factories=lambda: torch.tensor([1], device="cuda").device.type == "cpu",
        )
        def passes(check):
            try:
                return check()
            except (RuntimeError, ImportError, KeyError):
                return False
        unneeded = [name for name, check in checks.items() if passes(check)]
        assert not unneeded, f"works without the patch: {unneeded}"

        import megatron.training.training as T
        compat.install()
        failing = [name for name, check in checks.items() if not passes(check)]
        assert not failing, f"does not work with the patch: {failing}"
        assert T.initialize_megatron.keywords == {"allow_no_cuda": True}
        assert torch.cuda.is_available() is False
    """)


def test_a_machine_with_a_gpu_is_left_alone() -> None:
    """On a pretended GPU: no CPU patch; what the wheel and the missing TE need is there."""
    run_python("""
        import torch
        torch.cuda.is_available = lambda: True
        from hydra_mcore import compat
        from hydra_mcore.compat import cpu, datasets, optimizer, patching, reading, saving
        before = [patching.resolve(patch.target) for patch in cpu.PATCHES if patch.target.startswith("torch")]
        installed = compat.install()
        assert before == [patching.resolve(patch.target) for patch in cpu.PATCHES if patch.target.startswith("torch")]
        ours = (*datasets.PATCHES, *datasets.INDEX_PATCHES, *optimizer.PATCHES, *saving.PATCHES, *reading.PATCHES)
        assert installed == ours, installed
    """)


def test_the_wheel_has_compiled_helpers_and_no_makefile() -> None:
    target = datasets.PATCHES[0].target
    with pytest.raises((SystemExit, FileNotFoundError)):
        patching.original(target)()
    patching.resolve(target)()


def test_megatron_insists_on_cuda_without_the_patch() -> None:
    with pytest.raises(AssertionError, match="Megatron requires CUDA"):
        patching.original("megatron.training.initialize:initialize_megatron")()


@pytest.mark.parametrize("factory", cpu._FACTORIES)
def test_factories_put_cuda_tensors_on_the_cpu_in_every_thread(factory: str) -> None:
    arguments = {"tensor": ([1.0],), "as_tensor": ([1.0],), "full": ((2,), 1.0), "arange": (2,), "linspace": (0, 1, 2),
                 "randint": (0, 2, (2,)), "full_like": (torch.zeros(2), 1.0)}  # fmt: skip
    default = (torch.zeros(2),) if factory.endswith("_like") else (2,)
    found: list[torch.Tensor] = []

    def make() -> None:
        for device in ("cuda", "cuda:0", torch.device("cuda", 0), torch.device("cpu"), None):
            found.append(getattr(torch, factory)(*arguments.get(factory, default), device=device))

    make()
    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    assert [tensor.device.type for tensor in found] == ["cpu"] * 10


def test_a_default_device_still_works() -> None:
    """``with torch.device(...)``, which transformers uses, finds the wrapped factories."""
    with torch.device("meta"):
        assert torch.zeros(2).device.type == "meta"
        assert torch.nn.Linear(2, 2).weight.device.type == "meta"


def test_the_generator_tracker_works_on_the_cpu_generator() -> None:
    def worker(_rank: int) -> list[bool]:
        from megatron.core.tensor_parallel import get_cuda_rng_tracker

        with model_parallel():
            state = torch.get_rng_state()
            with get_cuda_rng_tracker().fork():
                first = torch.rand(4)
            untouched = torch.equal(torch.get_rng_state(), state)
            with get_cuda_rng_tracker().fork():
                second = torch.rand(4)
            unpatched = patching.original("megatron.core.tensor_parallel.random:_set_cuda_rng_state")
            torch.manual_seed(99)
            unpatched(state)
            return [untouched, not torch.equal(first, second), not torch.equal(torch.get_rng_state(), state)]

    assert run_ranks(worker, 1) == [[True] * 3]


def test_iterating_over_data_leaves_dropouts_generator_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.training.datasets import data_samplers

    flags = SimpleNamespace(
        dataloader_type="single", micro_batch_size=1, global_batch_size=1, num_workers=0,
        full_validation=False, hybrid_context_parallel=False, exit_signal_handler=False,
    )  # fmt: skip
    monkeypatch.setattr(data_samplers, "get_args", lambda: flags)

    def draws(build: Callable[[Any, int], Any]) -> bool:
        loader = build(torch.arange(4), 0)
        state = torch.get_rng_state()
        assert [int(batch) for batch in loader] == [0, 1, 2, 3]
        return not torch.equal(torch.get_rng_state(), state)

    def worker(_rank: int) -> list[bool]:
        target = "megatron.training.datasets.data_samplers:build_pretraining_data_loader"
        with model_parallel():
            return [draws(patching.original(target)), draws(patching.resolve(target))]

    assert run_ranks(worker, 1) == [[True, False]]


def test_a_synchronous_save_starts_no_process(tmp_path) -> None:
    def worker(_rank: int) -> tuple[int, list[float]]:
        from megatron.core import dist_checkpointing
        from megatron.core.dist_checkpointing.strategies import filesystem_async

        def shards(value: float) -> dict[str, Any]:
            return {"w": dist_checkpointing.ShardedTensor.from_rank_offsets("w", torch.full((3,), value))}

        with model_parallel():
            dist_checkpointing.save(shards(7.0), str(tmp_path))
            assert filesystem_async._results_queue is None
            loaded = dist_checkpointing.load(shards(0.0), str(tmp_path))
            return len(multiprocessing.active_children()), loaded["w"].tolist()

    assert run_ranks(worker, 1) == [(0, [7.0] * 3)]


def test_a_write_that_is_cut_off_leaves_the_file_as_it_was(tmp_path) -> None:
    from megatron.core.msc_utils import maybe_msc

    tracker = tmp_path / "tracker"
    with maybe_msc.open(tracker, "w") as file:
        file.write("2")
    with pytest.raises(KeyboardInterrupt), maybe_msc.open(tracker, "w") as file:
        assert file.write("4") and tracker.read_text() == "2"
        raise KeyboardInterrupt
    with maybe_msc.open(tracker) as file:
        assert file.read() == "2"
    with maybe_msc.open(tracker, "rb") as file:
        assert file.read() == b"2"


def _optimizer(width: int = 4, bucket_size: int | None = None) -> Any:
    """Return one float32 linear layer, wrapped for data parallelism, and its optimizer (a chain of one)."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer import TransformerConfig

    torch.manual_seed(0)
    model = torch.nn.Linear(width, width, bias=width > 1)
    config = TransformerConfig(num_layers=1, hidden_size=width, num_attention_heads=1)
    ddp = DistributedDataParallelConfig(
        use_distributed_optimizer=True, bucket_size=bucket_size, overlap_grad_reduce=bucket_size is not None
    )
    chunk = DistributedDataParallel(config, ddp, model)
    settings = OptimizerConfig(optimizer="adam", lr=0.1, use_distributed_optimizer=True, params_dtype=torch.float32)
    return chunk, get_megatron_optimizer(settings, [chunk])


def _steps(chunk: Any, distributed: Any, count: int) -> list[float]:
    losses = []
    for _ in range(count):
        chunk.zero_grad_buffer()
        loss = (chunk(torch.ones(2, chunk.module.in_features)) - 3).square().sum()
        loss.backward()
        chunk.finish_grad_sync()
        distributed.step()
        losses.append(loss.item())
    return losses


def _shards(chunk: Any) -> dict[str, Any]:
    from megatron.core.dist_checkpointing import ShardedTensor

    return {name: ShardedTensor.from_rank_offsets(name, tensor) for name, tensor in chunk.module.named_parameters()}


def _in_ranks(check: Callable[[], Any], unpatched: str | None, world_size: int = 1) -> list[Any]:
    """Run ``check`` in every rank, with one method of DistributedOptimizer put back as Megatron ships it."""

    def worker(_rank: int) -> Any:
        if unpatched is not None:
            target = f"{DISTRIBUTED}.{unpatched}"
            setattr(patching.resolve(DISTRIBUTED), unpatched, patching.original(target))
        with model_parallel():
            return check()

    return run_ranks(worker, world_size, timeout=20)


def _resume(folder: str, sharding: str, bucket_size: int | None = None) -> bool:
    """Tell whether three steps, a save, a load into a new optimizer and three steps equal six steps."""
    from megatron.core import dist_checkpointing

    metadata = {"distrib_optim_sharding_type": sharding}
    chunk, distributed = _optimizer(bucket_size=bucket_size)
    _steps(chunk, distributed, 3)
    model = _shards(chunk)
    state = {"model": model, "optimizer": distributed.sharded_state_dict(model, metadata=metadata)}
    dist_checkpointing.save(state, folder)
    expected = _steps(chunk, distributed, 3)

    chunk, distributed = _optimizer(bucket_size=bucket_size)
    model = _shards(chunk)
    wanted = distributed.sharded_state_dict(model, is_loading=True, metadata=metadata)
    loaded = dist_checkpointing.load({"model": model, "optimizer": wanted}, folder)
    chunk.module.load_state_dict(loaded["model"])
    distributed.load_state_dict(loaded["optimizer"])
    return _steps(chunk, distributed, 3) == expected


SHARDINGS = ("dp_reshardable", "fully_reshardable")


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_the_optimizer_resumes_exactly(sharding: str, tmp_path) -> None:
    assert _in_ranks(lambda: _resume(str(tmp_path), sharding), None) == [True]


@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize("method", ["state_dict", "load_state_dict", "_set_main_param_and_optimizer_states"])
def test_the_optimizer_does_not_resume_without_the_patch(method: str, sharding: str, tmp_path) -> None:
    def check() -> bool:
        try:
            return _resume(str(tmp_path), sharding)
        except (AssertionError, KeyError, RuntimeError):
            return False

    assert _in_ranks(check, method) == [False]


@pytest.mark.parametrize(("method", "exact"), [(None, True), ("sharded_param_state_fully_reshardable", False)])
def test_several_buckets_resume_only_with_the_patch(method: str | None, exact: bool, tmp_path) -> None:
    assert _in_ranks(lambda: _resume(str(tmp_path), "fully_reshardable", bucket_size=1), method) == [exact]
