# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Random HydraHead models in exported folders, loaded as a user loads them: by transformers, with the code in the
folder.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from hydra_mcore.convert.hf_code import AUTO_MAP, copy_model_code
from tests.support.tiny_hf import ODD

ALL = [0, 1, 2, 3, 4, 5]
# Heads of every kind; of every kind but FA. Some kinds have heads in uneven kv groups, or in one group alone.
EVERY_KIND = {"fa": [1, 4, 5], "gdn": [0], "kda": [2], "lightning": [3]}
RECURRENT = {"gdn": [3], "kda": [0, 5], "lightning": [1, 2, 4]}
TINY: dict[str, Any] = {**ODD, "tie_word_embeddings": False, "heads": [EVERY_KIND, RECURRENT, {"fa": ALL}]}


def write_config(folder: Path, **changes: Any) -> Path:
    """A folder with the model's code and config.json, as an export writes it, without weights."""
    copy_model_code(folder)
    config = {
        **TINY,
        "model_type": "hydra_head",
        "architectures": ["HydraHeadForCausalLM"],
        "auto_map": AUTO_MAP,
        **changes,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def load(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> PreTrainedModel:
    """The model of a folder, in evaluation mode."""
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=dtype, **options)


def fresh(folder: Path, **changes: Any) -> PreTrainedModel:
    """A model with the weights of its own initialisation, written nowhere."""
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(write_config(folder, **changes), trust_remote_code=True)
    return AutoModelForCausalLM.from_config(config, trust_remote_code=True).eval()


@torch.no_grad()
def scramble(model: torch.nn.Module) -> None:
    """Weights that leave no part without effect: norms near 1, gates and decays spread out."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        is_factor = parameter.dim() == 1 and ("norm" in name or "scale" in name)
        parameter.copy_(1 + 0.3 * noise if is_factor else 0.2 * noise)


def random_model(folder: Path, dtype: torch.dtype = torch.float64, **changes: Any) -> PreTrainedModel:
    """A model of random weights, saved to and loaded from ``folder``."""
    model = fresh(folder, **changes)
    scramble(model)
    model.save_pretrained(folder)
    return load(folder, dtype)


# Together every value of every option and layers of one kind alone, with biases and scaled rotary positions.
VARIANTS: list[dict[str, Any]] = [
    {},
    {
        "fa_position": "rope", "fa_log_scale": "always", "fa_log_scale_base": 7.0, "gdn_kv": "per_group",
        "kda_kv": "per_group", "lightning_kv": "per_group", "lightning_slope": 0.5, "qkv_bias": True,
        "heads": [{"kda": ALL}, EVERY_KIND, {"lightning": ALL}],
    },
    {
        "fa_gate": "headwise", "gdn_gate": "elementwise", "kda_gate": "headwise", "lightning_gate": "headwise",
        "gate_order": "after_norm", "gdn_conv_kernel": 2, "kda_conv_kernel": 1, "gdn_conv_activation": "silu",
        "gdn_write_max": 2.0, "fusion": "competition", "fusion_norm_weight": "none",
        "heads": [EVERY_KIND, RECURRENT, {"gdn": ALL}],
    },
    {
        "fa_gate": "none", "fa_log_scale": "never", "gdn_position": "nope", "kda_position": "nope",
        "lightning_position": "nope", "gdn_qk_norm": "none", "kda_qk_norm": "none", "lightning_qk_norm": "none",
        "gdn_conv_kernel": 0, "kda_conv_kernel": 0, "lightning_gate": "none", "qkv": "shared", "qkv_bias": True,
        "fusion": "none", "tie_word_embeddings": True,
    },
    {
        "gdn_gate": "headwise", "kda_gate": "elementwise", "gate_activation": "silu", "fusion": "norm",
        "qk_norm": False, "gdn_conv_kernel": 1, "kda_conv_kernel": 2, "kda_conv_activation": "silu",
        "kda_write_max": 2.0, "fa_position": "rope", "gdn_half_life": 5.0, "kda_half_life": 5.0,
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0,
            "original_max_position_embeddings": 16},
    },
]  # fmt: skip
each_variant = pytest.mark.parametrize(
    "options", VARIANTS, ids=lambda options: " ".join(map(str, options.values()))[:40] or "default"
)


def random_tokens(*shape: int, seed: int = 1) -> Tensor:
    """Token ids from 1; 0 is left for padding."""
    return torch.randint(1, TINY["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))
