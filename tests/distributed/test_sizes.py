# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Parameters that are said against those of models that are built, on one rank and on several."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter

import pytest
import torch

from hydra_mcore.config import HydraOptions, ModelCard, ModelShape, teacher_card
from hydra_mcore.costs.parameters import ATTENTION_PARTS, PARTS, rank_parameters
from hydra_mcore.heads import HeadMap, HeadsByKind
from hydra_mcore.kinds import KINDS
from hydra_mcore.model.build import build_model
from tests.support.launch import model_parallel, run_ranks

SHAPE = ModelShape(
    num_layers=4, hidden_size=20, num_heads=12, num_kv_groups=6, head_dim=6, ffn_hidden_size=36, vocab_size=60,
    native_length=64
)  # fmt: skip
# Layers of all kinds, of one kind beside FA, without FA heads, of FA heads alone; kv groups that two kinds read.
HEAD_MAP = HeadMap(
    12,
    6,
    (
        HeadsByKind(fa=[0, 1, 7], gdn=[2, 4, 6, 8], kda=[3, 9], lightning=[5, 10, 11]),
        HeadsByKind(fa=[0, 1, 4, 7, 10], kda=[2, 3, 5, 6, 8, 9, 11]),
        HeadsByKind(gdn=[4], lightning=[0, 1, 2, 3, *range(5, 12)]),
        HeadsByKind(fa=range(12)),
    ),
)
OPTIONS = [
    HydraOptions(),
    HydraOptions(
        gdn_kv="per_group", fa_gate="headwise", gdn_gate="elementwise", gdn_conv_kernel=0, fusion="norm",
        kda_kv="per_group", kda_gate="headwise", lightning_gate="none",
    ),
    HydraOptions(
        gdn_kv="per_group", qkv="shared", fa_gate="none", gdn_gate="headwise", fusion="competition", gdn_conv_kernel=2,
        kda_conv_kernel=0, lightning_kv="per_group",
    ),
    HydraOptions(
        fusion="none", gdn_qk_norm="none", kda_qk_norm="none", lightning_qk_norm="none", fusion_norm_weight="none",
        lightning_kv="per_group",
    ),
    HydraOptions(fusion_norm_weight="none"),
]  # fmt: skip
SHAPES = [SHAPE, dataclasses.replace(SHAPE, tied_embeddings=False, qk_norm=False, qkv_bias=True)]
PART_OF = {
    "linear_proj": "output projection", "conv": "convolution", "gate": "gates", "fusion": "fusion",
    **{kind: f"{facts.label} heads" for kind, facts in KINDS.items()}, "linear_kv": "FA heads", "mlp": "MLP",
    "input_layernorm": "layer norms", "pre_mlp_layernorm": "layer norms", "final_layernorm": "layer norms",
    "embedding": "embedding", "output_layer": "output layer",
}  # fmt: skip


def part_of(name: str) -> str:
    words = name.split(".")
    return next(part for word, part in PART_OF.items() if word in words)


def counted(model: torch.nn.Module) -> Counter[str]:
    found = Counter(dict.fromkeys(PARTS, 0))
    for name, parameter in model.named_parameters():
        found[part_of(name)] += parameter.numel()
        assert ("self_attention" in name) == (part_of(name) in ATTENTION_PARTS)
    return found


@pytest.mark.parametrize(("tp_size", "pp_size"), [(1, 1), (2, 1), (3, 1), (6, 1), (1, 2), (2, 2)])
def test_every_rank_holds_what_is_said(tp_size: int, pp_size: int) -> None:
    run_ranks(_compare, tp_size * pp_size, tp_size, pp_size)


def _compare(rank: int, tp_size: int, pp_size: int) -> None:
    from megatron.core.process_groups_config import ProcessGroupCollection

    cards = [teacher_card(shape, "") for shape in SHAPES]
    cards += [
        ModelCard(shape=s, head_map=HEAD_MAP, options=o, fingerprint="") for s, o in itertools.product(SHAPES, OPTIONS)
    ]
    with model_parallel(tp=tp_size, pp=pp_size):
        groups = ProcessGroupCollection.use_mpu_process_groups()
        stage, per_stage = groups.pp.rank(), SHAPE.num_layers // pp_size
        ends = {"embedding": stage == 0, "output": stage == pp_size - 1}
        for card in cards:
            layers = range(stage * per_stage, (stage + 1) * per_stage)
            expected = rank_parameters(card, layers, **ends, tp_size=tp_size, tp_rank=groups.tp.rank())
            assert counted(build_model(card, "align")) == expected, card


@pytest.mark.parametrize("tp_size", [1, 2, 3, 6])
def test_shared_heads_are_counted(tp_size: int) -> None:
    run_ranks(_compare_shared, tp_size, tp_size)


def _compare_shared(rank: int, tp_size: int) -> None:
    from megatron.core.process_groups_config import ProcessGroupCollection

    from hydra_mcore.model.build import apply_card, model_config, transformer_config

    with model_parallel(tp=tp_size):
        groups = ProcessGroupCollection.use_mpu_process_groups()
        for shape, options in itertools.product(SHAPES, OPTIONS):
            card = ModelCard(shape=shape, head_map=HEAD_MAP, options=options, fingerprint="")
            config = model_config(card, "align", transformer_config(shape, torch.float32, tp_size))
            apply_card(config, card, "align", "queries")
            expected = rank_parameters(
                card, range(shape.num_layers), tp_size=tp_size, tp_rank=rank, fa_balance="queries"
            )
            assert counted(config.get_builder_cls()(config).build_model(groups)) == expected, card
