# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The heads of exported models where vLLM keeps what they remember: keys and values, and recurrent states, in blocks.

Shape suffixes: t tokens of all requests of this step, r requests, k inputs before these, and those of
``export/heads_hydra_head.py``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.utils.torch_utils import direct_register_custom_op, get_dtype_size
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

from vllm_hydra_head.backends import RecurrentBackend, RecurrentMetadata, attention_backend
from vllm_hydra_head.export.cache_hydra_head import HydraHeadCacheLayer
from vllm_hydra_head.export.configuration_hydra_head import HydraHeadConfig
from vllm_hydra_head.export.fa_heads_hydra_head import FullAttentionHeads
from vllm_hydra_head.export.heads_hydra_head import Call, Heads, Padding, RecurrentHeads
from vllm_hydra_head.export.kinds_hydra_head import BRANCHES
from vllm_hydra_head.export.modeling_hydra_head import HydraHeadAttention
from vllm_hydra_head.settings import (
    CONVOLVE_OP,
    RECUR_OP,
    States,
    allotted_groups,
    layer_states,
    living_groups,
    page_bytes,
    served_head_size,
)

SharedKV = tuple[Tensor, Tensor] | None


class ServedFullAttention(FullAttentionHeads):
    """Keys and values in vLLM's cache; groups that fewer heads read than others get queries of zeros beside them."""

    def enter(self, attention: Attention, groups: int, most: int) -> None:
        """Use the engine's attention, whose cache has so many kv groups, each with so many queries."""
        self.attention, self.groups, self.most = attention, groups, most
        self.padding = attention.head_size - self.config.head_dim
        counts = self.heads_per_group
        places = [group * most + place for group, count in enumerate(counts) for place in range(count)]
        self.register_buffer("places", torch.tensor(places), persistent=False)

    def outputs(self, x_bsm: Tensor, call: Call, shared_kv: SharedKV, cache: HydraHeadCacheLayer | None) -> Tensor:
        q, k, v = self.project(x_bsm, shared_kv)
        q, k = self.norm_and_place(q, k, call)
        if call.query_scale_bs11 is not None:
            q = q * call.query_scale_bs11
        q_thd = F.pad(q[0], (0, self.padding))
        k_tgd, v_tgd = (F.pad(x[0], (0, self.padding, 0, self.groups - x.shape[2])) for x in (k, v))
        rows = q_thd.new_zeros(len(q_thd), self.most * self.groups, q_thd.shape[-1])
        rows = rows.index_copy(1, self.places, q_thd)
        out = self.attention(rows.flatten(1), k_tgd.flatten(1), v_tgd.flatten(1)).view_as(rows)
        return out.index_select(1, self.places)[None, ..., : self.config.head_dim]


class RecurrentStates(nn.Module, MambaBase):
    """What the recurrent heads of a layer remember: a page of bytes for each request, as long in every layer."""

    mamba_type = MambaAttentionBackendEnum.LINEAR

    def __init__(self, by_kind: dict[str, States], page_bytes: int, engine: VllmConfig, prefix: str) -> None:
        super().__init__()
        self.prefix, self.by_kind, self.page_bytes = prefix, by_kind, page_bytes
        self.kv_cache: tuple[Tensor, ...] = ()
        self.views: dict[str, dict[str, Tensor]] = {}
        self.heads: dict[str, RecurrentHeads] = {}  # modules of the layer, which is their parent
        engine.compilation_config.static_forward_context[prefix] = self

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        return ((self.page_bytes,),)

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        return (torch.uint8,)

    def get_attn_backend(self) -> type[RecurrentBackend]:
        return RecurrentBackend

    def bind_kv_cache(self, kv_cache: Tensor) -> None:
        """Views of the pages [blocks, 1, 1, bytes], by kind and state."""
        super().bind_kv_cache(kv_cache)
        pages, offset = self.kv_cache[0], 0
        for kind, states in self.by_kind.items():
            self.views[kind] = {}
            for name, (shape, dtype) in states.items():
                size = math.prod(shape) * get_dtype_size(dtype)
                self.views[kind][name] = pages[:, offset : offset + size].view(dtype).unflatten(1, shape)
                offset += size

    def recur(self, kind: str, tokens: list[Tensor], out_thd: Tensor) -> None:
        """The recurrence of a kind's heads over queries, keys, values and gates [t, h, ...] of all requests.

        Tokens that belong to no request stay as they are. One-token requests are a batch, and the others a packed row.
        """
        found = self.metadata()
        if found is None:
            return
        decodes, requests = found.num_decodes, found.num_decodes + found.num_prefills
        if decodes:
            out_thd[:decodes] = self._read(kind, [x[:decodes, None] for x in tokens], found, slice(decodes), None)[:, 0]
        if found.num_prefills:
            here = slice(decodes, decodes + found.num_prefill_tokens)
            prefills = slice(decodes, requests)
            out_thd[here] = self._read(kind, [x[None, here] for x in tokens], found, prefills, found.prefill_starts)[0]

    def _read(
        self, kind: str, tokens: list[Tensor], found: RecurrentMetadata, which: slice, cu_seqlens: Tensor | None
    ) -> Tensor:
        """Outputs of these requests; their states are replaced."""
        rows, view = found.state_indices_tensor[which].long(), self.views[kind]["recurrent"]
        before = _or_zeros(view[rows], found.continues[which])
        out, view[rows] = self.heads[kind].read(*tokens, state_bhdd=before, cu_seqlens=cu_seqlens)
        return out

    def convolve(self, kind: str, x_tc: Tensor, out_tc: Tensor) -> None:
        """The short convolution of a kind's heads, over all requests at once.

        Each request's tokens stand behind its last inputs in one row, so that no request sees another.
        """
        found = self.metadata()
        if found is None:
            return
        requests, view = found.num_decodes + found.num_prefills, self.views[kind]["conv"]
        rows, (before, channels) = found.state_indices_tensor[:requests].long(), view.shape[1:]
        shift_r = before * torch.arange(requests, device=rows.device)
        earlier_k = torch.arange(before, device=rows.device)
        starts, ends = found.query_start_loc[:requests], found.query_start_loc[1 : requests + 1]
        row = x_tc.new_empty(len(found.request_t) + requests * before, channels)
        place_t = torch.arange(len(found.request_t), device=rows.device) + shift_r[found.request_t]  # of its outputs
        row[place_t + before] = x_tc[: len(place_t)]
        row[(starts + shift_r)[:, None] + earlier_k] = _or_zeros(view[rows], found.continues[:requests])
        mixed_btc, _ = self.heads[kind].conv(row[None, before:], None, row[None, :before])
        out_tc[: len(place_t)] = mixed_btc[0, place_t]
        view[rows] = row[(ends + shift_r)[:, None] + earlier_k]

    def metadata(self) -> RecurrentMetadata | None:
        """Of this step's requests; None where the engine measures what a step takes."""
        found = get_forward_context().attn_metadata
        return None if found is None else found[self.prefix]


