# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""``megatron.training.pretrain`` on a stock model and a made-up dataset: what the engine does without our code."""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from megatron.core.enums import ModelType
from megatron.core.tokenizers import text as _text  # noqa: F401  (slow: before the fork, not in every rank)
from megatron.training import get_args, get_tokenizer, pretrain
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args
from megatron.training.utils import get_blend_and_blend_per_split

VOCAB = 64
SEQ_LENGTH = 32
# What a machine without a GPU, TE and Apex needs, then a model and a run that take seconds.
FLAGS = f"""
    --transformer-impl local --no-persist-layer-norm --no-gradient-accumulation-fusion --no-rope-fusion
    --no-masked-softmax-fusion --no-bias-swiglu-fusion --no-bias-dropout-fusion
    --distributed-backend gloo --num-workers 0
    --num-layers 2 --hidden-size 32 --num-attention-heads 4 --ffn-hidden-size 64 --swiglu --disable-bias-linear
    --position-embedding-type rope --normalization RMSNorm --make-vocab-size-divisible-by 8
    --attention-dropout 0.1 --hidden-dropout 0.1
    --seq-length {SEQ_LENGTH} --max-position-embeddings {SEQ_LENGTH}
    --tokenizer-type NullTokenizer --vocab-size {VOCAB - 1}
    --micro-batch-size 2 --global-batch-size 4 --lr 1e-2 --min-lr 1e-3 --lr-decay-style cosine --lr-decay-iters 100
    --weight-decay 0.1 --clip-grad 1.0 --use-distributed-optimizer --eval-iters 1 --eval-interval 1000
    --log-interval 1 --split 90,5,5
""".split()


def write_dataset(prefix: Path) -> Path:
    """Write an IndexedDataset of 64 documents that count upwards, and return ``prefix``."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    random = np.random.default_rng(0)
    for _ in range(64):
        document = (np.arange(random.integers(20, 80)) + random.integers(VOCAB)) % (VOCAB - 1)
        builder.add_document(document, [len(document)])
    builder.finalize(f"{prefix}.idx")
    return prefix


def train(flags: list[str], pre_wrap_hook: Callable[[list[Any]], list[Any]] | None = None) -> list[float]:
    """Run ``pretrain`` in this rank and return this rank's loss of every micro-batch, where the rank has one.

    Args:
        flags: Megatron's, added to ``FLAGS``.
        pre_wrap_hook: run on the model chunks before they are wrapped for data parallelism.
    """
    sys.argv = ["train", *FLAGS, *flags]
    args = parse_and_validate_args()
    config = gpt_config_from_args(args)
    if pre_wrap_hook is not None:
        config.pre_wrap_hooks.append(pre_wrap_hook)
    losses: list[float] = []
    _datasets.is_distributed = True  # type: ignore[attr-defined]
    container = pretrain_cfg_container_from_args(args, config)
    pretrain(container, _datasets, ModelType.encoder_or_decoder, partial(_forward_step, losses))
    return losses


def _datasets(num_samples: list[int], vp_stage: int | None = None) -> Any:
    args = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        path_to_cache=args.data_cache_path,
        tokenizer=get_tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=args.create_attention_mask_in_dataloader,
    )
    # Every rank reads its batches itself: nothing has to be broadcast at this size.
    return BlendedMegatronDatasetBuilder(GPTDataset, num_samples, lambda: True, config).build()


def _forward_step(losses: list[float], batches: Iterator[dict[str, torch.Tensor]], model: Any) -> tuple[Any, Any]:
    batch = next(batches)
    tokens, positions, mask, labels, loss_mask = (
        batch[key].cuda() for key in ("tokens", "position_ids", "attention_mask", "labels", "loss_mask")
    )
    output = model(tokens, positions, mask, labels=labels)
    return output, partial(_loss, losses if model.training else [], loss_mask)


def _loss(losses: list[float], loss_mask: torch.Tensor, output: torch.Tensor) -> tuple[Any, Any, dict[str, Any]]:
    loss = (output.float() * loss_mask).sum()
    tokens = loss_mask.sum().to(torch.int)
    losses.append((loss / tokens).item())
    return loss, tokens, {"lm loss": torch.stack([loss.detach(), tokens.float()])}
