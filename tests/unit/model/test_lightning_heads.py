# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Lightning attention heads: projections, norms, rotary, a state that decays at a rate fixed for each head, a gate."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from hydra_mcore.config import HydraOptions
from hydra_mcore.kinds.lightning import decay_rate
from hydra_mcore.model.cache import LayerCache
from hydra_mcore.model.lightning_heads import LightningHeads
from hydra_mcore.sequence import SequencePart
from tests.support.one_layer import SHAPE, D, M, positions_of, random, rotary_angles, scrambled
from tests.support.recurrent_heads import (
    HEAD_OF_ORDINAL,
    WHOLE,
    S,
    X,
    head_by_head,
    make,
    naive_queries_keys_values,
    run,
)


def naive_head(heads: LightningHeads, ordinal: int, x_sm: Tensor) -> Tensor:
    """S_t = lambda S_(t-1) + k_t v_t^T, o_t = S_t^T q_t / sqrt(d)."""
    slope = heads.options.lightning_slope ** ((HEAD_OF_ORDINAL[ordinal] + 1) / SHAPE.num_heads)
    left = torch.tensor(-slope, dtype=torch.float64).exp()
    state_dv, out = torch.zeros(D, D, dtype=torch.float64), []
    for q_d, k_d, v_d in zip(*naive_queries_keys_values(heads, ordinal, x_sm), strict=True):
        state_dv = left * state_dv + torch.outer(k_d, v_d)
        out.append(q_d @ state_dv * D**-0.5)
    return torch.stack(out)


@pytest.mark.parametrize("documents", [WHOLE, (0, 1, 5, S)], ids=["whole", "packed"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"lightning_kv": "per_group", "lightning_slope": 0.5}, {"lightning_qk_norm": "none"},
     {"lightning_position": "nope", "lightning_slope": 1.0}],
    ids=lambda changes: "-".join(changes) or "default",
)  # fmt: skip
def test_equals_every_step_written_out(
    one_rank: ProcessGroupCollection, changes: dict[str, Any], documents: tuple[int, ...]
) -> None:
    heads = scrambled(make("lightning", one_rank, **changes))
    torch.testing.assert_close(
        run(heads, documents), head_by_head(naive_head, heads, documents), rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize("gate", ["none", "headwise", "elementwise"])
def test_the_gate_is_handed_on(one_rank: ProcessGroupCollection, gate: str) -> None:
    heads = scrambled(make("lightning", one_rank, lightning_gate=gate))
    _, found = heads(X, SequencePart(S), rotary_angles(positions_of(WHOLE))).own
    if gate == "none":
        assert found is None
    else:
        logits_sbx = X @ heads.gate.linear.weight.T + heads.gate.linear.bias
        torch.testing.assert_close(found, logits_sbx.sigmoid().unflatten(-1, (3, -1)))


@pytest.mark.parametrize("num_heads", [1, 8, 16])
def test_rates_are_alibis_slopes(num_heads: int) -> None:
    """Of Press et al., arXiv 2108.12409: a geometric sequence that starts at 2^(-8 / n) and has that ratio."""
    found = [decay_rate(HydraOptions(), head_idx, num_heads) for head_idx in range(num_heads)]
    assert found == pytest.approx([2.0 ** (-8 * (head_idx + 1) / num_heads) for head_idx in range(num_heads)])


def test_the_last_head_of_a_layer_decays_at_the_slope_that_was_asked_for() -> None:
    assert decay_rate(HydraOptions(lightning_slope=0.3), 5, 6) == pytest.approx(0.3)


@torch.no_grad()
def test_rates_are_not_rounded_with_the_model(one_rank: ProcessGroupCollection) -> None:
    """Inputs of 0 write nothing, so that a bfloat16 model's float32 state shows the decay alone."""
    heads, cache = make("lightning", one_rank).bfloat16(), LayerCache(room=0)
    before = random(1, 3, D, D).float()
    cache.states["lightning"]["state"] = before
    heads(torch.zeros(S, 1, M).bfloat16(), SequencePart(S), rotary_angles(positions_of(WHOLE)), cache=cache)
    slopes_h = torch.tensor([2.0 ** (-8 * (h + 1) / SHAPE.num_heads) for h in HEAD_OF_ORDINAL])
    expected = before * (-S * slopes_h.double()).exp().float()[:, None, None]
    torch.testing.assert_close(cache.states["lightning"]["state"], expected, rtol=1e-5, atol=0)
