# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""What a command line needs around a model: process groups without a training loop."""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
from collections.abc import Callable, Iterator

import torch
from megatron.core import parallel_state, tensor_parallel

from hydra_mcore.errors import InputError
from hydra_mcore.files import disk_problem, disk_refusal

TIMEOUT = datetime.timedelta(minutes=30)  # nothing waits forever, but a rank may have minutes of work more than another


@contextlib.contextmanager
def process_groups(
    tp_size: int = 1, pp_size: int = 1, seed: int = 1234, alone: bool = True, cp_size: int = 1
) -> Iterator[None]:
    """Megatron's process groups, without a training loop.

    Args:
        tp_size, pp_size, cp_size: tensor-, pipeline- and context-parallel ranks; what a launcher started beyond them is
            data parallel.
        alone: the command runs on one process only.

    Raises:
        InputError: a launcher started several ranks and the command runs alone, or not a multiple of the three sizes.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if alone and world_size > 1:
        raise InputError("runs on one process; start it without torchrun")
    if min(tp_size, pp_size, cp_size) < 1 or world_size % (tp_size * pp_size * cp_size):
        sizes = f"{tp_size} tensor-parallel x {pp_size} pipeline-parallel" + (
            f" x {cp_size} context-parallel" if cp_size != 1 else ""
        )
        raise InputError(
            f"{world_size} processes are no multiple of {sizes} ranks; start {tp_size * pp_size * cp_size} with"
            " torchrun --nproc-per-node"
        )
    logging.getLogger("megatron").setLevel(logging.ERROR)  # its advice is about training; a command has its own output
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if world_size > 1:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group(backend, timeout=TIMEOUT)
    else:
        # a store in this process needs no port that could be taken
        torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp_size, pipeline_model_parallel_size=pp_size, context_parallel_size=cp_size
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def from_first_rank[T](make: Callable[[], T]) -> T:
    """What ``make`` gives on rank 0, on every rank; an InputError there, or a disk that refuses, is raised on all of
    them.
    """
    outcome: list[T | InputError | None] = [None]
    if torch.distributed.get_rank() == 0:
        try:
            outcome[0] = make()
        except InputError as error:
            outcome[0] = error
        except Exception as error:
            if (refusal := disk_refusal(error)) is None:
                raise
            outcome[0] = InputError(disk_problem(refusal))
    torch.distributed.broadcast_object_list(outcome, src=0)
    if isinstance(outcome[0], InputError):
        raise outcome[0]
    return outcome[0]
