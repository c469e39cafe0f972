# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Random models of odd shapes, made and saved by transformers: the outside truth that imports are held to."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

# head_dim is not hidden_size / heads, three query heads share a kv group, no two sizes are equal.
ODD: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
}


def tiny_qwen3(hf_dir: Path | None = None, max_shard_size: str = "1GB", **changes: Any) -> PreTrainedModel:
    """``tiny_model`` of the family that most tests use."""
    return tiny_model("qwen3", hf_dir, max_shard_size, **changes)


def tiny_model(family: str, hf_dir: Path | None = None, max_shard_size: str = "1GB", **changes: Any) -> PreTrainedModel:
    """A random float32 model, saved to ``hf_dir`` if given; a change to None takes a key out of its config.

    No weight is left at a value that would hide a mix-up.
    """
    torch.manual_seed(0)
    settings = {
        **ODD,
        **({"hidden_size": 48} if family == "llama" else {}),
        **changes,
    }  # Llama's heads must divide the width
    config = AutoConfig.for_model(family, **{key: value for key, value in settings.items() if value is not None})
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.15 + (1.0 if "norm" in name else 0.0))
    if hf_dir is not None:
        model.save_pretrained(hf_dir, max_shard_size=max_shard_size)
    return model


def random_tokens(num_sequences: int = 3, length: int = 33) -> torch.Tensor:
    """Token ids [b, s] of the odd model's vocabulary."""
    return torch.randint(ODD["vocab_size"], (num_sequences, length), generator=torch.Generator().manual_seed(1))
