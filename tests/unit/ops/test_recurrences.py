# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""What holds for every recurrence of linear heads: truth, numerics, cuts, documents, cost. The torch functions; what is
particular to the delta rule is in ``test_gated_delta.py``.
"""

from __future__ import annotations

import itertools
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hydra_mcore.ops import chunks
from hydra_mcore.ops.chunks import FEW_TOKENS
from hydra_mcore.sequence import SequencePart
from tests.support.rules import (
    CHANNEL_DECAY,
    HEAD_DECAY,
    LINEAR_ATTENTION,
    RULES,
    Rule,
    assert_same,
    linear_attention_rule,
    outputs_and_gradients,
)

each_rule = pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)

# Truth


@each_rule
@pytest.mark.parametrize(
    ("s", "with_state"), [(1, False), (FEW_TOKENS, True), (63, True), (64, False), (65, True), (130, False)]
)
def test_equals_the_naive_recurrence(rule: Rule, s: int, with_state: bool) -> None:
    inputs = rule.inputs(b=2, s=s)[: rule.num_tensors + with_state]
    assert_same(outputs_and_gradients(rule.ours, inputs), outputs_and_gradients(rule.truth, inputs), 1e-10)


@each_rule
@pytest.mark.parametrize(("d", "v"), [(16, 4), (4, 16), (1, 1)])
def test_key_and_value_dimensions_may_differ(rule: Rule, d: int, v: int) -> None:
    inputs = rule.inputs(s=21, d=d, v=v)
    small_chunks = lambda *x: rule.in_chunks(*x, chunk_size=8)  # noqa: E731
    assert_same(outputs_and_gradients(small_chunks, inputs), outputs_and_gradients(rule.truth, inputs), 1e-10)


@each_rule
def test_gradients_agree_with_finite_differences(rule: Rule) -> None:
    leaves = [x.requires_grad_() for x in rule.inputs(s=4, h=1, d=2, v=2, documents=2)]
    assert torch.autograd.gradcheck(lambda *x: rule.in_chunks(*x, bounds=[0, 1, 4], chunk_size=2), leaves)


# Numerics


@each_rule
@pytest.mark.parametrize("s", [FEW_TOKENS, 20])
def test_scale_multiplies_the_queries(rule: Rule, s: int) -> None:
    inputs = rule.inputs(s=s, d=16)
    torch.testing.assert_close(rule.ours(*inputs, scale=1.0)[0], rule.ours(*inputs)[0] * 4)


@each_rule
@pytest.mark.parametrize("s", [FEW_TOKENS, 100])
def test_bfloat16_computes_in_float32(rule: Rule, s: int) -> None:
    inputs = rule.inputs(s=s, d=32, v=32, dtype=torch.bfloat16)
    out, state = rule.ours(*inputs)
    out_float, state_float = rule.ours(*(x.float() for x in inputs))
    assert state.dtype == torch.float32 and torch.equal(state, state_float)
    assert out.dtype == torch.bfloat16 and torch.equal(out, out_float.bfloat16())
    gradients = outputs_and_gradients(rule.ours, inputs)[2:]
    assert all(x.dtype == torch.bfloat16 for x in gradients)


def _forgetful(rule: Rule, share: float) -> list[Tensor]:
    """Inputs of which a share of the log decays lies between -20 and -1,000, mixed at random with mild ones; of the
    last head or channel all are mild, of the first none forgets anything.
    """
    inputs, rng = rule.inputs(s=150, h=3, dtype=torch.float32), torch.Generator().manual_seed(0)
    log_decay = inputs[3]
    strong = -20.0 * 50.0 ** torch.rand(log_decay.shape, generator=rng)
    chosen = torch.rand(log_decay.shape, generator=rng) < share
    chosen[..., -1] = False
    log_decay = torch.where(chosen, strong, log_decay)
    log_decay[..., 0] = 0.0
    return [*inputs[:3], log_decay, *inputs[4:]]


@pytest.mark.parametrize("share", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("rule", [HEAD_DECAY, CHANNEL_DECAY], ids=lambda rule: rule.name)
def test_strong_decays_stay_exact_in_float32(rule: Rule, share: float) -> None:
    # Sums of log decays reach -10,000 within a chunk, while neighbours differ by 0.1.
    inputs = _forgetful(rule, share)
    actual = outputs_and_gradients(rule.ours, inputs)
    assert all(x.isfinite().all() for x in actual)
    assert_same(actual, outputs_and_gradients(rule.truth, inputs), 2e-6)


@pytest.mark.parametrize("log_decay", [0.0, -1e-6, -20.0, -1000.0])
def test_any_fixed_decay_stays_exact_in_float32(log_decay: float) -> None:
    rule = linear_attention_rule(log_decay, -0.05)
    inputs = rule.inputs(s=150, dtype=torch.float32)
    actual = outputs_and_gradients(rule.ours, inputs)
    assert all(x.isfinite().all() for x in actual)
    assert_same(actual, outputs_and_gradients(rule.truth, inputs), 2e-6)


@each_rule
@pytest.mark.parametrize("shape", [{"h": 0}, {"b": 0}, {"s": 0}])
def test_empty_inputs_stay_connected(rule: Rule, shape: dict[str, int]) -> None:
    inputs = rule.inputs(**shape)
    out, state, *gradients = outputs_and_gradients(rule.ours, inputs)
    assert out.shape == inputs[2].shape and out.numel() == 0
    assert torch.equal(state, inputs[-1])
    assert [x.shape for x in gradients] == [x.shape for x in inputs]


# Invariances: splitting and packing


@each_rule
@pytest.mark.parametrize("cut", [1, 63, 64, 100])
def test_two_calls_equal_one(rule: Rule, cut: int) -> None:
    inputs = rule.inputs(b=2, s=130)

    def in_two(*x: Tensor) -> tuple[Tensor, Tensor]:
        first, state = rule.ours(*(y[:, :cut] for y in x[:-1]), x[-1])
        second, state = rule.ours(*(y[:, cut:] for y in x[:-1]), state)
        return torch.cat([first, second], dim=1), state

    assert_same(outputs_and_gradients(in_two, inputs), outputs_and_gradients(rule.ours, inputs), 1e-12)


@each_rule
@pytest.mark.parametrize(
    "bounds",
    [[0, 38], [0, 15, 38], [0, 16, 32, 38], [0, 17, 38], [0, 1, 2, 3, 38], [0, 16, 17, 37, 38]],
)
def test_packed_documents_equal_each_alone(rule: Rule, bounds: list[int]) -> None:
    inputs = rule.inputs(s=38, documents=len(bounds) - 1)
    actual = outputs_and_gradients(lambda *x: rule.in_chunks(*x, bounds=bounds, chunk_size=16), inputs)
    assert_same(actual, outputs_and_gradients(rule.packed(bounds), inputs), 1e-12)
    assert_same(actual, outputs_and_gradients(rule.one_by_one(rule.ours, bounds), inputs), 1e-12)
    assert_same(actual, outputs_and_gradients(rule.one_by_one(rule.truth, bounds), inputs), 1e-10)


@each_rule
@settings(max_examples=8, deadline=None, derandomize=True, database=None)
@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=6), st.sampled_from([1, 4, 64]), st.sampled_from([1, 60, 2**18])
)
def test_any_boundaries_chunks_and_segments(
    rule: Rule, lengths: list[int], chunk_size: int, segment_values: int
) -> None:
    bounds = [0, *itertools.accumulate(lengths)]
    inputs = rule.inputs(s=bounds[-1], h=1, d=4, v=3, documents=len(lengths))
    with mock.patch.object(chunks, "SEGMENT_VALUES", segment_values):
        actual = outputs_and_gradients(lambda *x: rule.in_chunks(*x, bounds=bounds, chunk_size=chunk_size), inputs)
    assert_same(actual, outputs_and_gradients(rule.one_by_one(rule.truth, bounds), inputs), 1e-10)


@each_rule
def test_rows_of_many_segments(rule: Rule, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = rule.inputs(b=2, s=16 * 6 + 7, h=3)
    expected = outputs_and_gradients(rule.truth, inputs)
    for chunks_at_once in (1, 2, 3):
        monkeypatch.setattr(chunks, "SEGMENT_VALUES", chunks_at_once * 2 * 3 * 8 * 16)
        actual = outputs_and_gradients(lambda *x: rule.in_chunks(*x, chunk_size=16), inputs)
        assert_same(actual, expected, 1e-10)
        with torch.no_grad():
            assert_same(rule.in_chunks(*inputs, chunk_size=16), actual[:2], 0.0)


@each_rule
def test_nothing_leaks_between_documents(rule: Rule) -> None:
    bounds, inputs = [0, 30, 31, 100], rule.inputs(s=100, documents=3)
    clean_out, clean_state = rule.packed(bounds)(*inputs)
    for x in inputs[:-1]:
        x[:, 30:31] = torch.nan
    out, state = rule.packed(bounds)(*inputs)
    assert out[:, 30:31].isnan().all() and state[1].isnan().all()
    kept = torch.arange(100) != 30
    assert torch.equal(out[:, kept], clean_out[:, kept]) and torch.equal(state[[0, 2]], clean_state[[0, 2]])


# Cost: counted, not timed


class _Cost(TorchDispatchMode):
    """Elements written by all operators, forward and backward."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        results = result if isinstance(result, (tuple, list)) else (result,)
        self.elements += sum(x.numel() for x in results if isinstance(x, Tensor))
        return result


