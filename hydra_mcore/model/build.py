# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""From a model card to a model."""

from __future__ import annotations

from pathlib import Path

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.models import GPTModelConfig

from hydra_mcore.config import ConfigError, ModelCard, ModelShape
from hydra_mcore.errors import first_line
from hydra_mcore.model.attention_plan import AttentionPlan
from hydra_mcore.model.checkpoints import load_weights
from hydra_mcore.model.layer_specs import hydra_block_spec
from hydra_mcore.model.rotary import rotary_frequencies


def transformer_config(shape: ModelShape, dtype: torch.dtype, tp_size: int = 1, pp_size: int = 1) -> TransformerConfig:
    """Megatron's layer settings for a shape.

    Raises:
        ConfigError: layers that do not divide into pipeline stages, or a tensor-parallel size that Megatron refuses.
    """
    if shape.num_layers % pp_size:
        raise ConfigError(
            f"pipeline parallel size {pp_size} does not divide {shape.num_layers} layers; choose one that does"
        )
    try:
        return TransformerConfig(
            tensor_model_parallel_size=tp_size,
            pipeline_model_parallel_size=pp_size,
            transformer_impl="local",
            num_layers=shape.num_layers,
            hidden_size=shape.hidden_size,
            num_attention_heads=shape.num_heads,
            num_query_groups=shape.num_kv_groups,
            kv_channels=shape.head_dim,
            ffn_hidden_size=shape.ffn_hidden_size,
            layernorm_epsilon=shape.norm_epsilon,
            qk_layernorm=shape.qk_norm,
            normalization="RMSNorm",
            gated_linear_unit=True,
            activation_func=torch.nn.functional.silu,
            add_bias_linear=False,
            add_qkv_bias=shape.qkv_bias,
            bias_activation_fusion=False,
            bias_dropout_fusion=False,
            apply_rope_fusion=False,
            persist_layer_norm=False,
            gradient_accumulation_fusion=False,
            attention_dropout=0.0,
            hidden_dropout=0.0,
            params_dtype=dtype,
            bf16=dtype == torch.bfloat16,
            pipeline_dtype=dtype,
            hetereogenous_dist_checkpoint=True,
        )
    except ValueError as error:
        raise ConfigError(f"{first_line(error)}; choose another --tensor-model-parallel-size") from None


def model_config(card: ModelCard, stage: str, transformer: TransformerConfig) -> GPTModelConfig:
    """Megatron's model settings of a card, for a stage (align, distill, extend) or for "inference"."""
    shape = card.shape
    config = GPTModelConfig(
        transformer=transformer,
        vocab_size=shape.vocab_size,
        seq_length=shape.native_length,
        share_embeddings_and_output_weights=shape.tied_embeddings,
        position_embedding_type="rope",
        rotary_base=shape.rope_theta,
    )
    apply_card(config, card, stage)
    return config


def apply_card(config: GPTModelConfig, card: ModelCard, stage: str, fa_balance: str = "heads") -> None:
    """Put a card's HydraHead layers into Megatron's model settings, refusing a layout that cannot hold them."""
    transformer, shape = config.transformer, card.shape
    tp_size = transformer.tensor_model_parallel_size
    for what, size in (("vocabulary", shape.vocab_size), ("MLP width", shape.ffn_hidden_size)):
        if size % tp_size:
            raise ConfigError(
                f"tensor parallel size {tp_size} does not divide the {what} of {size}; choose one that does"
            )
    _, attention_factor = rotary_frequencies(shape)
    log_scale = card.options.log_scale_in(stage)
    plan = AttentionPlan(card.head_map, card.options, log_scale, fa_balance, attention_factor)
    plan.layout(0, tp_size)  # raises where the size does not divide the heads
    transformer.hetereogenous_dist_checkpoint = True
    # Of the MLP alone: align takes gradients of attention itself, and the local output layer would ask for Apex.
    fuse_gradients = transformer.gradient_accumulation_fusion
    transformer.gradient_accumulation_fusion = False
    config.transformer_layer_spec = hydra_block_spec(plan, fuse_gradients)


def contiguous_parts(model: GPTModel, shape: ModelShape) -> GPTModel:
    """Have a model hand its layers its shape's rotary angles, of whole rows: Megatron's own would be those of zigzag
    parts.
    """
    model.rotary_pos_emb.cp_group = None
    model.rotary_pos_emb.inv_freq, _ = rotary_frequencies(shape)
    return model


def build_model(
    card: ModelCard, stage: str = "inference", dtype: torch.dtype = torch.float32, initialize: bool = True
) -> GPTModel:
    """This rank's part of the model, weights not loaded; needs Megatron's process groups (``runtime.process_groups``).

    Without ``initialize``, Megatron's own layers keep whatever memory they were given.
    """
    groups = ProcessGroupCollection.use_mpu_process_groups()
    transformer = transformer_config(card.shape, dtype, groups.tp.size(), groups.pp.size())
    transformer.context_parallel_size, transformer.perform_initialization = groups.cp.size(), initialize
    config = model_config(card, stage, transformer)
    return contiguous_parts(config.get_builder_cls()(config).build_model(groups), card.shape)


def load_model(checkpoint_dir: str | Path, dtype: torch.dtype = torch.float32) -> tuple[ModelCard, GPTModel]:
    """Card and this rank's part of the model of a checkpoint folder, in evaluation mode."""
    card = ModelCard.load(checkpoint_dir)
    model = build_model(card, dtype=dtype)
    load_weights([model], checkpoint_dir)
    return card, model.eval()
