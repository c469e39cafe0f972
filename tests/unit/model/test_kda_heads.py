# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Kimi Delta Attention heads: Gated DeltaNet heads with a decay for each key channel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from hydra_mcore.model.kda_heads import KimiDeltaHeads
from tests.support.one_layer import scrambled
from tests.support.recurrent_heads import WHOLE, S, X, head_by_head, make, naive_delta_rule_head, rows, run


def naive_head(heads: KimiDeltaHeads, ordinal: int, x_sm: Tensor) -> Tensor:
    low_sd = x_sm @ heads.linear_decay_down.weight.T
    logits_sd = low_sd @ rows(heads.linear_decay.weight, ordinal).T + rows(heads.linear_decay.bias, ordinal)
    return naive_delta_rule_head(heads, ordinal, x_sm, logits_sd)


@pytest.mark.parametrize("documents", [WHOLE, (0, 1, 5, S)], ids=["whole", "packed"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"kda_kv": "per_group", "kda_conv_kernel": 0},
        {"kda_conv_activation": "silu", "kda_conv_kernel": 2, "kda_qk_norm": "none"},
        {"kda_position": "nope", "kda_write_max": 2.0},
    ],
    ids=lambda changes: "-".join(changes) or "default",
)
def test_equals_every_step_written_out(
    one_rank: ProcessGroupCollection, changes: dict[str, Any], documents: tuple[int, ...]
) -> None:
    """Directions and gates are float32 in the layer."""
    heads = scrambled(make("kda", one_rank, **changes))
    expected = head_by_head(naive_head, heads, documents)
    torch.testing.assert_close(run(heads, documents), expected, rtol=1e-10, atol=1e-12)


@torch.no_grad()
def test_with_equal_decays_of_all_channels_it_is_gated_delta_net(one_rank: ProcessGroupCollection) -> None:
    """W_down holds the decay rows of the GDN heads, and W_up picks a head's row for all its channels."""
    gdn, kda = scrambled(make("gdn", one_rank)), scrambled(make("kda", one_rank))
    for name, parameter in kda.named_parameters():
        if "linear_decay" not in name:
            parameter.copy_(gdn.get_parameter(name))
    kda.linear_decay_down.weight[:3] = gdn.linear_decay.weight
    kda.linear_decay.weight.zero_()
    for ordinal in range(3):
        rows(kda.linear_decay.weight, ordinal)[:, ordinal] = 1.0
        rows(kda.linear_decay.bias, ordinal).fill_(gdn.linear_decay.bias[ordinal])
    torch.testing.assert_close(run(kda), run(gdn), rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_heads_start_as_gated_delta_net_whatever_the_first_projection_is(one_rank: ProcessGroupCollection) -> None:
    kda = make("kda", one_rank, kda_half_life=30.0, kda_write_max=2.0)
    kda.linear_decay_down.weight.normal_(std=9.0)
    log_decay_sbhd, write_sbh = kda._gates(X)
    torch.testing.assert_close((30 * log_decay_sbhd).exp(), torch.full_like(log_decay_sbhd, 0.5))
    torch.testing.assert_close(write_sbh, torch.ones_like(write_sbh))


def test_the_first_projection_learns_once_the_second_has(one_rank: ProcessGroupCollection) -> None:
    kda = make("kda", one_rank)
    weights = [kda.linear_decay_down.weight, kda.linear_decay.weight]
    down, up = torch.autograd.grad(run(kda).square().sum(), weights)
    assert down.abs().max() == 0 and up.abs().max() > 0
    (down,) = torch.autograd.grad(run(scrambled(kda)).square().sum(), weights[:1])
    assert down.abs().max() > 0


@torch.no_grad()
def test_the_half_life_that_is_watched_is_that_of_the_mean_over_channels(one_rank: ProcessGroupCollection) -> None:
    kda = scrambled(make("kda", one_rank))
    module, of_logits = kda.watched()["half-life"]
    expected = kda._gates(X)[0].mean(dim=-1, keepdim=True)
    torch.testing.assert_close(of_logits(module(kda.linear_decay_down(X))), expected)
