# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Megatron layer specs in which HydraAttention stands where self-attention stood."""

from __future__ import annotations

from collections.abc import Callable

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from megatron.training.models import GPTModelConfig

from hydra_mcore.model.attention_plan import AttentionPlan
from hydra_mcore.model.hydra_attention import HydraAttention
from hydra_mcore.model.parameters import RMSNorm


def hydra_layer_spec(plan: AttentionPlan) -> ModuleSpec:
    """One transformer layer."""
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(module=HydraAttention, params={"plan": plan}),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=ModuleSpec(
                module=MLP, submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
            ),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def hydra_block_spec(plan: AttentionPlan) -> Callable[[GPTModelConfig, int | None], TransformerBlockSubmodules]:
    """The layers of one pipeline stage, in the form that Megatron's GPT builder asks for."""

    def spec(config: GPTModelConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
        num_layers = get_num_layers_to_build(config.transformer, vp_stage=vp_stage)
        return TransformerBlockSubmodules(layer_specs=[hydra_layer_spec(plan)] * num_layers, layer_norm=RMSNorm)

    return spec
