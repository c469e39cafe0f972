# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""How a layer's memory lies in vLLM's blocks: block by block, so that pages of different layers may differ in size."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionBackend, AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.attention.backends.linear_attn import (
    LinearAttentionBackend,
    LinearAttentionMetadata,
    LinearAttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import KVCacheLayout

BLOCK_OUTERMOST = (KVCacheLayout.BLNHC, KVCacheLayout.BLHNC)


def attention_backend() -> type[AttentionBackend] | None:
    """Of full attention: vLLM's own choice, but on a CPU."""
    if not current_platform.is_cpu():
        return None
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    class BlockOutermostCPUBackend(CPUAttentionBackend):
        """Its kernels read by strides; it declares one layout only, which holds equal pages alone."""

        @classmethod
        def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
            return (KVCacheLayout.BLHNC, *super().supported_kv_cache_layouts())

    return BlockOutermostCPUBackend


@dataclass
class RecurrentMetadata(LinearAttentionMetadata):
    """Requests of a step: decodes first, a token each, then prefills."""

    continues: torch.Tensor  # bool [requests]: whether a request has a state already
    request_t: torch.Tensor  # the request of each token
    prefill_starts: torch.Tensor  # where each prefill's tokens begin among those of prefills, and the last one's end


class RecurrentMetadataBuilder(LinearAttentionMetadataBuilder):
    """Adds to vLLM's own what a request's first tokens need to know.

    ``continues`` is a new tensor each step, so this part of a step is in no graph; what lies between two layers' is.
    """

    _cudagraph_support = AttentionCGSupport.NEVER

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> RecurrentMetadata:
        found = super().build(common_prefix_len, common_attn_metadata, fast_build)
        continues = common_attn_metadata.compute_num_computed_tokens() > 0
        requests, tokens = found.num_decodes + found.num_prefills, found.num_decode_tokens + found.num_prefill_tokens
        starts = found.query_start_loc[: requests + 1].long()
        each = torch.arange(requests, device=starts.device)
        request_t = torch.repeat_interleave(each, starts.diff(), output_size=tokens)
        prefill_starts = starts[found.num_decodes :] - found.num_decode_tokens
        return RecurrentMetadata(**vars(found), continues=continues, request_t=request_t, prefill_starts=prefill_starts)


class RecurrentBackend(LinearAttentionBackend):
    """Of recurrent states; its layouts bind those of full attention, which shares the blocks."""

    @staticmethod
    def get_builder_cls() -> type[RecurrentMetadataBuilder]:
        return RecurrentMetadataBuilder

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return BLOCK_OUTERMOST
