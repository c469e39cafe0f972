# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""HydraHead models (arXiv 2606.20097) for transformers: every layer mixes kinds of heads, head by head.

                      +-- FA heads:        q k v, causal softmax over cached keys ------+
    x (normed) -------+-- GDN, KDA heads:  q k v, delta rule on a constant state -------+--> norm and scale per head,
                      +-- Lightning heads: q k v, linear attention, constant state -----+    then o_proj

Needs torch and transformers only (tested with transformers 5.0 to 5.24); flash-linear-attention is used on a GPU where
it is installed. Shape suffixes: b batch, s tokens of this call, t all tokens so far, h heads, d head dimension, m model
width.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

# Transformers 5.0 copies the files that this one imports, and not what those import.
from .cache_hydra_head import HydraHeadCache, as_ours
from .chunked_delta_rule import chunked_delta_rule  # noqa: F401
from .chunked_linear_attention import chunked_linear_attention  # noqa: F401
from .chunks import cut  # noqa: F401
from .configuration_hydra_head import HydraHeadConfig
from .decays import HeadDecay  # noqa: F401
from .fa_heads_hydra_head import FullAttentionHeads  # noqa: F401
from .gdn_heads_hydra_head import GatedDeltaHeads  # noqa: F401
from .heads_hydra_head import Call, OutputGate, describe_call, repeat_groups, rotary_frequencies
from .kda_heads_hydra_head import KimiDeltaHeads  # noqa: F401
from .kinds_hydra_head import BRANCHES
from .lightning_heads_hydra_head import LightningHeads  # noqa: F401

CACHE = (
    "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
)  # its name since transformers 5.24


class HydraHeadAttention(nn.Module):
    """The branches of a layer, and their fusion: gate, RMSNorm over each head, one learned factor a head."""

    branches = BRANCHES  # an engine that keeps what heads remember in its own way has others

    def __init__(self, config: HydraHeadConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        m, d = config.hidden_size, config.head_dim
        if strange := config.heads[layer_idx].keys() - BRANCHES.keys():
            raise ValueError(f"heads: layer {layer_idx} has kind {min(strange)!r}; the kinds are {', '.join(BRANCHES)}")
        self.heads = {kind: config.heads[layer_idx][kind] for kind in BRANCHES if kind in config.heads[layer_idx]}
        self.order = sorted(itertools.chain.from_iterable(self.heads.values()))  # all heads; an engine's rank has some
        if config.qkv == "shared":
            self.k_proj = nn.Linear(m, config.num_key_value_heads * d, bias=config.qkv_bias)
            self.v_proj = nn.Linear(m, config.num_key_value_heads * d, bias=config.qkv_bias)
        for kind, heads in self.heads.items():
            self.add_module(kind, self.branches[kind](config, heads))
        if config.fusion != "none" and config.fusion_norm_weight == "branch":
            for kind in self.heads:
                self.add_module(f"{kind}_norm", nn.RMSNorm(d, config.rms_norm_eps))
        if config.fusion in ("scale", "competition"):
            self.scale = nn.Parameter(torch.ones(len(self.order)))
        if config.fusion == "competition":
            self.competition = nn.Linear(m, config.num_attention_heads, bias=False)
        self.o_proj = nn.Linear(len(self.order) * d, m, bias=False)

    def forward(self, x_bsm: Tensor, call: Call, past_key_values: HydraHeadCache | None) -> Tensor:
        """The layer's mixing of the tokens of this call with each other and with what the cache remembers: [b,
        s, m].
        """
        cache = None if past_key_values is None else past_key_values.layers[self.layer_idx]
        kv = None
        if self.config.qkv == "shared":
            kv = [
                projection(x_bsm).unflatten(-1, (-1, self.config.head_dim)) for projection in (self.k_proj, self.v_proj)
            ]
        by_head: dict[int, Tensor] = {}
        for kind, heads in self.heads.items():
            living = [min(count, 1) for count in self.config.heads_per_group(heads)]
            own_kv = None if kv is None else tuple(repeat_groups(x, living, dim=2) for x in kv)
            out_bshd, gate = getattr(self, kind)(x_bsm, call, own_kv, cache)
            by_head.update(zip(heads, self._normed(kind, out_bshd, gate).unbind(2), strict=True))
        out_bshd = torch.stack([by_head[head] for head in self.order], dim=2)
        if self.config.fusion in ("scale", "competition"):
            out_bshd = out_bshd * self.scale[:, None]
        if self.config.fusion == "competition":
            out_bshd = out_bshd * (self.config.num_attention_heads * self.shares(x_bsm))[..., None]
        if cache is not None:
            cache.num_tokens += x_bsm.shape[1]
        return self.o_proj(out_bshd.flatten(2))

    def shares(self, x_bsm: Tensor) -> Tensor:
        """The share of each head in a softmax over all heads of the layer, [b, s, h]."""
        logits_bsh = self.competition(x_bsm)
        return logits_bsh.to(torch.promote_types(x_bsm.dtype, torch.float32)).softmax(dim=-1).to(x_bsm.dtype)

    def _normed(self, kind: str, out_bshd: Tensor, gate: Tensor | None) -> Tensor:
        if gate is not None and self.config.gate_order == "before_norm":
            out_bshd = out_bshd * gate
        if self.config.fusion != "none":
            if self.config.fusion_norm_weight == "branch":
                out_bshd = getattr(self, f"{kind}_norm")(out_bshd)
            else:
                out_bshd = F.rms_norm(out_bshd, (self.config.head_dim,), None, self.config.rms_norm_eps)
        if gate is not None and self.config.gate_order == "after_norm":
            out_bshd = out_bshd * gate
        return out_bshd


class HydraHeadMLP(nn.Module):
    """The gated MLP."""

    def __init__(self, config: HydraHeadConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x_bsm: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x_bsm)) * self.up_proj(x_bsm))


