# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Parameters of heads: which rows are whose, what a rank without heads holds, one checkpoint shard a head."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from hydra_mcore.heads import HeadLayout
from hydra_mcore.model.attention_plan import HeadSet
from hydra_mcore.model.parameters import GroupLinear, HeadLinear, PerHead, RMSNorm, gathered, head_shards
from tests.support.one_layer import HEADS, D, M, normed, one_layer, random, scrambled

S, B, ROWS = 5, 2, 4
X = random(S, B, M)
SOME = HeadSet((0, 3), total=4, shared=(1,))  # heads 0 and 3 of four are this rank's, head 1 is every rank's
NONE = HeadSet((), total=4)


def shapes(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}


def stored(module: torch.nn.Module) -> dict[tuple[str, int], Tensor]:
    """What a checkpoint gets: the block of every (name, head)."""
    blocks, metadata = {}, {"dp_cp_group": torch.distributed.group.WORLD}
    for factory in module.sharded_state_dict("branch.", metadata=metadata).values():
        for shard in factory.build():
            assert shard.global_shape[1:] == shard.data.shape[1:] and shard.data.shape[0] == 1
            blocks[shard.key, shard.global_offset[0]] = shard.data[0]
    return blocks


def test_heads_are_numbered_within_their_kind_or_within_the_layer() -> None:
    """On two ranks: heads 1, 4, 5 are FA, so head 4 is ordinal 1 of its kind; 0, 2, 3 are GDN."""
    layout = HeadLayout(HEADS, num_kv_groups=3, tp_size=2, fa_balance="heads")
    for tp_rank, own in enumerate(layout.ranks):
        for kind, members in HEADS.items():
            expected = HeadSet(tuple(members.index(head) for head in own[kind]), total=3)
            assert HeadSet.of_kind(layout, kind, tp_rank) == expected
        assert HeadSet.of_layer(layout, tp_rank) == HeadSet(own["fa"] + own["gdn"], total=6)
    assert sorted(own for rank in range(2) for own in HeadSet.of_kind(layout, "fa", rank).ordinals) == [0, 1, 2]


def test_shared_heads_stand_by_themselves() -> None:
    layout = HeadLayout(HEADS, num_kv_groups=3, tp_size=2, fa_balance="queries")
    sets = [HeadSet.of_kind(layout, "fa", rank) for rank in range(2)]
    assert [len(heads.ordinals) for heads in sets] == [1, 1]  # of three, the third is computed by both
    assert sets[0].shared == sets[1].shared and len(sets[0].shared) == 1
    assert sorted(sets[0].ordinals + sets[1].ordinals + sets[0].shared) == [0, 1, 2]


def test_blocks_are_stacked_head_by_head(one_rank: ProcessGroupCollection) -> None:
    assert shapes(PerHead(one_layer().config, SOME, (), one_rank)) == {"weight": (2,), "weight_shared": (1,)}
    linear = PerHead(one_layer().config, SOME, (ROWS, M), one_rank, bias=True)
    assert shapes(linear) == {
        "weight": (2 * ROWS, M), "bias": (2 * ROWS,), "weight_shared": (ROWS, M), "bias_shared": (ROWS,)
    }  # fmt: skip
    assert not PerHead(one_layer().config, SOME, (), one_rank).empty
    marked = {name for name, parameter in linear.named_parameters() if hasattr(parameter, "tensor_model_parallel")}
    assert marked == {"weight", "bias"}  # what all ranks hold is counted once


def test_a_projection_has_rows_for_each_head(one_rank: ProcessGroupCollection) -> None:
    linear = scrambled(HeadLinear(one_layer().config, SOME, ROWS, one_rank, bias=True))
    found = linear(X)
    assert found.shape == (S, B, 2, ROWS)
    for place in range(2):
        rows = slice(place * ROWS, (place + 1) * ROWS)
        torch.testing.assert_close(found[:, :, place], X @ linear.weight[rows].T + linear.bias[rows])
    torch.testing.assert_close(linear(X, shared=True)[:, :, 0], X @ linear.weight_shared.T + linear.bias_shared)


