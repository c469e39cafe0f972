# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Linear attention beside other people's functions, and beside the delta rule. What it shares with other recurrences is
in ``test_recurrences.py``.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hydra_mcore.ops.linear_attention import linear_attention
from tests.support.rules import LINEAR_ATTENTION, assert_same, linear_attention_rule, outputs_and_gradients


@pytest.mark.parametrize("s", [1, 64, 150])
def test_equals_flash_linear_attention_in_float32(s: int) -> None:
    reference = pytest.importorskip("fla.ops.simple_gla.naive", reason="needs flash-linear-attention")
    inputs = linear_attention_rule(-0.2, -0.01).inputs(b=2, s=s, d=32, v=16, dtype=torch.float32)

    def chunked(*x: Tensor) -> tuple[Tensor, Tensor]:
        log_decay_bsh = torch.tensor([-0.2, -0.01]).expand(2, s, 2)
        return reference.naive_chunk_simple_gla(*x[:3], log_decay_bsh, initial_state=x[3], output_final_state=True)

    expected = outputs_and_gradients(chunked, inputs)
    assert_same(outputs_and_gradients(linear_attention_rule(-0.2, -0.01).ours, inputs), expected, 1e-5)


def test_without_decay_it_is_causal_attention_without_softmax() -> None:
    inputs = LINEAR_ATTENTION.inputs(b=2, s=130)[:-1]

    def attention(q_bshd: Tensor, k_bshd: Tensor, v_bshv: Tensor) -> tuple[Tensor, Tensor]:
        scores_bhss = torch.einsum("bihd,bjhd->bhij", q_bshd, k_bshd).tril() * q_bshd.shape[-1] ** -0.5
        return torch.einsum("bhij,bjhv->bihv", scores_bhss, v_bshv), torch.einsum("bjhd,bjhv->bhdv", k_bshd, v_bshv)

    actual = outputs_and_gradients(linear_attention_rule(0.0).ours, inputs)
    assert_same(actual, outputs_and_gradients(attention, inputs), 1e-12)


def test_every_head_has_its_own_decay() -> None:
    """A head's result does not depend on its place: heads beside one another equal each alone."""
    q, k, v, state = LINEAR_ATTENTION.inputs(b=2, h=3)
    log_decay_h = torch.tensor([-0.3, 0.0, -0.01], dtype=torch.float64)
    out, last = linear_attention(q, k, v, log_decay_h, initial_state_bhdv=state)
    for head in range(3):
        own = slice(head, head + 1)
        tokens = (x[:, :, own] for x in (q, k, v))
        out_own, last_own = linear_attention(*tokens, log_decay_h[own], initial_state_bhdv=state[:, own])
        torch.testing.assert_close(out[:, :, own], out_own)
        torch.testing.assert_close(last[:, own], last_own)
