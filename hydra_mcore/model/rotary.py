# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Rotary frequencies of a shape, scaled as its teacher's are."""

from __future__ import annotations

from typing import Any

from huggingface_hub.errors import StrictDataclassError
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from hydra_mcore.config import ConfigError, ModelShape
from hydra_mcore.files import shown

ROPE_TYPES = ("linear", "llama3", "yarn")  # "dynamic" and "longrope" change the frequencies with the length of the text


def rotary_frequencies(shape: ModelShape) -> tuple[Tensor, float]:
    """Radians a token of each pair of channels, [d / 2] float32, and the attention factor: what scales cosine and sine.

    Transformers' own functions scale (they are what the teacher was trained or extended with); the factor is 1.0 but
    for yarn (arXiv 2309.00071).

    Raises:
        ConfigError: a rope type that is not supported, or parameters that its function cannot use.
    """
    scaling = shape.rope_scaling
    if scaling is None:
        return (
            RotaryEmbedding(shape.head_dim, 1.0, rotary_base=shape.rope_theta, use_cpu_initialization=True).inv_freq,
            1.0,
        )
    rope_type = scaling.get("rope_type")
    if rope_type not in ROPE_TYPES:
        raise ConfigError(
            f"rope_scaling has rope_type {shown(rope_type)}; supported are {', '.join(ROPE_TYPES)}, so take another"
            " teacher"
        )
    try:
        config = PreTrainedConfig(
            hidden_size=shape.hidden_size,
            num_attention_heads=shape.num_heads,
            head_dim=shape.head_dim,
            max_position_embeddings=shape.native_length,
            rope_parameters={**scaling, "rope_theta": shape.rope_theta},
        )
        if not scaling["factor"] > 0:
            raise ValueError("the factor must be positive")
        return ROPE_INIT_FUNCTIONS[rope_type](config)
    except (KeyError, TypeError, ValueError, ArithmeticError, StrictDataclassError) as error:
        reason = str(error).splitlines()[-1].strip()[:100]
        raise ConfigError(
            f"rope_scaling {shown(scaling)} cannot be used ({reason}); correct it in the teacher's config.json"
        ) from None


def yarn_scaling(factor: float, native_length: int, scaling: dict[str, Any] | None) -> dict[str, Any]:
    """The ``rope_scaling`` that stretches a model's positions by a factor as YaRN does (arXiv 2309.00071).

    Args:
        native_length: tokens that the model was pretrained for.
        scaling: the model's own scaling, which there must not be.

    Raises:
        ConfigError: a factor that does not exceed 1, or a model that is scaled already.
    """
    if not 1.0 < factor < float("inf"):
        raise ConfigError(f"YaRN's factor is {factor}; it must exceed 1, as length / native length")
    if scaling is not None:
        raise ConfigError(
            f"its positions are scaled already ({scaling.get('rope_type')!r}), so YaRN has no native ones to stretch"
        )
    return {"rope_type": "yarn", "factor": float(factor), "original_max_position_embeddings": native_length}
