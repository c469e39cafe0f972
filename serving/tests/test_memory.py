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
from vllm_hydra_head.ranks import deal
from vllm_hydra_head.settings import (
    allotted_groups,
    block_tokens,
    layer_states,
    living_groups,
    page_bytes,
    state_bytes,
)

LAYERS, HEADS, GROUPS, D, BF16 = 28, 16, 8, 128, torch.bfloat16
TOKENS = (4096, 131_072)
RANKS = (1, 2, 4, 8)
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
    planned: float  # by vLLM, for one request, on each rank
    exact: float  # keys and values of living groups, states of linear heads, of the whole model
    teacher: float  # of the whole model


def bytes_of(fa_heads: list[list[int]], tokens: int, ranks: int = 1) -> Bytes:
    config = HydraHeadConfig(fa_heads=fa_heads, num_hidden_layers=LAYERS, head_dim=D)
    layers = range(LAYERS)
    groups = sum(len(living_groups(config, layer_idx)) for layer_idx in layers)
    exact = groups * 2 * D * 2 * tokens + sum(state_bytes(layer_states(config, i, BF16)) for i in layers)
    return Bytes(planned(deal(config, ranks), tokens), exact, LAYERS * GROUPS * 2 * D * 2 * tokens)


def planned(views: list[HydraHeadConfig], tokens: int) -> int:
    """Blocks of every cache group, by vLLM's planner, times the bytes of a block."""
    block, layout = block_tokens(views, BF16), KVCacheLayout.BLHNC
    specs: dict[str, KVCacheSpec] = {}
    for layer_idx in range(LAYERS):
        if count := allotted_groups(views, layer_idx):
            specs[f"layers.{layer_idx}.fa"] = FullAttentionSpec(
                block_size=block, num_kv_heads=count, head_size=D, dtype=BF16
            )
        if any(layer_states(view, layer_idx, BF16) for view in views):
            state = {"shapes": ((page_bytes(views, BF16),),), "dtypes": (torch.uint8,), "block_size": tokens}
            specs[f"layers.{layer_idx}.recurrent"] = MambaSpec(**state)
    engine = SimpleNamespace(
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=False),
        attention_config=SimpleNamespace(hisparse_config=None),
        speculative_config=None,
        cache_config=SimpleNamespace(get_resolved_kv_cache_layout=lambda: layout, mamba_cache_mode="none"),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
        model_config=SimpleNamespace(max_model_len=tokens, hf_config=views[0]),
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


@pytest.mark.parametrize("name", head_maps())
@pytest.mark.parametrize("ranks", [2, 4, 8, 16])
def test_ranks_get_every_head_once_and_as_few_kv_groups_as_they_can(name: str, ranks: int) -> None:
    config = HydraHeadConfig(fa_heads=head_maps()[name], num_hidden_layers=LAYERS, head_dim=D)
    views = deal(config, ranks)
    assert sum(view.intermediate_size for view in views) == config.intermediate_size
    for layer_idx in range(LAYERS):
        dealt = [(kind, head) for view in views for kind, heads in view.heads[layer_idx].items() for head in heads]
        assert sorted(dealt) == sorted((kind, head) for kind, own in config.heads[layer_idx].items() for head in own)
        assert allotted_groups(views, layer_idx) == -(-len(living_groups(config, layer_idx)) // ranks)
        counts = [sum(map(len, view.heads[layer_idx].values())) for view in views]
        assert max(counts) - min(counts) <= max(1, len(config.heads[layer_idx].get("fa", [])) // ranks)


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
    print("\n| head map, 128K tokens, ranks: | " + " | ".join(map(str, RANKS)) + " |")
    print("| :-- |" + " --: |" * len(RANKS))
    for name, fa_heads in head_maps().items():
        each = [bytes_of(fa_heads, TOKENS[1], ranks) for ranks in RANKS]
        cells = [
            f"{found.planned / MIB:,.0f}, x{found.planned * ranks / found.exact:.2f}"
            for found, ranks in zip(each, RANKS, strict=True)
        ]
        print(f"| {name} | {' | '.join(cells)} |")
