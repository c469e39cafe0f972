# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Which settings a training reads, after they were parsed and checked: by the names of what flags set, or of the fields
that Megatron makes of them.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer import TransformerConfig
from megatron.training import config

from hydra_mcore.train import run

CONFIGS = [TransformerConfig, OptimizerConfig, DistributedDataParallelConfig]
CONFIGS += [kind for name, kind in vars(config).items() if name.endswith("Config")]
# Code that hands all settings on, checks or prints them, without doing what they ask for.
HANDING_ON = {"argument_utils.py", "arguments.py", "argparse.py", "copy.py", "dataclasses.py", "<string>"}
HANDING_ON |= {Path(sys.modules[kind.__module__].__file__ or "").name for kind in CONFIGS}
HANDING_ON |= {"model_parallel_config.py", "theoretical_memory_usage.py"}
HANDING_ON |= {"get_megatron_optimizer_config", "get_megatron_ddp_config"}  # functions among them
HANDING_ON |= {"write_args_to_tensorboard", "check_checkpoint_args"}


class ReadArguments(argparse.Namespace):
    """Megatron's arguments, watched."""

    def __reduce__(self) -> tuple[Any, ...]:  # a checkpoint holds them, as what they were
        return argparse.Namespace, (), dict(self.__dict__)


def settings_read(rank: int, argv: list[str]) -> set[str]:
    """Train in this process, which is forked for it, and return the names of the settings that were read."""
    found: set[str] = set()
    for kind in (ReadArguments, *CONFIGS):
        kind.__getattribute__ = _noting(kind.__getattribute__, found)
    stock = run._validated

    def validated(resolved: run.ResolvedStage) -> tuple[Any, ...]:
        args, *rest = stock(resolved)
        args.__class__ = ReadArguments
        found.clear()
        return args, *rest

    run._validated = validated
    try:
        run.run_stage(argv)
    except SystemExit as ended:  # of --exit-interval
        assert not ended.code
    return found


def _noting(stock: Any, found: set[str]) -> Any:
    def read(self: Any, name: str) -> Any:
        code = sys._getframe(1).f_code
        if not {Path(code.co_filename).name, code.co_name} & HANDING_ON:
            found.add(name)
        return stock(self, name)

    return read
