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
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from megatron.training.models import GPTModelConfig

from hydra_mcore.model.attention_plan import AttentionPlan
from hydra_mcore.model.hydra_attention import HydraAttention
from hydra_mcore.model.parameters import RMSNorm
from hydra_mcore.model.te_layers import TE_NAMES, te_mlp, uses_te


def hydra_layer_spec(plan: AttentionPlan, config: TransformerConfig, fuse_gradients: bool) -> ModuleSpec:
    """One transformer layer; ``fuse_gradients`` as in ``te_mlp``."""
    if uses_te(config):
        mlp = {"mlp": te_mlp(fuse_gradients), "sharded_state_dict_keys_map": TE_NAMES}
    else:
        local = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
        mlp = {"pre_mlp_layernorm": RMSNorm, "mlp": ModuleSpec(module=MLP, submodules=local)}
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(module=HydraAttention, params={"plan": plan}),
            self_attn_bda=get_bias_dropout_add,
            mlp_bda=get_bias_dropout_add,
            **mlp,
        ),
    )


def hydra_block_spec(
    plan: AttentionPlan, fuse_gradients: bool
) -> Callable[[GPTModelConfig, int | None], TransformerBlockSubmodules]:
    """The layers of one pipeline stage, in the form that Megatron's GPT builder asks for."""

    def spec(config: GPTModelConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
        num_layers = get_num_layers_to_build(config.transformer, vp_stage=vp_stage)
        layer = hydra_layer_spec(plan, config.transformer, fuse_gradients)
        return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=RMSNorm)

    return spec
