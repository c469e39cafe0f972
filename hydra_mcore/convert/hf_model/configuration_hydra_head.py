# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Configuration of HydraHead models (arXiv 2606.20097) for transformers; tested with transformers 5.0 to 5.24."""

from __future__ import annotations

import itertools
import math
from typing import Any, Literal, get_args, get_origin, get_type_hints

from transformers import PretrainedConfig

_NOT_KEPT = ("self", "kwargs", "__class__", "fa_heads")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")


def _by_kind(
    heads: list[dict[str, list[int]]] | None, fa_heads: list[list[int]] | None, num_layers: int, num_heads: int
) -> list[dict[str, list[int]]]:
    """For each layer kind -> heads, from either way to give them; kinds without heads are left out."""
    if heads is None:
        kept = [range(num_heads)] * num_layers if fa_heads is None else fa_heads
        heads = [{"fa": fa, "gdn": [head for head in range(num_heads) if head not in fa]} for fa in kept]
    return [{kind: sorted(owned) for kind, owned in layer.items() if owned} for layer in heads]


class HydraHeadConfig(PretrainedConfig):
    """A decoder whose layers mix kinds of heads: full attention (FA), Gated DeltaNet (GDN), Kimi Delta Attention
    (KDA), Lightning attention.

    Args:
        hidden_size ... hidden_act: as in transformers' Qwen3.
        rope_parameters: {"rope_type": "default", "linear", "llama3" or "yarn", "rope_theta": ..., and what the type
            needs}.
        qkv_bias: biases on q, k and v of both branches.
        qk_norm: RMSNorm on queries and keys of FA heads.
        heads: for each layer, kind -> indices of its heads; every head has one kind.
        fa_heads: instead of ``heads``, the FA heads of each layer, all others being GDN; None for all heads of all
            layers.
        fa_position: positions of FA heads: none, or rotary.
        fa_log_scale: FA queries are multiplied by ln(t+a)/ln(a), t from 0, unless "never".
        fa_log_scale_base: the a of the log-position scale, in tokens.
        fa_gate: output gate of FA heads, computed from the layer's input.
        gdn_position: positions of GDN heads.
        gdn_qk_norm: RMSNorm of GDN queries and keys before rotary and L2 norm.
        gdn_conv_kernel: taps of the causal short convolution on q, k and v of GDN heads; 0 for none.
        gdn_conv_activation: activation after the short convolution.
        gdn_write_max: the write gate is gdn_write_max * sigmoid; 2 allows negative eigenvalues.
        gdn_half_life: tokens after which a GDN state has decayed to half, in a model that starts from random weights.
        gdn_gate: output gate of GDN heads.
        gdn_kv: keys and values of GDN heads: each its own, or shared by the heads of a kv group.
        kda_...: the same of KDA heads.
        lightning_slope: decay rate of a layer's last head; head h of H decays by lightning_slope^((h + 1) / H) a token.
        lightning_position ... lightning_kv: as of GDN heads.
        qkv: K/V projections of the branches: separate, or one for all, by kv group.
        gate_activation: activation of the output gates.
        gate_order: whether output gates act before or after the per-head norm.
        fusion: per-head norm and learned scale; norm only; neither; or norm, scale and a softmax over heads.
        fusion_norm_weight: learned weight of the fusion norm: one vector per branch, or none.
        teacher: provenance of the pretrained model that this one descends from (model_type, fingerprint).
        stage: the stage of the transfer that wrote these weights.

    Raises:
        ValueError: a value that cannot be used; one line that names it.
    """

    model_type = "hydra_head"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012

    def __init__(
        self,
        vocab_size: int = 151936, hidden_size: int = 2048, intermediate_size: int = 6144, num_hidden_layers: int = 28,
        num_attention_heads: int = 16, num_key_value_heads: int = 8, head_dim: int = 128,
        max_position_embeddings: int = 40960, rms_norm_eps: float = 1e-6, tie_word_embeddings: bool = True,
        hidden_act: str = "silu", initializer_range: float = 0.02, use_cache: bool = True,
        rope_parameters: dict[str, Any] | None = None, qkv_bias: bool = False, qk_norm: bool = True,
        heads: list[dict[str, list[int]]] | None = None, fa_heads: list[list[int]] | None = None,
        fa_position: Literal["nope", "rope"] = "nope", fa_log_scale: Literal["never", "extend", "always"] = "extend",
        fa_log_scale_base: float = 500.0, fa_gate: Literal["none", "elementwise", "headwise"] = "elementwise",
        gdn_position: Literal["rope", "nope"] = "rope", gdn_qk_norm: Literal["rms", "none"] = "rms",
        gdn_conv_kernel: int = 4, gdn_conv_activation: Literal["none", "silu"] = "none", gdn_write_max: float = 1.0,
        gdn_half_life: float = 69.0, gdn_gate: Literal["none", "elementwise", "headwise"] = "none",
        gdn_kv: Literal["per_head", "per_group"] = "per_head",
        kda_position: Literal["rope", "nope"] = "rope", kda_qk_norm: Literal["rms", "none"] = "rms",
        kda_conv_kernel: int = 4, kda_conv_activation: Literal["none", "silu"] = "none", kda_write_max: float = 1.0,
        kda_half_life: float = 69.0, kda_gate: Literal["none", "elementwise", "headwise"] = "none",
        kda_kv: Literal["per_head", "per_group"] = "per_head",
        lightning_slope: float = 2.0**-8, lightning_position: Literal["rope", "nope"] = "rope",
        lightning_qk_norm: Literal["rms", "none"] = "rms",
        lightning_gate: Literal["none", "elementwise", "headwise"] = "elementwise",
        lightning_kv: Literal["per_head", "per_group"] = "per_head",
        qkv: Literal["separate", "shared"] = "separate", gate_activation: Literal["sigmoid", "silu"] = "sigmoid",
        gate_order: Literal["before_norm", "after_norm"] = "before_norm",
        fusion: Literal["scale", "norm", "none", "competition"] = "scale",
        fusion_norm_weight: Literal["branch", "none"] = "branch",
        teacher: dict[str, Any] | None = None, stage: str = "", pad_token_id: int | None = None,
        bos_token_id: int | None = None, eos_token_id: int | list[int] | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        given = {name: value for name, value in locals().items() if name not in _NOT_KEPT}
        given["rope_parameters"] = dict(rope_parameters or {"rope_type": "default", "rope_theta": 1e6})
        given["heads"] = _by_kind(heads, fa_heads, num_hidden_layers, num_attention_heads)
        given["teacher"] = teacher or {}
        for name, value in given.items():
            setattr(self, name, value)
        self._check_shape()
        self._check_heads()
        self._check_options()
        tokens = {"pad_token_id": pad_token_id, "bos_token_id": bos_token_id, "eos_token_id": eos_token_id}
        super().__init__(tie_word_embeddings=tie_word_embeddings, **tokens, **kwargs)
        self._check_rope()

    def heads_per_group(self, heads: list[int]) -> list[int]:
        """How many of some heads read each kv group: head h reads group floor(h * groups / heads)."""
        groups = [head * self.num_key_value_heads // self.num_attention_heads for head in heads]
        return [groups.count(group) for group in range(self.num_key_value_heads)]

    def _check_shape(self) -> None:
        sizes = (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
        )
        for name in (*sizes, "head_dim", "max_position_embeddings"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}; it counts something, so it must be a whole number above 0")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"{self.num_attention_heads} heads do not divide into {self.num_key_value_heads} kv groups"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; rotary positions need an even one")

    def _check_rope(self) -> None:
        rope_type = self.rope_parameters.get("rope_type", "default")
        if rope_type not in ROPE_TYPES:
            raise ValueError(f"rope_type is {rope_type!r}; choose one of {', '.join(map(repr, ROPE_TYPES))}")
        if self.rope_parameters.get("partial_rotary_factor", 1.0) != 1.0:
            raise ValueError("partial_rotary_factor is not supported; rotary positions turn whole heads")

    def _check_heads(self) -> None:
        if len(self.heads) != self.num_hidden_layers:
            raise ValueError(f"heads lists {len(self.heads)} layers, the model has {self.num_hidden_layers}")
        for layer_idx, by_kind in enumerate(self.heads):
            listed = list(itertools.chain.from_iterable(by_kind.values()))
            for head in listed:
                if not isinstance(head, int) or not 0 <= head < self.num_attention_heads:
                    raise ValueError(
                        f"heads: layer {layer_idx} lists head {head!r}; heads are 0 to {self.num_attention_heads - 1}"
                    )
            if len(set(listed)) < len(listed):
                raise ValueError(f"heads: layer {layer_idx} lists a head twice")
            if len(listed) < self.num_attention_heads:
                raise ValueError(f"heads: layer {layer_idx} lists {len(listed)} heads of {self.num_attention_heads}")

    def _check_options(self) -> None:
        for name, hint in get_type_hints(HydraHeadConfig.__init__).items():
            if get_origin(hint) is Literal and getattr(self, name) not in get_args(hint):
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; choose one of {', '.join(map(repr, get_args(hint)))}"
                )
        for kind in ("gdn", "kda"):
            taps, write_max, half_life = (
                getattr(self, f"{kind}_{name}") for name in ("conv_kernel", "write_max", "half_life")
            )
            if not isinstance(taps, int) or taps < 0:
                raise ValueError(f"{kind}_conv_kernel is {taps!r}; it counts taps, 0 for no convolution")
            if not 0.0 < write_max <= 2.0:
                raise ValueError(f"{kind}_write_max is {write_max}; the delta rule is stable for 0 < max <= 2")
            if not 0.0 < half_life < math.inf:
                raise ValueError(f"{kind}_half_life must exceed 0 and be finite")
        if not 1.0 < self.fa_log_scale_base < math.inf:
            raise ValueError("fa_log_scale_base must exceed 1 and be finite")
        if not 0.0 < self.lightning_slope <= 1.0:
            raise ValueError(f"lightning_slope is {self.lightning_slope}; choose 0 < slope <= 1, ALiBi's is 2^-8")
