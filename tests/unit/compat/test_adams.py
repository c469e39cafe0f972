# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""A run that was saved with one Adam goes on with another without a step lost: torch's, Transformer Engine's, Apex's.

Compared are parameters after further steps, with a run that was not stopped.
"""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException

from hydra_mcore.compat import patching
from tests.support.accelerators import needs_te
from tests.support.adams import ADAMS, use_adam
from tests.support.launch import model_parallel, run_ranks

DISTRIBUTED = "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer"
STOP, STEPS = 3, 6
# Each of two data-parallel ranks has room for 64 numbers. Of a layer with 72 the second has fewer and none of the bias,
# so an empty group; of one with 1 it has nothing, which dp_reshardable cannot save.
WITH_EMPTY_GROUP, WITH_EMPTY_RANK = 8, 1


class Training:
    """One linear layer with its distributed optimizer, whose groups are those with weight decay and without."""

    def __init__(self, adam: str, width: int) -> None:
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
        from megatron.core.transformer import TransformerConfig

        use_adam(adam)
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(width, width, bias=width > 1)
        config = TransformerConfig(num_layers=1, hidden_size=width, num_attention_heads=1)
        ddp = DistributedDataParallelConfig(use_distributed_optimizer=True)
        self.chunk = DistributedDataParallel(config, ddp, self.layer)
        settings = OptimizerConfig(
            optimizer="adam", lr=0.01, weight_decay=0.1, use_distributed_optimizer=True, params_dtype=torch.float32
        )
        self.optimizer = get_megatron_optimizer(settings, [self.chunk])

    def steps(self, count: int) -> dict[str, torch.Tensor]:
        """Train; returns the parameters."""
        for _ in range(count):
            self.chunk.zero_grad_buffer()
            (self.chunk(torch.ones(2, self.layer.in_features)) - 3).square().sum().backward()
            self.chunk.finish_grad_sync()
            assert self.optimizer.step()[0]
        return {name: parameter.detach().clone() for name, parameter in self.layer.named_parameters()}

    def state(self, sharding: str, is_loading: bool) -> dict[str, Any]:
        from megatron.core.dist_checkpointing import ShardedTensor

        replica = (0, 0, torch.distributed.get_rank())
        named = self.layer.named_parameters()
        model = {name: ShardedTensor.from_rank_offsets(name, x, replica_id=replica) for name, x in named}
        metadata = {"distrib_optim_sharding_type": sharding}
        return {"model": model, "optimizer": self.optimizer.sharded_state_dict(model, is_loading, metadata=metadata)}

    def save(self, folder: Path, sharding: str) -> None:
        from megatron.core import dist_checkpointing

        if torch.distributed.get_rank() == 0:
            folder.mkdir(parents=True)
        torch.distributed.barrier()
        dist_checkpointing.save(self.state(sharding, is_loading=False), str(folder))

    def load(self, folder: Path, sharding: str) -> None:
        from megatron.core import dist_checkpointing

        loaded = dist_checkpointing.load(self.state(sharding, is_loading=True), str(folder))
        self.layer.load_state_dict(loaded["model"])
        self.optimizer.load_state_dict(loaded["optimizer"])


def furthest(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The largest difference of two sets of parameters, relative to the largest value."""
    return max(((found[name] - value).abs().max() / value.abs().max()).item() for name, value in expected.items())


def every_move(folder: Path, sharding: str, width: int, stop: int, moves: list[tuple[str, str]]) -> dict[str, float]:
    """How far runs that changed their Adam after ``stop`` steps are from those that did not change it."""
    expected = {}
    for adam in dict.fromkeys(itertools.chain(*moves)):
        training = Training(adam, width)
        training.steps(stop)
        training.save(folder / adam, sharding)
        expected[adam] = training.steps(STEPS - stop)
    found = {}
    for before, after in moves:
        training = Training(after, width)
        training.load(folder / before, sharding)
        found[f"{before} to {after}"] = furthest(training.steps(STEPS - stop), expected[before])
    return found


def in_ranks(check: Any, *args: Any, world_size: int = 2, unpatched: str | None = None) -> list[Any]:
    """Run ``check`` on forked ranks, with one method of DistributedOptimizer put back as Megatron-Core ships it."""

    def worker(_rank: int) -> Any:
        if unpatched is not None:
            setattr(patching.resolve(DISTRIBUTED), unpatched, patching.original(f"{DISTRIBUTED}.{unpatched}"))
        with model_parallel():
            return check(*args)

    return run_ranks(worker, world_size, timeout=60)


@needs_te
@pytest.mark.parametrize(
    ("sharding", "cases"),
    [
        ("fully_reshardable", ((WITH_EMPTY_GROUP, STOP), (WITH_EMPTY_RANK, STOP), (WITH_EMPTY_GROUP, 0))),
        pytest.param("dp_reshardable", ((WITH_EMPTY_GROUP, STOP), (WITH_EMPTY_GROUP, 0)), marks=pytest.mark.slow),
    ],
)
def test_runs_move_between_all_adams(sharding: str, cases: tuple[tuple[int, int], ...], tmp_path: Path) -> None:
    moves = list(itertools.product(ADAMS, ADAMS))

    def check() -> dict[str, float]:
        found = {}
        for width, stop in cases:
            moved = every_move(tmp_path / f"{width}-{stop}", sharding, width, stop, moves)
            found |= {f"{name}, width {width}, after {stop} steps": far for name, far in moved.items()}
        return found

    for found in in_ranks(check):
        assert len(found) == len(moves) * len(cases)
        assert {name: far for name, far in found.items() if not far < 1e-6} == {}


@pytest.mark.parametrize(
    ("move", "stop", "method"),
    [
        (("torch", "apex"), STOP, "load_state_dict"),
        (("apex", "torch"), STOP, "load_state_dict"),
        (("apex", "apex"), 0, "state_dict"),
        (("apex", "apex"), STOP, "_set_main_param_and_optimizer_states"),
        pytest.param(("torch", "te"), STOP, "load_state_dict", marks=[needs_te, pytest.mark.slow]),
    ],
)
def test_they_do_not_without_the_patch(move: tuple[str, str], stop: int, method: str, tmp_path: Path) -> None:
    def check() -> bool:
        try:
            (far,) = every_move(tmp_path / "run", "dp_reshardable", WITH_EMPTY_GROUP, stop, [move]).values()
        except (KeyError, RuntimeError, CheckpointException):
            return False
        return far < 1e-6

    assert in_ranks(check, world_size=1, unpatched=method) == [False]


@pytest.mark.parametrize(
    ("adam", "method", "counts"),
    [
        *((adam, None, [STOP, STOP]) for adam in ("torch", "apex")),
        *((adam, "step_with_ready_grads", [STOP, 0]) for adam in ("torch", "apex")),
        pytest.param("te", None, [STOP, STOP], marks=[needs_te, pytest.mark.slow]),
    ],
)
def test_a_rank_without_parameters_counts_steps(adam: str, method: str | None, counts: list[int]) -> None:
    """All ranks load the count of the first one, which may own none of the trainable parameters."""

    def check() -> int:
        training = Training(adam, WITH_EMPTY_RANK)
        training.steps(STOP)
        state = training.optimizer.state_dict()
        training.optimizer.load_state_dict(state)
        (count,) = (group.get("step", 0) for group in training.optimizer.state_dict()["optimizer"]["param_groups"])
        return count

    assert in_ranks(check, unpatched=method) == counts
