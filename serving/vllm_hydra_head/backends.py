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

    starts: list[int]  # where each request's tokens begin, and where the last one's end; known to the host
    continues: torch.Tensor  # bool [requests]: whether a request has a state already


class RecurrentMetadataBuilder(LinearAttentionMetadataBuilder):
    """Adds to vLLM's own what a request's first tokens need to know.

    ``continues`` is a new tensor each step, so this part of a step is in no graph; what lies between two layers' is.
    """

    _cudagraph_support = AttentionCGSupport.NEVER

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> RecurrentMetadata:
        found = super().build(common_prefix_len, common_attn_metadata, fast_build)
        starts = common_attn_metadata.query_start_loc_cpu.tolist()
        continues = common_attn_metadata.compute_num_computed_tokens() > 0
        return RecurrentMetadata(**vars(found), starts=starts, continues=continues)


class RecurrentBackend(LinearAttentionBackend):
    """Of recurrent states; its layouts bind those of full attention, which shares the blocks."""

    @staticmethod
    def get_builder_cls() -> type[RecurrentMetadataBuilder]:
        return RecurrentMetadataBuilder

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return BLOCK_OUTERMOST
