# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""What libraries say on every machine and no user can act on, silenced by its words."""

from __future__ import annotations

import logging
import os
import warnings

# How warnings begin, as regular expressions.
_WARNINGS = (
    r".*Apex (is|are) not installed",
    r"Only transformer-engine>=1\.7\.0 supports MoE",
    r"Could not determine rank from torch\.distributed",  # one process, without a launcher
    r"MimoModelConfig is experimental",  # another model's
    r"full scope is deprecated",  # Megatron's own default
    r"The pad token id in the tokenizer collides",  # no row is padded
    r"The \.grad attribute of a Tensor that is not a leaf",  # Megatron's optimizer asks views of its buffers
    # each rank loads by itself:
    r"torch\.distributed is disabled, unavailable or uninitialized, assuming the intent is to load",
    r"The argument order of load has been changed",  # Megatron's call of torch.distributed.checkpoint
)
# What is advice about a GPU, and said by every rank.
_GPU_ADVICE = r"When using async grad allreduce it is recommended"
# How records of a logger begin.
_RECORDS = {
    "megatron.core.models.gpt.gpt_model": "GPTModel IS DEPRECATED",
    "megatron.core.transformer.transformer_layer": "Rewrapping ModuleSpec",
    "megatron.core.dist_checkpointing.strategies.torch": "MCore's async save is deprecated",
    "megatron.core.rerun_state_machine": "RerunStateMachine initialized",
}
_RECORDS_ON_A_CPU = {
    "torch.utils.cpp_extension": "No CUDA runtime is found",
    "megatron.core.tensor_parallel.random": "CPU RNG state changed",  # the two generators it compares are one here
}


def silence(on_cpu: bool) -> None:
    """Drop these warnings and records from now on; call it once a process."""
    advised = not on_cpu and os.environ.get("RANK", "0") == "0"
    for message in (*_WARNINGS, *(() if advised else (_GPU_ADVICE,))):
        warnings.filterwarnings("ignore", message=message)
    for name, beginning in (_RECORDS | (_RECORDS_ON_A_CPU if on_cpu else {})).items():
        logging.getLogger(name).addFilter(_NotAbout(beginning))


class _NotAbout(logging.Filter):
    """Drops the log records that start with a text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self.text)
