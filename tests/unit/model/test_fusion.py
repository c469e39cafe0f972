# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Fusion: every head is gated, normalised and scaled by itself, then all stand side by side in the rank's order."""

from __future__ import annotations

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from hydra_mcore.heads import HeadsByKind
from hydra_mcore.model.fusion import Fusion
from tests.support.one_layer import HEADS, SHAPE, D, M, normed, one_layer, random, scrambled

S, B = 5, 2
X = random(S, B, M, seed=2)
BRANCHES = {  # outputs of three heads each: the one kind is gated by channel, the other by head
    "fa": (random(S, B, 3, D, seed=3), random(S, B, 3, D, seed=4).sigmoid()),
    "gdn": (random(S, B, 3, D, seed=5), random(S, B, 3, 1, seed=6).sigmoid()),
}
UNGATED = {kind: (out, None) for kind, (out, _) in BRANCHES.items()}


def make(groups: ProcessGroupCollection, heads: HeadsByKind = HEADS, **options: str) -> Fusion:
    config, plan, layout = one_layer(heads, **options)
    return Fusion(config, plan.options, layout, groups)


def naive_fusion(fusion: Fusion) -> Tensor:
    options, heads = fusion.options, []
    for kind, (out_sbhd, gate) in BRANCHES.items():
        has_weight = options.fusion != "none" and options.fusion_norm_weight == "branch"
        weight_d = fusion.norms[kind].weight if has_weight else torch.ones(D)
        for ordinal in range(3):
            out_sbd = out_sbhd[:, :, ordinal]
            if options.gate_order == "before_norm":
                out_sbd = out_sbd * gate[:, :, ordinal]
            if options.fusion != "none":
                out_sbd = normed(out_sbd, weight_d)
            if options.gate_order == "after_norm":
                out_sbd = out_sbd * gate[:, :, ordinal]
            if options.fusion in ("scale", "competition"):
                out_sbd = out_sbd * fusion.scale.weight[len(heads)]
            heads.append(out_sbd)
    if options.fusion == "competition":
        share_sbh = SHAPE.num_heads * (X @ fusion.competition.T).softmax(dim=-1)
        for place, head_idx in enumerate((1, 4, 5, 0, 2, 3)):  # the layer's shares stand in Hugging Face order
            heads[place] = heads[place] * share_sbh[..., head_idx, None]
    return torch.stack(heads, dim=2)


@pytest.mark.parametrize("fusion", ["scale", "norm", "none", "competition"])
@pytest.mark.parametrize("gate_order", ["before_norm", "after_norm"])
@pytest.mark.parametrize("fusion_norm_weight", ["branch", "none"])
def test_equals_a_loop_over_heads(
    one_rank: ProcessGroupCollection, fusion: str, gate_order: str, fusion_norm_weight: str
) -> None:
    module = scrambled(make(one_rank, fusion=fusion, gate_order=gate_order, fusion_norm_weight=fusion_norm_weight))
    torch.testing.assert_close(module(BRANCHES, X), naive_fusion(module), rtol=1e-12, atol=1e-12)


def test_heads_start_with_the_norm_alone(one_rank: ProcessGroupCollection) -> None:
    """Scales start at one and shares equal, so that all three ways begin at the same place."""
    norm, scale, competition = (
        make(one_rank, fusion=fusion)(BRANCHES, X) for fusion in ("norm", "scale", "competition")
    )
    torch.testing.assert_close(scale, norm, rtol=0, atol=0)
    torch.testing.assert_close(competition, norm, rtol=1e-12, atol=0)


def test_magnitudes_of_heads_do_not_pass(one_rank: ProcessGroupCollection) -> None:
    module = scrambled(make(one_rank))
    louder = {**UNGATED, "gdn": (100.0 * UNGATED["gdn"][0], None)}
    torch.testing.assert_close(module(louder, X), module(UNGATED, X), rtol=1e-5, atol=1e-5)


def test_a_constant_gate_before_the_norm_is_nothing(one_rank: ProcessGroupCollection) -> None:
    """So a converted head, whose gate starts near a constant, starts as it was."""
    constant = {kind: (out, torch.full_like(out, 0.7)) for kind, (out, _) in BRANCHES.items()}
    before, after = (make(one_rank, gate_order=order) for order in ("before_norm", "after_norm"))
    torch.testing.assert_close(before(constant, X), before(UNGATED, X), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(after(constant, X), 0.7 * after(UNGATED, X), rtol=1e-12, atol=0)


def test_without_gate_and_fusion_heads_pass_as_they_are(one_rank: ProcessGroupCollection) -> None:
    module = make(one_rank, fusion="none")
    assert not list(module.parameters())
    expected = torch.cat([BRANCHES["fa"][0], BRANCHES["gdn"][0]], dim=2)
    torch.testing.assert_close(module(UNGATED, X), expected, rtol=0, atol=0)


def test_parameters_are_those_of_the_kinds_in_the_layer(one_rank: ProcessGroupCollection) -> None:
    assert {name: tuple(p.shape) for name, p in make(one_rank, fusion="competition").named_parameters()} == {
        "norms.fa.weight": (D,),
        "norms.gdn.weight": (D,),
        "scale.weight": (6,),
        "competition": (6, M),
    }
    alone = make(one_rank, HeadsByKind(gdn=range(6)))
    assert {name for name, _ in alone.named_parameters()} == {"norms.gdn.weight", "scale.weight"}
    out_sbhd = random(S, B, 6, D)
    torch.testing.assert_close(alone({"gdn": (out_sbhd, None)}, X), normed(out_sbhd, torch.ones(D)))
