# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Run and train the teacher's shape in transformers, with random weights."""

from __future__ import annotations

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from hydra_mcore.config import ModelShape
from hydra_mcore.train.data import MicroBatch

FORWARD, STEP = "transformers, forward", "transformers, training step"


class TransformersTeacher:
    """A Qwen3 model with transformers' defaults; a step adds to gradients that are there before."""

    def __init__(self, shape: ModelShape, dtype: torch.dtype) -> None:
        config = Qwen3Config(
            num_hidden_layers=shape.num_layers, hidden_size=shape.hidden_size, num_attention_heads=shape.num_heads,
            num_key_value_heads=shape.num_kv_groups, head_dim=shape.head_dim, intermediate_size=shape.ffn_hidden_size,
            vocab_size=shape.vocab_size, max_position_embeddings=shape.native_length,
            tie_word_embeddings=shape.tied_embeddings, use_cache=False, dtype=dtype,
        )  # fmt: skip
        self.model = Qwen3ForCausalLM(config).to(torch.cuda.current_device())
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)

    @torch.no_grad()
    def forward(self, batch: MicroBatch) -> None:
        """The logits of all tokens."""
        self.model(batch.tokens_bs)

    def step(self, batch: MicroBatch) -> None:
        """Cross-entropy of the next token, and its gradients."""
        self.model(batch.tokens_bs, labels=batch.tokens_bs).loss.backward()
