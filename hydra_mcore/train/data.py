# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Training data: Megatron's blended IndexedDatasets, and the batches of a layout."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from megatron.core import parallel_state as mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage
from torch import Tensor

from hydra_mcore.config import ConfigError
from hydra_mcore.corpus.manifest import Manifest, finished_path, prefix_of_shard
from hydra_mcore.corpus.tokenize import fingerprint, load_fast_tokenizer
from hydra_mcore.sequence import SequencePart


class MicroBatch(NamedTuple):
    """A micro-batch on one rank: its part of the tokens, [b, s] each, None inside the pipeline.

    ``documents`` bounds the documents of whole rows, where they are packed.
    """

    tokens_bs: Tensor | None = None
    labels_bs: Tensor | None = None
    mask_bs: Tensor | None = None
    position_ids_bs: Tensor | None = None
    documents: PackedSeqParams | None = None


def check_data(args: argparse.Namespace) -> None:
    """Refuse data that is missing, too short or made for another model, before anything is built.

    Raises:
        ConfigError: no data path, a missing file, fewer tokens than seq-length + 1, fewer documents than the split
            needs, prepared data that is not what its manifest says, or is from another tokenizer than the student's.
    """
    blend, per_split = get_blend_and_blend_per_split(args)
    if per_split and args.split:
        raise ConfigError("split is for data-path; with data of its own for each part leave it out")
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
                f"training data {prefix} holds {tokens} tokens, one sequence needs {args.seq_length + 1}; shorten"
                " seq-length or add data"
            )
        if blend:
            _check_split(prefix, len(dataset.document_indices) - 1, args.split)
    for prepared in sorted({owner for prefix in prefixes if (owner := prefix_of_shard(prefix))}):
        _check_prepared(prepared, args)


def _check_split(prefix: str, documents: int, split: str) -> None:
    """Raise ConfigError where rounding leaves a part of the split without documents: Megatron would loop on it
    forever.
    """
    for part in filter(None, convert_split_vector_to_split_matrix(parse_and_normalize_split(split))):
        first, end = (round(bound * documents) for bound in part)
        if first == end:
            raise ConfigError(
                f"training data {prefix}: split {split} leaves a part of its {documents} documents empty; set split"
                " 100,0,0 or add data"
            )


def _check_prepared(prefix: str, args: argparse.Namespace) -> None:
    """Raise ConfigError for shards of tools/prepare_data.py that changed since, or that are not for this model."""
    path = finished_path(prefix)
    manifest = Manifest.load(path)
    manifest.check_files(path.parent)
    if manifest.max_id >= args.vocab_size:
        raise ConfigError(
            f"{path}: holds token {manifest.max_id}, the model has {args.vocab_size} words; prepare the data with the"
            " model's tokenizer"
        )
    if args.tokenizer_type != "HuggingFaceTokenizer":
        return
    tokenizer = load_fast_tokenizer(args.tokenizer_model)
    theirs, ours = manifest.run["tokenizer"]["fingerprint"], fingerprint(tokenizer.backend_tokenizer.to_str())
    if theirs != ours:
        raise ConfigError(
            f"{path}: was made with another tokenizer (fingerprint {theirs[:12]}) than {args.tokenizer_model}"
            f" ({ours[:12]}); prepare the data with the model's tokenizer"
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
        inter_document_masking=args.packed_documents,
    )

    def on_this_rank() -> bool:
        return mpu.get_tensor_model_parallel_rank() == 0 and _reads_data(args, vp_stage)

    return BlendedMegatronDatasetBuilder(GPTDataset, num_samples, on_this_rank, config).build()


def fetch_micro_batch(
    args: argparse.Namespace, waiting: Callable[[], AbstractContextManager], data_iterator: Any, model: GPTModel
) -> MicroBatch:
    """The next micro-batch of this rank: read by tensor-parallel rank 0, sent to the others, cut to the rank's part.

    The reading stands inside ``waiting()``, which may bound how long it takes. Inside the pipeline only document
    boundaries
    are needed: without packed documents nothing is read there.

    Raises:
        InputError: document boundaries that do not increase from 0 to the sequence length.
    """
    if not _reads_data(args, model.vp_stage):
        return MicroBatch()
    tokens, labels, mask, position_ids = _broadcast_rows(args, waiting, data_iterator)
    documents = None
    bounds = (0, args.seq_length)
    if args.packed_documents:
        rows = position_ids[0].eq(0).nonzero().flatten().tolist()  # each document counts its positions from 0
        bounds = (*rows, args.seq_length)
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32)  # on the host, where the layers read it
        length = args.seq_length
        documents = PackedSeqParams("thd", cu_seqlens, cu_seqlens, max_seqlen_q=length, max_seqlen_kv=length)
    part = SequencePart(args.seq_length, mpu.get_context_parallel_world_size(), mpu.get_context_parallel_rank(), bounds)
    mine = slice(part.start, part.start + part.num_tokens)
    return MicroBatch(tokens[:, mine], labels[:, mine], mask[:, mine].float(), position_ids[:, mine], documents)


def _reads_data(args: argparse.Namespace, vp_stage: int | None) -> bool:
    return args.packed_documents or is_first_or_last_pipeline_stage(vp_stage)


def _broadcast_rows(
    args: argparse.Namespace, waiting: Callable[[], AbstractContextManager], data_iterator: Any
) -> Tensor:
    """Tokens, labels, loss mask and positions of the next micro-batch, [4, b, s], from tensor-parallel rank 0 to
    all.
    """
    shape = (4, args.micro_batch_size, args.seq_length)
    if mpu.get_tensor_model_parallel_rank() == 0:
        with waiting():
            sample = next(data_iterator)
        rows = torch.stack([sample[key].long() for key in ("tokens", "labels", "loss_mask", "position_ids")])
        rows = rows.to(torch.cuda.current_device(), non_blocking=True)
    else:
        rows = torch.empty(shape, dtype=torch.long, device=torch.cuda.current_device())
    if mpu.get_tensor_model_parallel_world_size() > 1:
        torch.distributed.broadcast(
            rows, mpu.get_tensor_model_parallel_src_rank(), mpu.get_tensor_model_parallel_group()
        )
    return rows
