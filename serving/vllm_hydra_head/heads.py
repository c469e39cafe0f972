# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The heads of exported models where vLLM keeps what they remember: keys and values, and recurrent states, in blocks.

Shape suffixes: t tokens of all requests of this step, r requests, and those of ``export/heads_hydra_head.py``.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
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
from vllm_hydra_head.export.heads_hydra_head import Call, Heads
from vllm_hydra_head.export.kinds_hydra_head import BRANCHES
from vllm_hydra_head.export.modeling_hydra_head import HydraHeadAttention
from vllm_hydra_head.settings import RECURRENT_OP, layer_states, page_bytes, served_head_size

SharedKV = tuple[Tensor, Tensor] | None


class ServedFullAttention(FullAttentionHeads):
    """Keys and values in vLLM's cache; groups that fewer heads read than others get queries of zeros beside them."""

    def enter(self, engine: VllmConfig, prefix: str) -> None:
        """Take a place in the engine's cache."""
        counts, d = self.heads_per_group, self.config.head_dim
        self.most, self.padding = max(counts), served_head_size(d) - d
        self.attention = Attention(
            self.most * len(counts),
            d + self.padding,
            d**-0.5,
            num_kv_heads=len(counts),
            cache_config=engine.cache_config,
            prefix=f"{prefix}.fa",
            attn_backend=attention_backend(),
        )
        places = [group * self.most + place for group, count in enumerate(counts) for place in range(count)]
        self.register_buffer("places", torch.tensor(places), persistent=False)

    def outputs(self, x_bsm: Tensor, call: Call, shared_kv: SharedKV, cache: HydraHeadCacheLayer | None) -> Tensor:
        q, k, v = self.project(x_bsm, shared_kv)
        q, k = self.norm_and_place(q, k, call)
        if call.query_scale_bs11 is not None:
            q = q * call.query_scale_bs11
        q_thd, k_tgd, v_tgd = (F.pad(x[0], (0, self.padding)) for x in (q, k, v))
        rows = q_thd.new_zeros(len(q_thd), self.most * k_tgd.shape[1], q_thd.shape[-1])
        rows = rows.index_copy(1, self.places, q_thd)
        out = self.attention(rows.flatten(1), k_tgd.flatten(1), v_tgd.flatten(1)).view_as(rows)
        return out.index_select(1, self.places)[None, ..., : self.config.head_dim]


class RecurrentStates(nn.Module, MambaBase):
    """What the recurrent heads of a layer remember: a page of bytes for each request, as long in every layer."""

    mamba_type = MambaAttentionBackendEnum.LINEAR

    def __init__(self, config: HydraHeadConfig, layer_idx: int, engine: VllmConfig, prefix: str) -> None:
        super().__init__()
        dtype = engine.model_config.dtype
        self.prefix, self.by_kind = prefix, layer_states(config, layer_idx, dtype)
        self.page_bytes = page_bytes(config, dtype)
        self.kv_cache: tuple[Tensor, ...] = ()
        self.views: dict[str, dict[str, Tensor]] = {}
        self.heads: dict[str, Heads] = {}  # modules of the layer, which is their parent
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

    def compute(self, kind: str, x_tm: Tensor, cos_td: Tensor, sin_td: Tensor, kv: SharedKV, out_thd: Tensor) -> None:
        """Outputs of a kind's heads into ``out_thd``; tokens that belong to no request stay as they are."""
        metadata = get_forward_context().attn_metadata
        if metadata is None:  # the engine measures what a step takes
            return
        found: RecurrentMetadata = metadata[self.prefix]
        decodes = found.num_decode_tokens
        if decodes:
            tokens = (x[:decodes, None] for x in (x_tm, cos_td, sin_td))
            own = None if kv is None else (kv[0][:decodes, None], kv[1][:decodes, None])
            rows, continues = found.state_indices_tensor[:decodes], found.continues[:decodes]
            out_thd[:decodes] = self._advance(kind, *tokens, own, rows, continues)[:, 0]
        for request in range(found.num_decodes, found.num_decodes + found.num_prefills):
            here = slice(found.starts[request], found.starts[request + 1])
            tokens = (x[None, here] for x in (x_tm, cos_td, sin_td))
            own = None if kv is None else (kv[0][None, here], kv[1][None, here])
            rows, continues = (x[request : request + 1] for x in (found.state_indices_tensor, found.continues))
            out_thd[here] = self._advance(kind, *tokens, own, rows, continues)[0]

    def _advance(
        self, kind: str, x_rsm: Tensor, cos_rsd: Tensor, sin_rsd: Tensor, kv: SharedKV, rows: Tensor, continues: Tensor
    ) -> Tensor:
        """Read s tokens of each request; their states, in these rows, are replaced."""
        rows, views = rows.long(), self.views[kind]
        before = {name: _or_zeros(view[rows], continues) for name, view in views.items()}
        cache = SimpleNamespace(states={kind: before})
        call = Call(cos_rsd[:, :, None], sin_rsd[:, :, None], None, None, None)
        out = BRANCHES[kind].outputs(self.heads[kind], x_rsm, call, kv, cache)
        for name, view in views.items():
            view[rows] = before[name].to(view.dtype)
        return out


