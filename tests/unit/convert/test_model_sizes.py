# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Models of 0.5B to 32B parameters, by shape alone: the tables count the published parameters, and the model wants
those tensors.
"""

import json
import math
from pathlib import Path

import pytest
import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

from hydra_mcore.convert.hf_config import read_config
from hydra_mcore.convert.tensor_table import tensor_rules
from hydra_mcore.model.build import build_model
from hydra_mcore.model.runtime import process_groups
from hydra_mcore.model.streaming import WithoutMemory

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# model_type, layers, width, heads, kv groups, MLP width, vocabulary, tied, more keys, parameters as published
MODELS = {
    "Qwen2.5-0.5B": ("qwen2", 24, 896, 14, 2, 4864, 151936, True, {}, 494_032_768),
    "Qwen3-1.7B": ("qwen3", 28, 2048, 16, 8, 6144, 151936, True, {"head_dim": 128}, 1_720_574_976),
    "Llama-3.2-1B": (
        "llama",
        16,
        2048,
        32,
        8,
        8192,
        128256,
        True,
        {"head_dim": 64, "rope_scaling": LLAMA3},
        1_235_814_400,
    ),
    "Qwen2.5-7B": ("qwen2", 28, 3584, 28, 4, 18944, 152064, False, {}, 7_615_616_512),
    "Llama-3.1-8B": ("llama", 32, 4096, 32, 8, 14336, 128256, False, {"rope_scaling": LLAMA3}, 8_030_261_248),
    "Qwen3-8B": ("qwen3", 36, 4096, 32, 8, 12288, 151936, False, {"head_dim": 128}, 8_190_735_360),
    "Qwen3-32B": ("qwen3", 64, 5120, 64, 8, 25600, 151936, False, {"head_dim": 128}, 32_762_123_264),
    "Qwen2.5-32B": ("qwen2", 64, 5120, 40, 8, 27648, 152064, False, {}, 32_763_876_352),
}


@pytest.mark.parametrize("name", MODELS)
def test_published_models_fit_the_tables(tmp_path: Path, name: str) -> None:
    family, layers, width, heads, groups, ffn, vocabulary, tied, more, parameters = MODELS[name]
    config = {
        "model_type": family, "num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": heads,
        "num_key_value_heads": groups, "intermediate_size": ffn, "vocab_size": vocabulary,
        "max_position_embeddings": 32768,
        "rope_theta": 1e6, "tie_word_embeddings": tied, **more,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    card = read_config(tmp_path)
    rules = tensor_rules(card)
    assert sum(math.prod(rule.shape) for rule in rules.values()) == parameters
    with process_groups(), WithoutMemory():
        state = build_model(card, dtype=torch.bfloat16, initialize=False).sharded_state_dict()
        apply_factories(state)
    wanted = {
        item.key: math.prod(item.global_shape) for item in nested_values(state) if isinstance(item, ShardedTensor)
    }
    filled = dict.fromkeys((rule.stored for rule in rules.values()), 0)
    for rule in rules.values():
        filled[rule.stored] += math.prod(rule.shape)
    assert filled == wanted
