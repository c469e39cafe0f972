# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Gated DeltaNet heads: projections, short convolution, norms, rotary, unit length, gates, the delta rule."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from hydra_mcore.model.gdn_heads import GatedDeltaHeads
from hydra_mcore.ops.gated_delta import gated_delta_rule
from hydra_mcore.sequence import SequencePart
from tests.support.naive_gated_delta import naive_gated_delta_rule
from tests.support.one_layer import D, M, normed, one_layer, positions_of, random, rotary_angles, rotated, scrambled

S = 12
WHOLE = (0, S)
X = random(S, 1, M)
GROUP_OF_ORDINAL = (0, 1, 1)  # heads 0, 2 and 3 read the layer's groups 0, 1 and 1


def make(groups: ProcessGroupCollection, **changes: Any) -> GatedDeltaHeads:
    return GatedDeltaHeads(*one_layer(**changes), groups)


def run(heads: GatedDeltaHeads, documents: tuple[int, ...] = WHOLE) -> Tensor:
    output = heads(X, SequencePart(S, documents=documents), rotary_angles(positions_of(documents)))
    assert output.shared is None
    return output.own[0]


def naive_heads(heads: GatedDeltaHeads, documents: tuple[int, ...] = WHOLE) -> Tensor:
    """Head by head, document by document, each line a step of the layer."""
    out = torch.zeros(S, 1, len(GROUP_OF_ORDINAL), D, dtype=torch.float64)
    for ordinal in range(len(GROUP_OF_ORDINAL)):
        for start, end in itertools.pairwise(documents):
            out[start:end, 0, ordinal] = naive_head(heads, ordinal, X[start:end, 0])
    return out


def naive_head(heads: GatedDeltaHeads, ordinal: int, x_sm: Tensor) -> Tensor:
    options, rotary = heads.options, rotary_angles(list(range(len(x_sm))))
    of_kv = ordinal if options.gdn_kv == "per_head" else GROUP_OF_ORDINAL[ordinal]
    q_sd = x_sm @ heads.linear_q.weight[ordinal * D : (ordinal + 1) * D].T
    kv_sd = x_sm @ heads.linear_kv.weight[of_kv * 2 * D : (of_kv + 1) * 2 * D].T
    qkv_sc = torch.cat([q_sd, kv_sd], dim=-1)
    if taps := options.gdn_conv_kernel:
        qkv_sc = naive_convolution(qkv_sc, heads.conv.weight[ordinal * 3 * D : (ordinal + 1) * 3 * D], taps)
        qkv_sc = qkv_sc * qkv_sc.sigmoid() if options.gdn_conv_activation == "silu" else qkv_sc
    q_sd, k_sd, v_sd = qkv_sc.chunk(3, dim=-1)
    if options.gdn_qk_norm == "rms":
        q_sd, k_sd = normed(q_sd, heads.q_norm.weight), normed(k_sd, heads.k_norm.weight)
    if options.gdn_position == "rope":
        q_sd, k_sd = rotated(q_sd, rotary), rotated(k_sd, rotary)
    q_sd, k_sd = (t / t.norm(dim=-1, keepdim=True) for t in (q_sd, k_sd))
    decay_s = x_sm @ heads.linear_decay.weight[ordinal] + heads.linear_decay.bias[ordinal]
    write_s = x_sm @ heads.linear_write.weight[ordinal] + heads.linear_write.bias[ordinal]
    log_decay_s = -heads.A_log.weight[ordinal].exp() * (1 + decay_s.exp()).log()
    write_s = options.gdn_write_max * write_s.sigmoid()
    tokens = (t[None, :, None] for t in (q_sd, k_sd, v_sd, log_decay_s, write_s))
    return naive_gated_delta_rule(*tokens)[0][0, :, 0]


def naive_convolution(x_sc: Tensor, weight_ct: Tensor, taps: int) -> Tensor:
    """y_t = sum_j w_j x_(t - taps + 1 + j), and nothing before the first token."""
    out = torch.zeros_like(x_sc)
    for t in range(len(x_sc)):
        for back in range(min(taps, t + 1)):
            out[t] += weight_ct[:, taps - 1 - back] * x_sc[t - back]
    return out


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
    heads = scrambled(make(one_rank, **changes))
    torch.testing.assert_close(run(heads, documents), naive_heads(heads, documents), rtol=1e-5, atol=1e-6)


def test_heads_start_with_a_long_memory_and_a_half_open_write_gate(one_rank: ProcessGroupCollection) -> None:
    heads = make(one_rank, gdn_half_life=30.0, gdn_write_max=2.0)
    log_decay_sbh, write_sbh = heads._gates(X)
    assert log_decay_sbh.shape == write_sbh.shape == (S, 1, 3)
    torch.testing.assert_close((30 * log_decay_sbh).exp(), torch.full((S, 1, 3), 0.5))
    torch.testing.assert_close(write_sbh, torch.ones(S, 1, 3))


def test_the_convolution_starts_as_the_identity(one_rank: ProcessGroupCollection) -> None:
    heads, without = make(one_rank), make(one_rank, gdn_conv_kernel=0)
    without.load_state_dict(heads.state_dict(), strict=False)
    torch.testing.assert_close(run(heads), run(without), rtol=1e-12, atol=1e-12)


def test_a_token_read_back_at_once_is_what_was_written(one_rank: ProcessGroupCollection) -> None:
    """With an open write gate, the query that equals a key reads its value, whatever stood there: a delta rule."""
    k_sd, v_sd = torch.nn.functional.normalize(random(S, D), dim=-1), random(S, D, seed=2)
    tokens = [t[None, :, None] for t in (k_sd, k_sd, v_sd, torch.zeros(S), torch.ones(S))]
    torch.testing.assert_close(gated_delta_rule(*tokens, scale=1.0)[0][0, :, 0], v_sd)


def test_statistics_are_read_from_the_gates_projections(one_rank: ProcessGroupCollection) -> None:
    heads = make(one_rank, gdn_half_life=30.0)
    found = {name: of_logits(module(X)) for name, (module, of_logits) in heads.watched().items()}
    torch.testing.assert_close(found["half-life"], torch.full((S, 1, 3, 1), -math.log(2) / 30), check_dtype=False)
    torch.testing.assert_close(found["write gate"], torch.full((S, 1, 3, 1), 0.5), check_dtype=False)
