# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The border to flash-linear-attention: which kernel is called under which names. The kernels themselves need a GPU:
``tests/gpu``.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hydra_mcore.ops import fla_kernels
from hydra_mcore.sequence import SequencePart
from tests.support.naive_linear_attention import naive_linear_attention
from tests.support.rules import CHANNEL_DECAY, HEAD_DECAY, LINEAR_ATTENTION, RULES, Rule, assert_same

KERNEL = {HEAD_DECAY.name: "delta", CHANNEL_DECAY.name: "channel_delta", LINEAR_ATTENTION.name: "linear"}
each_rule = pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)


def stand_in(rule: Rule) -> Callable[..., tuple[Tensor, Tensor]]:
    """Flash-linear-attention's names, dtypes and state layout [n, h, d, v] on the naive recurrence. It looks at what
    it is given, and takes nothing else.
    """

    def over(naive, tokens, initial_state, cu_seqlens, cu_seqlens_cpu):
        q, k, v, *gates = tokens
        assert q.dtype == k.dtype == v.dtype == torch.bfloat16 and initial_state.dtype == torch.float32
        assert all(gate.dtype == torch.float32 for gate in gates)
        if cu_seqlens is None:
            return naive(*tokens, initial_state)
        assert cu_seqlens.dtype == cu_seqlens_cpu.dtype == torch.int64
        return rule.one_by_one(naive, cu_seqlens.tolist())(*tokens, initial_state)

    def delta(*, q, k, v, g, beta, scale, initial_state, output_final_state, cu_seqlens=None, cu_seqlens_cpu=None):
        assert output_final_state and scale is None
        return over(rule.truth, (q, k, v, g, beta), initial_state, cu_seqlens, cu_seqlens_cpu)

    def linear(*, q, k, v, g_gamma, scale, initial_state, output_final_state, cu_seqlens=None, cu_seqlens_cpu=None):
        def naive(q, k, v, state):
            return naive_linear_attention(q, k, v, g_gamma, initial_state_bhdv=state)

        assert output_final_state and scale is None and g_gamma.dtype == torch.float32
        return over(naive, (q, k, v), initial_state, cu_seqlens, cu_seqlens_cpu)

    return linear if rule.decay == "fixed" else delta


def only(monkeypatch: pytest.MonkeyPatch, rule: Rule, name: str) -> None:
    """There is one kernel, and it serves every tensor."""
    kernels = fla_kernels.Kernels(**dict.fromkeys(fla_kernels.Kernels._fields) | {name: stand_in(rule)})
    monkeypatch.setattr(fla_kernels, "kernels", lambda: kernels)
    monkeypatch.setattr(fla_kernels, "serve", lambda x: True)


@each_rule
def test_names_are_translated_for_the_kernel(rule: Rule, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, bounds = rule.inputs(documents=2, dtype=torch.bfloat16), (0, 30, 70)
    expected = rule.packed(bounds)(*inputs)
    only(monkeypatch, rule, KERNEL[rule.name])
    assert_same(rule.packed(bounds)(*inputs), expected, 2**-8)


@each_rule
def test_few_tokens_take_the_recurrent_kernel_where_no_gradient_is_wanted(
    rule: Rule, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = rule.inputs(b=2, s=5, dtype=torch.bfloat16)
    expected = rule.ours(*inputs)
    only(monkeypatch, rule, f"{KERNEL[rule.name]}_few")
    with torch.no_grad():
        assert_same(rule.ours(*inputs), expected, 2**-8)
    only(monkeypatch, rule, KERNEL[rule.name])
    assert_same(rule.ours(*inputs), expected, 2**-8)


@each_rule
def test_keys_and_values_follow_the_queries_dtype(rule: Rule, monkeypatch: pytest.MonkeyPatch) -> None:
    q, *others = rule.inputs(dtype=torch.bfloat16)
    only(monkeypatch, rule, KERNEL[rule.name])
    part = SequencePart(q.shape[1])
    assert_same(rule.ours(q, *(x.double() for x in others), part=part), rule.truth(q, *others), 2**-8)


def test_a_missing_kernel_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fla.ops.gated_delta_rule", None)
    fla_kernels.kernels.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert fla_kernels.kernels() is None and fla_kernels.kernels() is None
    fla_kernels.kernels.cache_clear()
    assert ["pip install 'flash-linear-attention" in str(w.message) for w in caught] == [True]
