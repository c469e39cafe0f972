# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The recurrent heads of one layer on one rank, and what they have in common, head by head: slow truth for the tests.

Heads 0, 2 and 3 of the layer are of the kind, the others are FA (tests/support/one_layer.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from hydra_mcore.heads import HeadsByKind
from hydra_mcore.model.branch import Branch, branch_class
from hydra_mcore.sequence import SequencePart
from tests.support.naive_gated_delta import naive_gated_delta_rule
from tests.support.one_layer import D, M, normed, one_layer, positions_of, random, rotary_angles, rotated

S = 12
WHOLE = (0, S)
X = random(S, 1, M)
HEAD_OF_ORDINAL = (0, 2, 3)
GROUP_OF_ORDINAL = (0, 1, 1)


def make(kind: str, groups: ProcessGroupCollection, **changes: Any) -> Any:
    """The branch of a kind."""
    heads = HeadsByKind(fa=(1, 4, 5), **{kind: HEAD_OF_ORDINAL})
    return branch_class(kind)(*one_layer(heads, **changes), groups)


def run(heads: Branch, documents: tuple[int, ...] = WHOLE) -> Tensor:
    """Outputs of the heads, [s, 1, h, d]."""
    output = heads(X, SequencePart(S, documents=documents), rotary_angles(positions_of(documents)))
    assert output.shared is None
    return output.own[0]


def head_by_head(naive_head: Callable[..., Tensor], heads: Branch, documents: tuple[int, ...] = WHOLE) -> Tensor:
    """As ``run``, document by document, by ``naive_head(heads, ordinal, x_sm)`` -> [s, d]."""
    out = torch.zeros(S, 1, len(HEAD_OF_ORDINAL), D, dtype=torch.float64)
    for ordinal in range(len(HEAD_OF_ORDINAL)):
        for start, end in itertools.pairwise(documents):
            out[start:end, 0, ordinal] = naive_head(heads, ordinal, X[start:end, 0])
    return out


def rows(weight: Tensor, ordinal: int, size: int = D) -> Tensor:
    """The rows of one head."""
    return weight[ordinal * size : (ordinal + 1) * size]


def naive_queries_keys_values(heads: Branch, ordinal: int, x_sm: Tensor) -> list[Tensor]:
    """One head's, [s, d] each, after convolution, norms and rotary."""
    rotary = rotary_angles(list(range(len(x_sm))))
    of_kv = ordinal if heads.option("kv") == "per_head" else GROUP_OF_ORDINAL[ordinal]
    qkv_sc = torch.cat(
        [x_sm @ rows(heads.linear_q.weight, ordinal).T, x_sm @ rows(heads.linear_kv.weight, of_kv, 2 * D).T], dim=-1
    )
    if hasattr(heads, "conv"):
        qkv_sc = naive_convolution(qkv_sc, rows(heads.conv.weight, ordinal, 3 * D), heads.option("conv_kernel"))
        qkv_sc = qkv_sc * qkv_sc.sigmoid() if heads.option("conv_activation") == "silu" else qkv_sc
    q_sd, k_sd, v_sd = qkv_sc.chunk(3, dim=-1)
    if heads.option("qk_norm") == "rms":
        q_sd, k_sd = normed(q_sd, heads.q_norm.weight), normed(k_sd, heads.k_norm.weight)
    if heads.option("position") == "rope":
        q_sd, k_sd = rotated(q_sd, rotary), rotated(k_sd, rotary)
    return [q_sd, k_sd, v_sd]


def naive_convolution(x_sc: Tensor, weight_ct: Tensor, taps: int) -> Tensor:
    """y_t = sum_j w_j x_(t - taps + 1 + j), and nothing before the first token."""
    out = torch.zeros_like(x_sc)
    for t in range(len(x_sc)):
        for back in range(min(taps, t + 1)):
            out[t] += weight_ct[:, taps - 1 - back] * x_sc[t - back]
    return out


def naive_delta_rule_head(heads: Branch, ordinal: int, x_sm: Tensor, decay_logits: Tensor) -> Tensor:
    """A head of the delta rule; ``decay_logits`` are [s], or [s, d] for a decay of each key channel."""
    q_sd, k_sd, v_sd = naive_queries_keys_values(heads, ordinal, x_sm)
    q_sd, k_sd = (t / t.norm(dim=-1, keepdim=True) for t in (q_sd, k_sd))
    log_decay = -heads.A_log.weight[ordinal].exp() * (1 + decay_logits.exp()).log()
    write_s = x_sm @ heads.linear_write.weight[ordinal] + heads.linear_write.bias[ordinal]
    write_s = heads.option("write_max") * write_s.sigmoid()
    tokens = (t[None, :, None] for t in (q_sd, k_sd, v_sd, log_decay, write_s))
    return naive_gated_delta_rule(*tokens)[0][0, :, 0]
