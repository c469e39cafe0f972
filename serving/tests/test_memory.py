# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""What vLLM's own planner allots to a request of a real model's shape, beside the exact bytes: no model is built.

``python test_memory.py`` prints the table of docs/serving.md.
"""

from __future__ import annotations

import logging
import random
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from vllm.v1.core import kv_cache_utils
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec, MambaSpec, iter_layer_specs
from vllm.v1.kv_cache_layout import KVCacheLayout
from vllm_hydra_head.export.configuration_hydra_head import HydraHeadConfig
from vllm_hydra_head.settings import block_tokens, layer_states, living_groups, page_bytes, state_bytes

LAYERS, HEADS, GROUPS, D, BF16 = 28, 16, 8, 128, torch.bfloat16
TOKENS = (4096, 131_072)
MIB = 2**20


def head_maps() -> dict[str, list[list[int]]]:
    """FA heads by layer, a quarter of all unless the name says otherwise."""
    draw = random.Random(0)
    groups = draw.sample(range(LAYERS * GROUPS), 56)
    heads = draw.sample(range(LAYERS * HEADS), 112)
    return {
        "4 heads in 2 groups, every layer": [[0, 1, 2, 3]] * LAYERS,
        "56 groups at random over layers": [
            [h for h in range(HEADS) if layer * GROUPS + h // 2 in groups] for layer in range(LAYERS)
        ],
        "112 heads at random": [[h for h in range(HEADS) if layer * HEADS + h in heads] for layer in range(LAYERS)],
        "5 layers of 12 heads, the rest 2": [list(range(12)) if layer % 5 == 2 else [0, 1] for layer in range(LAYERS)],
        "7 whole layers (layer-wise)": [list(range(HEADS)) if layer % 4 == 3 else [] for layer in range(LAYERS)],
    }


class Bytes(NamedTuple):
    planned: float  # by vLLM, for one request
    exact: float  # keys and values of living groups, states of linear heads
    teacher: float


def bytes_of(fa_heads: list[list[int]], tokens: int) -> Bytes:
    config = HydraHeadConfig(fa_heads=fa_heads, num_hidden_layers=LAYERS, head_dim=D)
    layers = range(LAYERS)
    groups = [len(living_groups(config, layer_idx)) for layer_idx in layers]
    exact = sum(groups) * 2 * D * 2 * tokens + sum(state_bytes(layer_states(config, i, BF16)) for i in layers)
    return Bytes(planned(config, groups, tokens), exact, LAYERS * GROUPS * 2 * D * 2 * tokens)


def planned(config: HydraHeadConfig, groups: list[int], tokens: int) -> int:
    """Blocks of every cache group, by vLLM's planner, times the bytes of a block."""
    block, layout = block_tokens(config, BF16), KVCacheLayout.BLHNC
    specs: dict[str, KVCacheSpec] = {}
    for layer_idx, count in enumerate(groups):
        if count:
            specs[f"layers.{layer_idx}.fa"] = FullAttentionSpec(
                block_size=block, num_kv_heads=count, head_size=D, dtype=BF16
            )
        if layer_states(config, layer_idx, BF16):
            state = {"shapes": ((page_bytes(config, BF16),),), "dtypes": (torch.uint8,), "block_size": tokens}
            specs[f"layers.{layer_idx}.recurrent"] = MambaSpec(**state)
    engine = SimpleNamespace(
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=False),
        attention_config=SimpleNamespace(hisparse_config=None),
        speculative_config=None,
        cache_config=SimpleNamespace(get_resolved_kv_cache_layout=lambda: layout, mamba_cache_mode="none"),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
        model_config=SimpleNamespace(max_model_len=tokens, hf_config=config),
    )
    found = kv_cache_utils.get_kv_cache_groups(engine, specs)
    kv_cache_utils.validate_kv_cache_layout(layout, found)
    blocks = 0
    for group in found:
        recurrent = any(isinstance(spec, MambaSpec) for spec in iter_layer_specs(group.kv_cache_spec))
        blocks += 1 if recurrent else -(-tokens // block)
    return blocks * kv_cache_utils._get_kv_cache_bytes_per_block(found, layout)


@pytest.mark.parametrize("name", head_maps())
def test_a_long_request_takes_its_exact_bytes(name: str) -> None:
    found = bytes_of(head_maps()[name], 131_072)
    assert found.exact <= found.planned < 1.05 * found.exact


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    print("| head map | " + " | ".join(f"{t:,} tokens: exact MiB, planned, of the teacher's" for t in TOKENS) + " |")
    print("| :-- |" + " --: |" * len(TOKENS))
    for name, fa_heads in head_maps().items():
        cells = []
        for tokens in TOKENS:
            found = bytes_of(fa_heads, tokens)
            ratio, share = found.planned / found.exact, found.planned / found.teacher
            cells.append(f"{found.exact / MIB:,.0f}, x{ratio:.3f}, {100 * share:.0f}%")
        print(f"| {name} | {' | '.join(cells)} |")