@each_rule
@pytest.mark.parametrize("documents", [1, 4])
def test_time_and_memory_are_linear_in_length(rule: Rule, documents: int) -> None:
    def cost(s: int) -> tuple[int, int]:
        saved: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        leaves = [x.requires_grad_() for x in rule.inputs(s=s, dtype=torch.float32)[:-1]]
        with _Cost() as mode, torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            out, state = rule.packed(range(0, s + 1, s // documents))(*leaves)
            torch.autograd.backward([out.sum(), state.sum()])
        return mode.elements, sum(saved.values())

    costs = [cost(s) for s in (1024, 2048, 4096)]
    for shorter, longer in itertools.pairwise(costs):
        assert [y / x for x, y in zip(shorter, longer, strict=True)] == pytest.approx([2, 2], rel=0.02)


# Refusals


@each_rule
def test_a_packed_batch_and_a_wrong_state_are_refused(rule: Rule) -> None:
    with pytest.raises(ValueError, match="one row, got a batch of 2"):
        rule.packed([0, 30, 70])(*rule.inputs(b=2)[:-1])
    with pytest.raises(ValueError, match=r"has shape \[1, 2, 8, 6\], needs \[2, 2, 8, 6\]"):
        rule.packed([0, 30, 70])(*rule.inputs())


@each_rule
def test_what_is_not_of_the_part_is_refused(rule: Rule) -> None:
    inputs = rule.inputs()
    with pytest.raises(ValueError, match="70 tokens were given, the part has 35"):
        rule.ours(*inputs[:-1], part=SequencePart(70, cp_size=2))
    with pytest.raises(ValueError, match="initial state comes from the previous rank"):
        rule.ours(*inputs, part=SequencePart(140, cp_size=2))


def test_the_rules_are_told_apart() -> None:
    """Each rule beside the others on the same vectors: what tests give them makes a difference."""
    outs = [rule.ours(*rule.inputs())[0] for rule in (HEAD_DECAY, CHANNEL_DECAY, LINEAR_ATTENTION)]
    for one, other in itertools.combinations(outs, 2):
        assert (one - other).abs().mean() > 1e-2
