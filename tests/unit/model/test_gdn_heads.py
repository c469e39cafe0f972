# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Gated DeltaNet heads: projections, short convolution, norms, rotary, unit length, gates, the delta rule."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from hydra_mcore.model.gdn_heads import GatedDeltaHeads
from hydra_mcore.ops.gated_delta import gated_delta_rule
from tests.support.one_layer import D, random, scrambled
from tests.support.recurrent_heads import WHOLE, S, X, head_by_head, make, naive_delta_rule_head, run


def naive_head(heads: GatedDeltaHeads, ordinal: int, x_sm: Tensor) -> Tensor:
    logits_s = x_sm @ heads.linear_decay.weight[ordinal] + heads.linear_decay.bias[ordinal]
    return naive_delta_rule_head(heads, ordinal, x_sm, logits_s)


@pytest.mark.parametrize("documents", [WHOLE, (0, 1, 5, S)], ids=["whole", "packed"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gdn_kv": "per_group"},
        {"gdn_conv_kernel": 0},
        {"gdn_conv_activation": "silu", "gdn_conv_kernel": 2},
        {"gdn_qk_norm": "none"},
        {"gdn_position": "nope"},
        {"gdn_write_max": 2.0},
    ],
    ids=lambda changes: "-".join(changes) or "default",
)
def test_equals_every_step_written_out(
    one_rank: ProcessGroupCollection, changes: dict[str, Any], documents: tuple[int, ...]
) -> None:
    """Directions and gates are float32 in the layer."""
    heads = scrambled(make("gdn", one_rank, **changes))
    expected = head_by_head(naive_head, heads, documents)
    torch.testing.assert_close(run(heads, documents), expected, rtol=1e-10, atol=1e-12)


def test_heads_start_with_a_long_memory_and_a_half_open_write_gate(one_rank: ProcessGroupCollection) -> None:
    heads = make("gdn", one_rank, gdn_half_life=30.0, gdn_write_max=2.0)
    log_decay_sbh, write_sbh = heads._gates(X)
    assert log_decay_sbh.shape == write_sbh.shape == (S, 1, 3)
    torch.testing.assert_close((30 * log_decay_sbh).exp(), torch.full_like(log_decay_sbh, 0.5))
    torch.testing.assert_close(write_sbh, torch.ones_like(write_sbh))
    assert log_decay_sbh.dtype == write_sbh.dtype == X.dtype


def test_the_convolution_starts_as_the_identity(one_rank: ProcessGroupCollection) -> None:
    heads, without = make("gdn", one_rank), make("gdn", one_rank, gdn_conv_kernel=0)
    without.load_state_dict(heads.state_dict(), strict=False)
    torch.testing.assert_close(run(heads), run(without), rtol=1e-12, atol=1e-12)


def test_a_token_read_back_at_once_is_what_was_written(one_rank: ProcessGroupCollection) -> None:
    """With an open write gate, the query that equals a key reads its value, whatever stood there: a delta rule."""
    k_sd, v_sd = torch.nn.functional.normalize(random(S, D), dim=-1), random(S, D, seed=2)
    tokens = [t[None, :, None] for t in (k_sd, k_sd, v_sd, torch.zeros(S), torch.ones(S))]
    torch.testing.assert_close(gated_delta_rule(*tokens, scale=1.0)[0][0, :, 0], v_sd)


def test_statistics_are_read_from_the_gates_projections(one_rank: ProcessGroupCollection) -> None:
    heads = make("gdn", one_rank, gdn_half_life=30.0)
    found = {name: of_logits(module(X)) for name, (module, of_logits) in heads.watched().items()}
    torch.testing.assert_close(found["half-life"], torch.full((S, 1, 3, 1), -math.log(2) / 30), check_dtype=False)
    torch.testing.assert_close(found["write gate"], torch.full((S, 1, 3, 1), 0.5), check_dtype=False)