class HydraHeadDecoderLayer(GradientCheckpointingLayer):
    """Pre-norm attention and MLP, each added to the residual stream."""

    def __init__(self, config: HydraHeadConfig, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = HydraHeadAttention(config, layer_idx)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = HydraHeadMLP(config)

    def forward(self, x_bsm: Tensor, call: Call, past_key_values: HydraHeadCache | None = None) -> Tensor:
        x_bsm = x_bsm + self.self_attn(self.input_layernorm(x_bsm), call, past_key_values)
        return x_bsm + self.mlp(self.post_attention_layernorm(x_bsm))


class HydraHeadPreTrainedModel(PreTrainedModel):
    """What transformers needs to know to load, place, train and save the model."""

    config_class = HydraHeadConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["HydraHeadDecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012
    _supports_sdpa = True
    _is_stateful = True  # a cache that cannot be cut rules out assisted generation

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Random projections, identity convolutions, open gates, long memory; not called for modules whose parameters
        are loaded.
        """
        if isinstance(module, OutputGate):
            init.normal_(module.weight, std=1e-3)
            init.ones_(module.bias)
        elif isinstance(module, nn.Linear):
            init.normal_(module.weight, std=self.config.initializer_range)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, nn.RMSNorm):
            init.ones_(module.weight)
        elif hasattr(module, "start"):  # a kind's heads, a short convolution
            module.start(init)
        elif isinstance(module, HydraHeadAttention):
            if hasattr(module, "scale"):
                init.ones_(module.scale)
            if hasattr(module, "competition"):
                init.zeros_(module.competition.weight)


class HydraHeadModel(HydraHeadPreTrainedModel):
    """Token ids to hidden states."""

    def __init__(self, config: HydraHeadConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            HydraHeadDecoderLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)
        )
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: HydraHeadCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        cache: HydraHeadCache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Read s tokens after those that the cache holds.

        Args:
            attention_mask: [b, t], 0 at padding, which may stand anywhere, over all tokens including the cached ones.
            position_ids: [b, s] or [1, s]; by default tokens are counted from 0, padding left out.
            past_key_values: a ``HydraHeadCache``, or a ``DynamicCache`` that is still empty, which becomes one; updated
                in place. Made here when ``use_cache`` asks for one.
            cache: what transformers calls ``past_key_values`` since 5.24.
            use_cache: by default ``config.use_cache``, but not while training.

        Raises:
            ValueError: arguments that do not fit together.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if kwargs.get("output_attentions"):
            raise ValueError("output_attentions is not supported: no kind of heads keeps attention maps")
        x_bsm = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if self.gradient_checkpointing and self.training:
            use_cache = False
        elif use_cache is None:
            use_cache = self.config.use_cache and not self.training
        past_key_values = cache if past_key_values is None else past_key_values
        if past_key_values is not None:
            as_ours(past_key_values, self.config)
        elif use_cache:
            past_key_values = HydraHeadCache(self.config)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        call = self._describe(x_bsm, attention_mask, position_ids, past_key_values)
        hidden_states: tuple[Tensor, ...] = ()
        for layer in self.layers:
            if output_hidden_states:
                hidden_states += (x_bsm,)
            x_bsm = layer(x_bsm, call, past_key_values=past_key_values)
        x_bsm = self.norm(x_bsm)
        return BaseModelOutputWithPast(
            last_hidden_state=x_bsm,
            hidden_states=(*hidden_states, x_bsm) if output_hidden_states else None,
            **{CACHE: past_key_values if use_cache else None},
        )

    def _describe(
        self,
        x_bsm: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        past_key_values: HydraHeadCache | None,
    ) -> Call:
        """Check the mask, and find the positions."""
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        b, s, _ = x_bsm.shape
        real_bt = None
        if attention_mask is not None:
            if attention_mask.shape != (b, past + s):
                shape, needed = list(attention_mask.shape), [b, past + s]
                raise ValueError(
                    f"attention_mask has shape {shape}, needs {needed}: one entry for each token, cached ones included"
                )
            if not attention_mask.all():
                real_bt = attention_mask.bool()
        if position_ids is None:
            position_ids = torch.arange(past, past + s, device=x_bsm.device)[None]
            if real_bt is not None:
                position_ids = (real_bt.cumsum(dim=1) - 1).clamp(min=0)[:, past:]
        return describe_call(
            self.config, position_ids, past, real_bt, rotary_frequencies(self.config, x_bsm.device), x_bsm.dtype
        )


class HydraHeadForCausalLM(HydraHeadPreTrainedModel, GenerationMixin):
    """Token ids to next-token logits and loss."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: HydraHeadConfig) -> None:
        super().__init__(config)
        self.model = HydraHeadModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: HydraHeadCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: HydraHeadCache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As ``HydraHeadModel.forward``; ``labels`` [b, s] (-100: ignored) give a loss, ``logits_to_keep`` spares
        logits.

        Args:
            logits_to_keep: logits of so many last tokens, 0 for all, or the indices of tokens.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            cache=cache,
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits_bsw = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits_bsw, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits_bsw, hidden_states=outputs.hidden_states, **{CACHE: getattr(outputs, CACHE)}
        )

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """Where ``generate`` would make its dynamic cache, make ours; without the use of a cache, a given one is left
        alone.
        """
        if generation_config.use_cache is False:
            model_kwargs.pop(CACHE, None)
        elif model_kwargs.get(CACHE) is None and generation_config.cache_implementation in (None, "dynamic"):
            model_kwargs[CACHE] = HydraHeadCache(self.config)
        else:
            super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
