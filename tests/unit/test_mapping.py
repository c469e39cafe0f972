# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Weight mappings: where the rows go, and that both directions undo each other."""

import pytest
import torch

from hydra_mcore.config import HydraOptions, ModelShape, field_docs
from hydra_mcore.convert.families import FAMILIES, QWEN3, Family, dimensions
from hydra_mcore.convert.hf_import import expand_rules
from hydra_mcore.convert.mapping import Copy, PerGroup, Stacked

SHAPE = ModelShape(num_layers=2, hidden_size=5, num_heads=6, num_kv_groups=3, head_dim=4, ffn_hidden_size=7, vocab_size=11, native_length=8)


@pytest.mark.parametrize("mappings", [[Copy()], [Stacked(0, 2), Stacked(1, 2)], [PerGroup(0, 2), PerGroup(1, 2)]], ids=str)
@pytest.mark.parametrize("ours_shape", [(24, 5), (12,)], ids=str)
def test_both_directions_undo_each_other(mappings, ours_shape):
    parts = [torch.randn(ours_shape[0] // len(mappings), *ours_shape[1:]) for _ in mappings]
    ours = torch.full(ours_shape, float("nan"))
    written = sum(mapping.from_hf(part, ours, SHAPE) for mapping, part in zip(mappings, parts, strict=True))
    assert written == ours.numel() and not ours.isnan().any(), "together the parts are the parameter, each value once"
    for mapping, part in zip(mappings, parts, strict=True):
        assert torch.equal(mapping.to_hf(ours, SHAPE), part)


def test_gate_rows_stand_above_up_rows():
    gate, up, ours = torch.randn(7, 5), torch.randn(7, 5), torch.empty(14, 5)
    Stacked(0, 2).from_hf(gate, ours, SHAPE)
    Stacked(1, 2).from_hf(up, ours, SHAPE)
    assert torch.equal(ours, torch.cat([gate, up]))


def test_every_kv_group_holds_its_k_rows_then_its_v_rows():
    k, v, ours = torch.randn(12, 5), torch.randn(12, 5), torch.empty(24, 5)
    PerGroup(0, 2).from_hf(k, ours, SHAPE)
    PerGroup(1, 2).from_hf(v, ours, SHAPE)
    assert torch.equal(ours, torch.cat([k[0:4], v[0:4], k[4:8], v[4:8], k[8:12], v[8:12]]))


def test_values_take_the_dtype_of_the_parameter_and_come_back_as_a_copy():
    ours = torch.zeros(4, 5, dtype=torch.bfloat16)
    Copy().from_hf(torch.full((4, 5), 1.0 + 2**-12), ours, SHAPE)
    assert ours.dtype == torch.bfloat16 and ours.eq(1.0).all()
    Copy().to_hf(ours, SHAPE).zero_()
    assert ours.eq(1.0).all()


@pytest.mark.parametrize("family", FAMILIES.values(), ids=list(FAMILIES))
@pytest.mark.parametrize("tied", [True, False])
def test_table_gives_every_part_of_a_parameter_once(family: Family, tied: bool):
    shape = ModelShape(**{**vars(SHAPE), "tied_embeddings": tied})
    rules = expand_rules(family, shape)
    targets = [(rule.ours, rule.mapping) for rule in rules.values()]
    assert len(set(targets)) == len(targets)
    for ours in {ours for ours, _ in targets}:
        kinds = [mapping for name, mapping in targets if name == ours]
        assert len(kinds) == getattr(kinds[0], "parts", 1)
        assert {getattr(kind, "part", 0) for kind in kinds} == set(range(len(kinds)))
    assert all(dim in dimensions(shape) for rule in rules.values() for dim in rule.dims)
    assert (family.output_layer.hf in rules) is not tied
    assert family.embedding in rules


def test_qwen3_keys_are_fields_of_the_shape():
    assert {*QWEN3.shape_keys, *QWEN3.shape_defaults} <= set(vars(SHAPE))


def test_every_option_has_a_docstring_to_become_its_help():
    assert set(field_docs(HydraOptions)) == set(vars(HydraOptions()))
