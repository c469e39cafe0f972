# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""What a command line needs around a model: process groups without a training loop, and one-line errors."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator

import torch
from megatron.core import parallel_state, tensor_parallel

from hydra_mcore.heads import InputError


@contextlib.contextmanager
def process_groups(seed: int = 1234) -> Iterator[None]:
    """Megatron's process groups for this process alone.

    Raises:
        InputError: a launcher started several ranks.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("runs on one process; start it without torchrun")
    logging.getLogger("megatron").setLevel(logging.ERROR)  # its advice is about training; a command has its own output
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    # a store in this process needs no port that could be taken
    torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


@contextlib.contextmanager
def one_line_errors(command: str) -> Iterator[None]:
    """Turn bad input into one line on stderr and exit status 2; other errors keep their traceback."""
    try:
        yield
    except InputError as error:
        print(f"{command}: {error}", file=sys.stderr)
        sys.exit(2)