def test_a_rank_without_heads_has_no_parameters(one_rank: ProcessGroupCollection) -> None:
    linear = HeadLinear(one_layer().config, NONE, ROWS, one_rank, bias=True)
    assert linear.empty and not shapes(linear) and not stored(linear)
    assert linear(X).shape == (S, B, 0, ROWS)


def test_a_checkpoint_has_one_shard_a_head(one_rank: ProcessGroupCollection) -> None:
    """Own and shared heads stand under one name, at their ordinals: the layout does not show."""
    linear = scrambled(HeadLinear(one_layer().config, SOME, ROWS, one_rank, bias=True))
    blocks = stored(linear)
    assert blocks.keys() == {(f"branch.{name}", ordinal) for name in ("weight", "bias") for ordinal in (0, 1, 3)}
    torch.testing.assert_close(blocks["branch.weight", 3], linear.weight[ROWS:], rtol=0, atol=0)
    torch.testing.assert_close(blocks["branch.bias", 1], linear.bias_shared, rtol=0, atol=0)


def test_shards_along_columns_come_together_again(one_rank: ProcessGroupCollection) -> None:
    """As of the output projection, whose input columns belong to heads."""
    weight = random(M, 2 * D)
    factory = head_shards("proj", weight, (5, 2), total=6, replica_id=(0, 0, 0), axis=1)
    shards = factory.build()
    assert [(shard.global_offset[0], shard.global_shape) for shard in shards] == [(5, (6, M, D)), (2, (6, M, D))]
    torch.testing.assert_close(shards[1].data[0], weight[:, D:], rtol=0, atol=0)
    torch.testing.assert_close(factory.merge_fn([shard.data for shard in shards]), weight, rtol=0, atol=0)


def make_groups(groups: ProcessGroupCollection, tp_size: int = 1, **facts: Any) -> GroupLinear:
    config, _, layout = one_layer(**facts)
    return scrambled(GroupLinear(config, dataclasses.replace(layout, tp_size=tp_size), 2 * D, groups, "fa"))


def test_keys_and_values_are_those_of_the_groups_that_heads_read(one_rank: ProcessGroupCollection) -> None:
    """FA heads 1, 4, 5 read groups 0, 2, 2 of three; group 1 lives in the other branch alone."""
    linear = make_groups(one_rank, qkv_bias=True)
    assert linear.living == linear.groups == [0, 2]
    assert linear.group_of_head.tolist() == [0, 1, 1]
    assert shapes(linear) == {"weight": (2 * 2 * D, M), "bias": (2 * 2 * D,)}
    for place in range(2):
        rows = slice(place * 2 * D, (place + 1) * 2 * D)
        torch.testing.assert_close(linear(X)[:, :, place], X @ linear.weight[rows].T + linear.bias[rows])
    assert stored(linear).keys() == {(f"branch.{name}", group) for name in ("weight", "bias") for group in (0, 1)}


def test_a_group_that_ranks_divide_is_held_by_all_and_stored_once(one_rank: ProcessGroupCollection) -> None:
    """As the first of six ranks, one head each, holds them: group 2's heads stand on two ranks."""
    linear = make_groups(one_rank, tp_size=6)
    assert linear.split == [2]
    assert shapes(linear)["weight_split"] == (2 * D, M)
    blocks = stored(linear)
    torch.testing.assert_close(blocks["branch.weight", 1], linear.weight_split, rtol=0, atol=0)


def test_the_norm_over_a_head(one_rank: ProcessGroupCollection) -> None:
    norm = RMSNorm(one_layer().config, D, eps=1e-6, tp_group=one_rank.tp)
    x_sbhd = random(S, B, 3, D)
    torch.testing.assert_close(norm(x_sbhd), normed(x_sbhd, torch.ones(D)))
    torch.testing.assert_close(scrambled(norm)(x_sbhd), normed(x_sbhd, norm.weight))


def test_parameters_that_are_read_without_a_call_are_waited_for(one_rank: ProcessGroupCollection) -> None:
    scale, called = PerHead(one_layer().config, SOME, (), one_rank), []
    scale.register_forward_pre_hook(lambda module, _: called.append(module))
    assert gathered(scale) is scale and called == [scale]
