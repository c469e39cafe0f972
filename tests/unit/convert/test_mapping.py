# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Weight mappings: where the rows go, that both directions undo each other, that the tables fill every tensor once."""

import itertools
from dataclasses import replace

import pytest
import torch

from hydra_mcore.config import HydraOptions, ModelCard, ModelShape, field_docs, teacher_card
from hydra_mcore.convert.families import EMBEDDING, OUTPUT_LAYER
from hydra_mcore.convert.hydra_family import from_config, to_config
from hydra_mcore.convert.mapping import Columns, InEachBlock, Stacked, Whole
from hydra_mcore.convert.tensor_table import is_teacher, tensor_rules
from hydra_mcore.heads import HeadMap, HeadsByKind

SHAPE = ModelShape(
    num_layers=3,
    hidden_size=5,
    num_heads=6,
    num_kv_groups=3,
    head_dim=4,
    ffn_hidden_size=7,
    vocab_size=11,
    native_length=8,
)
# A layer with heads of every kind (of FA, two of the three kv groups live), one without FA heads, one of these alone.
LAYERS = (
    HeadsByKind(fa=(1, 4), gdn=(0,), kda=(2, 3), lightning=(5,)),
    HeadsByKind(gdn=(0, 4), kda=(1,), lightning=(2, 3, 5)),
    HeadsByKind(fa=range(6)),
)
HEAD_MAP = HeadMap(num_heads=6, num_kv_groups=3, layers=LAYERS)


@pytest.mark.parametrize(
    ("mappings", "hf_shape"),
    [
        ([Whole()], (24, 5)),
        ([Stacked(0, 2), Stacked(1, 2)], (3, 4, 5)),
        ([InEachBlock(0, 2), InEachBlock(1, 2)], (12, 5)),
        ([Columns()], (4, 30)),
    ],
    ids=str,
)
def test_both_directions_undo_each_other(mappings, hf_shape):
    stored = torch.full((6, 4, 5), float("nan"))
    parts = [torch.randn(hf_shape) for _ in mappings]
    written = sum(mapping.from_hf(part, stored) for mapping, part in zip(mappings, parts, strict=True))
    assert written == stored.numel() and not stored.isnan().any(), "together the parts are the tensor, each value once"
    for mapping, part in zip(mappings, parts, strict=True):
        assert torch.equal(mapping.to_hf(stored, hf_shape), part)


def test_gate_rows_stand_above_up_rows():
    gate, up, stored = torch.randn(7, 5), torch.randn(7, 5), torch.empty(14, 5)
    Stacked(0, 2).from_hf(gate, stored)
    Stacked(1, 2).from_hf(up, stored)
    assert torch.equal(stored, torch.cat([gate, up]))


def test_every_kv_group_holds_its_k_rows_then_its_v_rows():
    k, v, stored = torch.randn(12, 5), torch.randn(12, 5), torch.empty(3, 8, 5)
    InEachBlock(0, 2).from_hf(k, stored)
    InEachBlock(1, 2).from_hf(v, stored)
    assert torch.equal(stored.flatten(0, 1), torch.cat([k[0:4], v[0:4], k[4:8], v[4:8], k[8:12], v[8:12]]))


def test_columns_of_the_output_projection_stand_head_by_head():
    hf, stored = torch.randn(5, 12), torch.empty(3, 5, 4)
    Columns().from_hf(hf, stored)
    assert torch.equal(stored[1], hf[:, 4:8])


def test_values_take_the_dtype_of_the_parameter_and_come_back_as_a_copy():
    stored = torch.zeros(4, 5, dtype=torch.bfloat16)
    Whole().from_hf(torch.full((4, 5), 1.0 + 2**-12), stored)
    assert stored.dtype == torch.bfloat16 and stored.eq(1.0).all()
    Whole().to_hf(stored, (4, 5)).zero_()
    assert stored.eq(1.0).all()


def assert_every_part_once(card: ModelCard) -> None:
    rules = tensor_rules(card)
    targets = [(rule.stored, rule.mapping) for rule in rules.values()]
    assert len(set(targets)) == len(targets)
    for stored in {stored for stored, _ in targets}:
        kinds = [mapping for name, mapping in targets if name == stored]
        assert len(kinds) == getattr(kinds[0], "parts", 1)
        assert {getattr(kind, "part", 0) for kind in kinds} == set(range(len(kinds)))
    assert (OUTPUT_LAYER.hf in rules) is not card.shape.tied_embeddings
    assert EMBEDDING.hf in rules


@pytest.mark.parametrize(("tied", "qk_norm", "bias"), list(itertools.product([True, False], repeat=3)))
def test_a_teachers_table_gives_every_part_of_a_tensor_once(tied, qk_norm, bias):
    shape = replace(SHAPE, tied_embeddings=tied, qk_norm=qk_norm, qkv_bias=bias)
    card = teacher_card(shape, "")
    assert_every_part_once(card)
    names = set(tensor_rules(card))
    assert ("model.layers.2.self_attn.q_norm.weight" in names) is qk_norm
    assert ("model.layers.2.self_attn.v_proj.bias" in names) is bias


OPTIONS = [
    {},
    {"fa_gate": "headwise", "gdn_gate": "elementwise", "kda_gate": "headwise", "lightning_gate": "none",
        "fusion": "competition"},
    {"fa_gate": "none", "gdn_gate": "headwise", "gdn_conv_kernel": 0, "gdn_qk_norm": "none", "fusion": "norm"},
    {"kda_gate": "elementwise", "kda_conv_kernel": 0, "kda_qk_norm": "none", "lightning_qk_norm": "none",
        "lightning_gate": "headwise", "lightning_slope": 0.5},
    {"gdn_kv": "per_group", "kda_kv": "per_group", "lightning_kv": "per_group", "fusion_norm_weight": "none"},
    {"qkv": "shared", "fusion": "none"},
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_students_table_gives_every_part_of_a_tensor_once_and_its_config_gives_it_back(options):
    shape = replace(SHAPE, qkv_bias=True, rope_scaling={"rope_type": "linear", "factor": 2.0})
    stages = [{"stage": "align", "sequence_length": 8, "batch_size": 2, "iterations": 3}]
    card = ModelCard(
        shape=shape, head_map=HEAD_MAP, options=HydraOptions(**options), fingerprint="f00", stage="align", stages=stages
    )
    assert_every_part_once(card)
    assert not is_teacher(card)
    config = to_config(card, "float32")
    back = from_config(config, shape)
    assert back == card and back.stages == stages
    assert config["rope_parameters"] == {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6}


def test_every_option_has_a_docstring_to_become_its_help():
    assert set(field_docs(HydraOptions)) == set(vars(HydraOptions()))