def _or_zeros(state: Tensor, continues_r: Tensor) -> Tensor:
    """A request that begins has whatever its block held before."""
    return torch.where(continues_r.view(-1, *[1] * (state.dim() - 1)), state, torch.zeros_like(state))


def recurrent(
    x_tm: Tensor, cos_td: Tensor, sin_td: Tensor, kv: list[Tensor], out_thd: Tensor, layer: str, kind: str
) -> None:
    """The custom operator: opaque to compilation, since what it does depends on the step's requests."""
    states: RecurrentStates = get_forward_context().no_compile_layers[layer]
    states.compute(kind, x_tm, cos_td, sin_td, tuple(kv) or None, out_thd)


def _recurrent_shapes(
    x_tm: Tensor, cos_td: Tensor, sin_td: Tensor, kv: list[Tensor], out_thd: Tensor, layer: str, kind: str
) -> None:
    return None


direct_register_custom_op(RECURRENT_OP.split("::")[1], recurrent, mutates_args=["out_thd"], fake_impl=_recurrent_shapes)


def served(branch: type[Heads]) -> type[Heads]:
    """The heads of a recurrent kind with their states in the engine's cache."""

    class Served(branch):
        layer_name: str

        def outputs(self, x_bsm: Tensor, call: Call, shared_kv: SharedKV, cache: HydraHeadCacheLayer | None) -> Tensor:
            x_tm = x_bsm[0]
            out_thd = x_tm.new_zeros(len(x_tm), len(self.head_idx), self.config.head_dim)
            cos_td, sin_td = (x[0, :, 0] for x in (call.cos_bs1d, call.sin_bs1d))
            kv = [x[0] for x in shared_kv or ()]
            torch.ops.vllm.hydra_head_recurrent(x_tm, cos_td, sin_td, kv, out_thd, self.layer_name, self.kind)
            return out_thd[None]

    return Served


class ServedAttention(HydraHeadAttention):
    """The export's layer over the engine's cache."""

    branches: ClassVar[dict[str, type[Heads]]] = {
        kind: ServedFullAttention if kind == "fa" else served(branch) for kind, branch in BRANCHES.items()
    }

    def enter(self, engine: VllmConfig, prefix: str) -> None:
        """Take the layer's places in the engine's cache."""
        recurrent_kinds = [kind for kind in self.heads if kind != "fa"]
        if "fa" in self.heads:
            self.fa.enter(engine, prefix)
        if recurrent_kinds:
            name = f"{prefix}.recurrent"
            states = RecurrentStates(self.config, self.layer_idx, engine, name)
            for kind in recurrent_kinds:
                branch = states.heads[kind] = getattr(self, kind)
                branch.layer_name, branch.head_idx = name, self.heads[kind]
