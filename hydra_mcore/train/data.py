# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Training data: Megatron's blended IndexedDatasets, and the batches of a layout."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state as mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.models.gpt import GPTModel
from megatron.core.utils import get_batch_on_this_tp_rank
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage
from torch import Tensor

from hydra_mcore.config import ConfigError

KEYS = ("tokens", "labels", "loss_mask", "position_ids", "attention_mask")


def check_data(args: argparse.Namespace) -> None:
    """Refuse data that is missing or shorter than one sequence, before anything is built.

    Raises:
        ConfigError: no data path, a missing file, or fewer tokens than seq-length + 1.
    """
    if args.mock_data:
        return
    blend, per_split = get_blend_and_blend_per_split(args)
    prefixes = (blend or (per_split or [None])[0] or (None,))[0]
    if not prefixes:
        raise ConfigError("no training data: set data-path in the recipe (the prefix of a .bin/.idx pair)")
    for prefix in prefixes:
        if not (Path(f"{prefix}.idx").is_file() and Path(f"{prefix}.bin").is_file()):
            raise ConfigError(f"training data {prefix}: no {prefix}.idx and .bin; write them first")
        dataset = IndexedDataset(prefix)  # its arrays are views of a memory map that must outlive the sum
        tokens = int(np.sum(dataset.sequence_lengths))
        if tokens < args.seq_length + 1:
            raise ConfigError(
                f"training data {prefix} holds {tokens} tokens, one sequence needs {args.seq_length + 1}; shorten seq-length or add data"
            )


def build_datasets(args: argparse.Namespace, tokenizer: Any, num_samples: list[int], vp_stage: int | None) -> tuple:
    """Train, validation and test sets of GPTDataset samples (documents concatenated, cut to seq-length + 1)."""
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=False,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
    )

    def on_this_rank() -> bool:
        return mpu.get_tensor_model_parallel_rank() == 0 and is_first_or_last_pipeline_stage(vp_stage)

    return BlendedMegatronDatasetBuilder(GPTDataset, num_samples, on_this_rank, config).build()


def fetch_batch(args: argparse.Namespace, data_iterator: Any, model: GPTModel) -> dict[str, Tensor | None]:
    """The next micro-batch on this rank: read by tensor-parallel rank 0, sent to the others; None inside the pipeline."""
    if not is_first_or_last_pipeline_stage(model.vp_stage):
        return dict.fromkeys(KEYS)
    batch: dict[str, Tensor | None] = {}
    if mpu.get_tensor_model_parallel_rank() == 0:
        sample = next(data_iterator)
        batch = {key: sample[key].to(torch.cuda.current_device(), non_blocking=True) if key in sample else None for key in KEYS}
    return get_batch_on_this_tp_rank(
        batch,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        create_attention_mask_in_dataloader=False,
        cp_size=args.context_parallel_size,
        tp_rank=mpu.get_tensor_model_parallel_rank(),
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=False,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=mpu.is_pipeline_first_stage(),
        is_pipeline_last_stage=mpu.is_pipeline_last_stage(),
        has_cu_seqlens=False,
        is_hybrid_cp=False,
    )
