# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The exported model as vLLM runs it: its own layers and names of weights, what they remember in vLLM's cache."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.mamba.mamba_utils import MambaStateCopyFuncCalculator
from vllm.model_executor.layers.vocab_parallel_embedding import (
    DEFAULT_VOCAB_PADDING_SIZE,
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.models.interfaces import HasInnerState, IsHybrid, SupportsMambaPrefixCaching
from vllm.model_executor.models.utils import maybe_prefix

from vllm_hydra_head.export.configuration_hydra_head import HydraHeadConfig
from vllm_hydra_head.export.heads_hydra_head import Call, describe_call, rotary_frequencies
from vllm_hydra_head.export.modeling_hydra_head import HydraHeadMLP
from vllm_hydra_head.heads import ServedAttention
from vllm_hydra_head.ranks import deal, own_part


def vocabulary_multiple() -> int:
    """What the vocabulary is padded to a multiple of, so that any number of ranks gets equal parts."""
    return DEFAULT_VOCAB_PADDING_SIZE * get_tensor_model_parallel_world_size()


class HydraHeadLayer(nn.Module):
    """Pre-norm attention and MLP, each added to the residual stream; x_bsm is [1, t, m], the same on all ranks."""

    def __init__(self, engine: VllmConfig, views: Sequence[HydraHeadConfig], layer_idx: int, prefix: str) -> None:
        super().__init__()
        config = views[get_tensor_model_parallel_rank()]
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = ServedAttention(config, layer_idx)
        self.self_attn.enter(engine, f"{prefix}.self_attn", views)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = HydraHeadMLP(config)

    def forward(self, x_bsm: Tensor, call: Call) -> Tensor:
        x_bsm = x_bsm + tensor_model_parallel_all_reduce(self.self_attn(self.input_layernorm(x_bsm), call, None))
        return x_bsm + tensor_model_parallel_all_reduce(self.mlp(self.post_attention_layernorm(x_bsm)))


@support_torch_compile(dynamic_arg_dims={"input_ids": 0, "positions": -1, "inputs_embeds": 0})
class HydraHeadModel(nn.Module):
    """Token ids [t] of all requests of a step to hidden states [t, m]."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = self.config = vllm_config.model_config.hf_config
        self.views = deal(config, get_tensor_model_parallel_world_size())
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size, config.hidden_size, padding_size=vocabulary_multiple()
        )
        self.layers = nn.ModuleList(
            HydraHeadLayer(vllm_config, self.views, layer_idx, maybe_prefix(prefix, f"layers.{layer_idx}"))
            for layer_idx in range(config.num_hidden_layers)
        )
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        device = self.norm.weight.device
        with torch.device(device):
            inverse_d, self.rotary_factor = rotary_frequencies(config, device)
        self.register_buffer("inverse_d", inverse_d.float(), persistent=False)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.embed_tokens(input_ids)

    def forward(self, input_ids: Tensor, positions: Tensor, inputs_embeds: Tensor | None = None) -> Tensor:
        x_bsm = (self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds)[None]
        frequencies = (self.inverse_d, self.rotary_factor)
        call = describe_call(self.config, positions[None], 0, None, frequencies, x_bsm.dtype)
        for layer in self.layers:
            x_bsm = layer(x_bsm, call)
        return self.norm(x_bsm)[0]


class HydraHeadForCausalLM(nn.Module, HasInnerState, IsHybrid, SupportsMambaPrefixCaching):
    """Token ids to logits."""

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: VllmConfig) -> tuple[tuple[int, ...], ...]:
        """Nothing: vLLM would make blocks as long as a state's page for a layer with all kv groups."""
        return ((0,),)

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig) -> tuple[torch.dtype, ...]:
        return (torch.uint8,)

    @classmethod
    def get_mamba_state_copy_func(cls) -> tuple[Callable[..., Any], ...]:
        return MambaStateCopyFuncCalculator.linear_attention_state_copy_func()

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = self.config = vllm_config.model_config.hf_config
        self.model = HydraHeadModel(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.lm_head = ParallelLMHead(
            config.vocab_size,
            config.hidden_size,
            padding_size=vocabulary_multiple(),
            prefix=maybe_prefix(prefix, "lm_head"),
        )
        if config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(config.vocab_size)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.model.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        return self.model(input_ids, positions, inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Names are the export's own; raises ValueError for a tensor that the model has no place for, or lacks."""
        own, loaded, rank = dict(self.named_parameters()), set(), get_tensor_model_parallel_rank()
        for name, whole in weights:
            if name == "lm_head.weight" and self.config.tie_word_embeddings:
                continue
            if (values := own_part(name, whole, self.config, self.model.views, rank)) is None:
                continue
            if name not in own:
                raise ValueError(f"the export's tensor {name} has no place in its model; export the checkpoint anew")
            loader = getattr(own[name], "weight_loader", lambda parameter, given: parameter.data.copy_(given))
            loader(own[name], values)
            loaded.add(name)
        if missing := sorted(own.keys() - loaded - {"lm_head.weight"}):
            raise ValueError(f"the export lacks the tensor {missing[0]}; export the checkpoint anew")
        return loaded