def _or_zeros(state: Tensor, continues_r: Tensor) -> Tensor:
    """A request that begins has whatever its block held before."""
    return torch.where(continues_r.view(-1, *[1] * (state.dim() - 1)), state, torch.zeros_like(state))


# Custom operators, opaque to compilation, since what they do depends on the step's requests.
def recur(tokens: list[Tensor], out_thd: Tensor, layer: str, kind: str) -> None:
    get_forward_context().no_compile_layers[layer].recur(kind, tokens, out_thd)


def convolve(x_tc: Tensor, out_tc: Tensor, layer: str, kind: str) -> None:
    get_forward_context().no_compile_layers[layer].convolve(kind, x_tc, out_tc)


def _recur_shapes(tokens: list[Tensor], out_thd: Tensor, layer: str, kind: str) -> None:
    return None


def _convolve_shapes(x_tc: Tensor, out_tc: Tensor, layer: str, kind: str) -> None:
    return None


direct_register_custom_op(RECUR_OP.split("::")[1], recur, mutates_args=["out_thd"], fake_impl=_recur_shapes)
direct_register_custom_op(CONVOLVE_OP.split("::")[1], convolve, mutates_args=["out_tc"], fake_impl=_convolve_shapes)


def served(branch: type[RecurrentHeads]) -> type[RecurrentHeads]:
    """The heads of a recurrent kind with their states in the engine's cache."""

    class Served(branch):
        layer_name: str

        def recur(self, states: dict[str, Tensor], *tokens: Tensor) -> Tensor:
            tokens = [x[0] for x in tokens]
            out_thd = torch.zeros_like(tokens[2])  # of values
            torch.ops.vllm.hydra_head_recur(tokens, out_thd, self.layer_name, self.kind)
            return out_thd[None]

        def convolve(self, states: dict[str, Tensor], qkv_bsc: Tensor, padding: Padding | None) -> Tensor:
            out_tc = torch.zeros_like(qkv_bsc[0])
            torch.ops.vllm.hydra_head_convolve(qkv_bsc[0], out_tc, self.layer_name, self.kind)
            return out_tc[None]

    return Served


class ServedAttention(HydraHeadAttention):
    """The export's layer over the engine's cache."""

    branches: ClassVar[dict[str, type[Heads]]] = {
        kind: ServedFullAttention if kind == "fa" else served(branch) for kind, branch in BRANCHES.items()
    }

    def enter(self, engine: VllmConfig, prefix: str, views: Sequence[HydraHeadConfig]) -> None:
        """Take the layer's places in the engine's cache, the same ones on all ranks, whose configs ``views`` are."""
        dtype, d = engine.model_config.dtype, self.config.head_dim
        if groups := allotted_groups(views, self.layer_idx):
            most = max(max(living_groups(view, self.layer_idx), default=0) for view in views)
            self.full_attention = Attention(
                most * groups,
                served_head_size(d),
                d**-0.5,
                num_kv_heads=groups,
                cache_config=engine.cache_config,
                prefix=f"{prefix}.fa",
                attn_backend=attention_backend(),
            )
            if "fa" in self.heads:
                self.fa.enter(self.full_attention, groups, most)
        if any(kind != "fa" for view in views for kind in view.heads[self.layer_idx]):
            name, by_kind = f"{prefix}.recurrent", layer_states(self.config, self.layer_idx, dtype)
            states = RecurrentStates(by_kind, page_bytes(views, dtype), engine, name)
            for kind in by_kind:
                branch = states.heads[kind] = getattr(self, kind)
                branch.layer_name = name
        self.register_buffer("own", torch.tensor(self.order), persistent=False)

    def shares(self, x_bsm: Tensor) -> Tensor:
        return super().shares(x_bsm).index_select(-1, self.own)
