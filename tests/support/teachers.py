# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""A random teacher that is nowhere trivial, and random counterfactual pairs for it."""

from __future__ import annotations

import torch
from megatron.core.models.gpt import GPTModel

from hydra_mcore.config import ModelShape, teacher_card
from hydra_mcore.model.build import build_model
from hydra_mcore.selection.probes import ProbeBatch

PAIRS, LENGTH, ANSWER, VOCABULARY = 3, 24, 4, 96
# Grouped queries, head_dim that is not hidden / heads.
SHAPE = ModelShape(
    num_layers=4, hidden_size=48, num_heads=6, num_kv_groups=2, head_dim=16, ffn_hidden_size=80, vocab_size=VOCABULARY,
    native_length=64, rope_theta=1e4, tied_embeddings=False,
)  # fmt: skip


def random_teacher(shape: ModelShape = SHAPE, dtype: torch.dtype = torch.float32) -> GPTModel:
    """Random norms and large weights, so that every head does something; whole on this process."""
    model = build_model(teacher_card(shape, "0" * 64), dtype=dtype).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * noise if "norm" in name else 0.15 * noise)
    return model


def random_pairs() -> ProbeBatch:
    generator = torch.Generator().manual_seed(6)
    clean_bs = torch.randint(VOCABULARY, (PAIRS, LENGTH), generator=generator)
    corrupt_bs = clean_bs.clone()
    corrupt_bs[:, 5 : 5 + ANSWER] = (clean_bs[:, 5 : 5 + ANSWER] + 7) % VOCABULARY
    answer_bp = clean_bs[:, -ANSWER:]
    return ProbeBatch(
        probe="random",
        capability="retrieval",
        clean_bs=clean_bs,
        corrupt_bs=corrupt_bs,
        answer_start=LENGTH - ANSWER,
        answer_bp=answer_bp,
        distractor_bp=(answer_bp + 11) % VOCABULARY,
        source_bp=torch.arange(5, 5 + ANSWER).expand(PAIRS, -1),
    )


def tensors(batch: ProbeBatch) -> tuple:
    """What the naive functions take, in their order."""
    return batch.clean_bs, batch.corrupt_bs, batch.answer_start, batch.answer_bp, batch.distractor_bp
