# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Full-attention heads: the teacher's projections, causal softmax without positions, gates handed on."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from hydra_mcore.model.branch import GroupedKeysValues
from hydra_mcore.model.fa_heads import FullAttentionHeads, log_position_scale, set_log_scale
from hydra_mcore.sequence import SequencePart
from tests.support.one_layer import (
    HEADS,
    D,
    M,
    normed,
    one_layer,
    positions_of,
    random,
    rotary_angles,
    rotated,
    scrambled,
)  # fmt: skip

S = 12
WHOLE = (0, S)
X = random(S, 1, M)
GROUP_OF_ORDINAL = (0, 1, 1)  # heads 1, 4 and 5 read the layer's groups 0, 2 and 2, of which these are rows 0 and 1


def make(groups: ProcessGroupCollection, **changes: Any) -> FullAttentionHeads:
    return scrambled(FullAttentionHeads(*one_layer(**changes), groups))


def run(heads: FullAttentionHeads, x_sbm: Tensor = X, documents: tuple[int, ...] = WHOLE) -> Tensor:
    output = heads(x_sbm, SequencePart(S, documents=documents), rotary_angles(positions_of(documents)))
    assert output.shared is None
    return output.own[0]


def naive_attention(heads: FullAttentionHeads, documents: tuple[int, ...] = WHOLE) -> Tensor:
    """Head by head, document by document, query by query."""
    out, rotary = torch.zeros(S, len(HEADS["fa"]), D, dtype=torch.float64), rotary_angles(positions_of(documents))
    for ordinal, group in enumerate(GROUP_OF_ORDINAL):
        q_sd = project(heads.linear_q, slice(ordinal * D, (ordinal + 1) * D))
        k_sd, v_sd = project(heads.linear_kv, slice(group * 2 * D, (group + 1) * 2 * D)).chunk(2, dim=-1)
        if heads.config.qk_layernorm:
            q_sd, k_sd = normed(q_sd, heads.q_norm.weight), normed(k_sd, heads.k_norm.weight)
        if heads.options.fa_position == "rope":
            q_sd, k_sd = rotated(q_sd, rotary), rotated(k_sd, rotary)
        for start, end in itertools.pairwise(documents):
            for t in range(start, end):
                base = heads.log_scale_base
                scale = 1.0 if base is None else math.log(t - start + base) / math.log(base)
                scores = k_sd[start : t + 1] @ (scale * q_sd[t]) / math.sqrt(D)
                out[t, ordinal] = scores.softmax(dim=0) @ v_sd[start : t + 1]
    return out[:, None]


def project(linear: torch.nn.Module, rows: slice) -> Tensor:
    out = X[:, 0] @ linear.weight[rows].T
    return out + linear.bias[rows] if hasattr(linear, "bias") else out


@pytest.mark.parametrize("documents", [WHOLE, (0, 1, 5, S)], ids=["whole", "packed"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"qk_norm": False},
        {"qkv_bias": True},
        {"fa_position": "rope"},
        {"log_scale": True, "fa_log_scale_base": 10.0},
        {"fa_position": "rope", "log_scale": True, "qkv_bias": True},
    ],
    ids=lambda changes: "-".join(changes) or "default",
)
def test_equals_naive_attention(
    one_rank: ProcessGroupCollection, changes: dict[str, Any], documents: tuple[int, ...]
) -> None:
    heads = make(one_rank, **changes)
    torch.testing.assert_close(run(heads, documents=documents), naive_attention(heads, documents), rtol=1e-6, atol=1e-7)


def test_without_positions_the_order_of_the_past_does_not_show(one_rank: ProcessGroupCollection) -> None:
    swapped = torch.cat([X[:-1].flip(0), X[-1:]])
    for position, same in (("nope", True), ("rope", False)):
        heads = make(one_rank, fa_position=position)
        assert torch.allclose(run(heads, swapped)[-1], run(heads)[-1], rtol=1e-10, atol=1e-12) is same


def test_the_log_position_scale() -> None:
    """ln(t + a) / ln(a) with t from 0: nothing at first, twice as sharp where t + a is a squared (HypeNet Eq 11)."""
    torch.testing.assert_close(log_position_scale(torch.tensor([0, 90]), 10.0), torch.tensor([1.0, 2.0]))


def test_the_log_position_scale_is_set_from_outside(one_rank: ProcessGroupCollection) -> None:
    heads = make(one_rank)
    for base in (10.0, None):
        set_log_scale(heads, base)
        torch.testing.assert_close(run(heads), naive_attention(heads), rtol=1e-6, atol=1e-7)


def test_the_gate_is_made_here_and_applied_by_the_fusion(one_rank: ProcessGroupCollection) -> None:
    gated, ungated = make(one_rank), make(one_rank, fa_gate="none")
    ungated.load_state_dict(gated.state_dict(), strict=False)
    part, rotary = SequencePart(S), rotary_angles(list(range(S)))
    (out_sbhd, gate_sbhd), (alone_sbhd, nothing) = gated(X, part, rotary).own, ungated(X, part, rotary).own
    assert nothing is None
    torch.testing.assert_close(out_sbhd, alone_sbhd, rtol=0, atol=0)
    torch.testing.assert_close(gate_sbhd, gated.gate(X), rtol=0, atol=0)


def test_heads_read_given_keys_and_values_where_all_kinds_share_theirs(one_rank: ProcessGroupCollection) -> None:
    own, given = make(one_rank), make(one_rank, qkv="shared", gdn_kv="per_group")
    assert given.linear_kv is None
    given.load_state_dict(own.state_dict(), strict=False)
    kv = GroupedKeysValues(own.linear_kv(X), torch.tensor(GROUP_OF_ORDINAL))
    found = given(X, SequencePart(S), rotary_angles(list(range(S))), kv).own[0]
    torch.testing.assert_close(found, run(own), rtol=0, atol=0)
