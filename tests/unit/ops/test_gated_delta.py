# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The gated delta rule against a naive recurrence, Megatron-Core's function and its own invariances."""

from __future__ import annotations

import itertools
import sys
import warnings
from collections.abc import Callable, Sequence
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.ssm.gated_delta_net.common import torch_chunk_gated_delta_rule
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hydra_mcore.ops import chunks, fla_kernels
from hydra_mcore.ops.gated_delta import gated_delta_rule
from hydra_mcore.sequence import SequencePart
from tests.support.naive_gated_delta import naive_gated_delta_rule

# The five inputs [b, s, h, ...] in the order of the signature; an initial state may follow.
Inputs = list[Tensor]


def make_inputs(
    b: int = 1, s: int = 70, h: int = 2, d: int = 8, v: int = 6, *, documents: int = 1, dtype=torch.float64
) -> Inputs:
    """Random inputs with beta up to 2, mild decays and an initial state for every row or document."""
    rng = torch.Generator().manual_seed(1000 * s + b)
    randn = lambda *shape: torch.randn(shape, generator=rng, dtype=torch.float64)  # noqa: E731
    rand = lambda *shape: torch.rand(shape, generator=rng, dtype=torch.float64)  # noqa: E731
    inputs = [
        F.normalize(randn(b, s, h, d), dim=-1),
        F.normalize(randn(b, s, h, d), dim=-1),
        randn(b, s, h, v),
        -0.2 * rand(b, s, h),
        2 * rand(b, s, h),
        randn(b * documents, h, d, v),
    ]
    return [x.to(dtype) for x in inputs]


def outputs_and_gradients(rule: Callable[..., tuple[Tensor, Tensor]], inputs: Inputs) -> list[Tensor]:
    """Output, final state and the gradients of all inputs, with random gradients into both results."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out, state = rule(*leaves)
    rng = torch.Generator().manual_seed(7)
    loss = sum((x * torch.randn(x.shape, generator=rng, dtype=torch.float64)).sum() for x in (out, state))
    return [out.detach(), state.detach(), *torch.autograd.grad(loss, leaves)]


def _rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def assert_same(actual: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> None:
    """Compare tensor by tensor: root mean square of the difference over that of the expected tensor, or over 1
    where the truth is exactly 0."""
    names = ("out", "final state", "dq", "dk", "dv", "dlog_decay", "dwrite", "dinitial_state")
    for name, x, y in zip(names[: len(expected)], actual, expected, strict=True):
        assert x.shape == y.shape, name
        error = _rms(x.double() - y.double()) / (_rms(y.double()) or 1.0)
        assert error <= tolerance, f"{name}: relative error {error:.1e}"


def ours(*inputs: Tensor, **options) -> tuple[Tensor, Tensor]:
    return gated_delta_rule(*inputs[:5], initial_state_bhdv=inputs[5] if inputs[5:] else None, **options)


def naive(*inputs: Tensor) -> tuple[Tensor, Tensor]:
    return naive_gated_delta_rule(*inputs[:5], initial_state_bhdv=inputs[5] if inputs[5:] else None)


def packed(bounds: Sequence[int], **options) -> Callable[..., tuple[Tensor, Tensor]]:
    """``ours`` over documents packed at ``bounds``."""
    return lambda *inputs: ours(*inputs, part=SequencePart(inputs[0].shape[1], documents=tuple(bounds)), **options)


def one_by_one(
    rule: Callable[..., tuple[Tensor, Tensor]], bounds: Sequence[int]
) -> Callable[..., tuple[Tensor, Tensor]]:
    """``rule`` over each document by itself, results joined as packing joins them."""

    def apply(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        results = [
            rule(*(x[:, start:end] for x in inputs[:5]), inputs[5][document : document + 1])
            for document, (start, end) in enumerate(itertools.pairwise(bounds))
        ]
        outs, states = zip(*results, strict=True)
        return torch.cat(outs, dim=1), torch.cat(states)

    return apply


# Truth: oracles


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("s", [1, 63, 64, 65, 200])
def test_equals_the_naive_recurrence(s: int, with_state: bool) -> None:
    inputs = make_inputs(b=2, s=s)[: 6 if with_state else 5]
    assert_same(outputs_and_gradients(ours, inputs), outputs_and_gradients(naive, inputs), 1e-10)


@pytest.mark.parametrize(("d", "v"), [(16, 4), (4, 16), (1, 1)])
def test_key_and_value_dimensions_may_differ(d: int, v: int) -> None:
    inputs = make_inputs(s=40, d=d, v=v)
    small_chunks = lambda *x: ours(*x, chunk_size=16)  # noqa: E731
    assert_same(outputs_and_gradients(small_chunks, inputs), outputs_and_gradients(naive, inputs), 1e-10)


@pytest.mark.parametrize("s", [1, 63, 64, 65, 200])
def test_equals_megatron_core_in_float32(s: int) -> None:
    inputs = make_inputs(b=2, s=s, d=32, v=16, dtype=torch.float32)

    def megatron(*x: Tensor) -> tuple[Tensor, Tensor]:
        return torch_chunk_gated_delta_rule(*x[:5], initial_state=x[5], output_final_state=True)

    assert_same(outputs_and_gradients(ours, inputs), outputs_and_gradients(megatron, inputs), 1e-5)


def test_gradients_agree_with_finite_differences() -> None:
    leaves = [x.requires_grad_() for x in make_inputs(s=5, h=1, d=3, v=2, documents=2)]
    assert torch.autograd.gradcheck(packed([0, 1, 5], chunk_size=2), leaves)


# Truth: numerics


def test_scale_multiplies_the_queries() -> None:
    inputs = make_inputs(d=16)
    torch.testing.assert_close(ours(*inputs, scale=1.0)[0], ours(*inputs)[0] * 4)


def test_bfloat16_computes_in_float32() -> None:
    inputs = make_inputs(s=100, d=32, v=32, dtype=torch.bfloat16)
    out, state = ours(*inputs)
    out_float, state_float = ours(*(x.float() for x in inputs))
    assert state.dtype == torch.float32 and torch.equal(state, state_float)
    assert out.dtype == torch.bfloat16 and torch.equal(out, out_float.bfloat16())
    assert_same([out], [out_float], 2**-8)
    gradients = outputs_and_gradients(ours, inputs)[2:]
    assert all(x.dtype == torch.bfloat16 for x in gradients)


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_strong_decay_stays_exact_in_float32(share: float) -> None:
    # A head that forgets at once on some tokens and keeps the others: sums of log decays reach -1,000 within
    # a chunk, while neighbours differ by 0.1.
    inputs = make_inputs(s=200, dtype=torch.float32)
    strong = torch.rand(inputs[3].shape, generator=torch.Generator().manual_seed(0)) <= share
    inputs[3] = inputs[3].masked_fill(strong, -20.0)
    actual = outputs_and_gradients(ours, inputs)
    assert all(x.isfinite().all() for x in actual)
    assert_same(actual, outputs_and_gradients(naive, inputs), 2e-6)


@pytest.mark.parametrize("shape", [{"h": 0}, {"b": 0}, {"s": 0}])
def test_empty_inputs_stay_connected(shape: dict[str, int]) -> None:
    inputs = make_inputs(**shape)
    out, state, *gradients = outputs_and_gradients(ours, inputs)
    assert out.shape == inputs[2].shape and out.numel() == 0
    assert torch.equal(state, inputs[5])
    assert [x.shape for x in gradients] == [x.shape for x in inputs]


# Invariances: splitting and packing


@pytest.mark.parametrize("cut", [1, 63, 64, 100])
def test_two_calls_equal_one(cut: int) -> None:
    inputs = make_inputs(b=2, s=130)

    def in_two(*x: Tensor) -> tuple[Tensor, Tensor]:
        first, state = ours(*(y[:, :cut] for y in x[:5]), x[5])
        second, state = ours(*(y[:, cut:] for y in x[:5]), state)
        return torch.cat([first, second], dim=1), state

    assert_same(outputs_and_gradients(in_two, inputs), outputs_and_gradients(ours, inputs), 1e-12)


@pytest.mark.parametrize(
    "bounds",
    [
        [0, 150],
        [0, 63, 150],
        [0, 64, 128, 150],
        [0, 65, 150],
        [0, 1, 2, 3, 150],
        [0, 64, 65, 149, 150],
    ],
)
def test_packed_documents_equal_each_alone(bounds: list[int]) -> None:
    inputs = make_inputs(s=150, documents=len(bounds) - 1)
    actual = outputs_and_gradients(packed(bounds), inputs)
    assert_same(actual, outputs_and_gradients(one_by_one(ours, bounds), inputs), 1e-12)
    assert_same(actual, outputs_and_gradients(one_by_one(naive, bounds), inputs), 1e-10)


@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=6),
    st.sampled_from([1, 4, 7, 64]),
    st.sampled_from([1, 60, 2**18]),
)
def test_any_boundaries_chunks_and_segments(lengths: list[int], chunk_size: int, segment_values: int) -> None:
    bounds = [0, *itertools.accumulate(lengths)]
    inputs = make_inputs(s=bounds[-1], h=1, d=4, v=3, documents=len(lengths))
    with mock.patch.object(chunks, "SEGMENT_VALUES", segment_values):
        actual = outputs_and_gradients(packed(bounds, chunk_size=chunk_size), inputs)
    assert_same(actual, outputs_and_gradients(one_by_one(naive, bounds), inputs), 1e-10)


@pytest.mark.parametrize("chunks_at_once", [1, 2, 3])
def test_rows_of_many_segments(chunks_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(b=2, s=70 * 7, h=3)
    monkeypatch.setattr(chunks, "SEGMENT_VALUES", chunks_at_once * 2 * 3 * 8 * 64)
    actual = outputs_and_gradients(ours, inputs)
    assert_same(actual, outputs_and_gradients(naive, inputs), 1e-10)
    with torch.no_grad():
        assert_same(ours(*inputs), actual[:2], 0.0)


def test_nothing_leaks_between_documents() -> None:
    bounds, inputs = [0, 30, 31, 100], make_inputs(s=100, documents=3)
    clean_out, clean_state = packed(bounds)(*inputs)
    for x in inputs[:5]:
        x[:, 30:31] = torch.nan
    out, state = packed(bounds)(*inputs)
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


@pytest.mark.parametrize("documents", [1, 4])
def test_time_and_memory_are_linear_in_length(documents: int) -> None:
    def cost(s: int) -> tuple[int, int]:
        saved: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        leaves = [x.requires_grad_() for x in make_inputs(s=s, dtype=torch.float32)[:5]]
        with _Cost() as mode, torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            out, state = packed(range(0, s + 1, s // documents))(*leaves)
            torch.autograd.backward([out.sum(), state.sum()])
        return mode.elements, sum(saved.values())

    costs = [cost(s) for s in (1024, 2048, 4096)]
    for shorter, longer in itertools.pairwise(costs):
        assert [y / x for x, y in zip(shorter, longer, strict=True)] == pytest.approx([2, 2], rel=0.02)


# Refusals


@pytest.mark.parametrize(
    ("bounds", "cause"),
    [
        ([], "start at 0"),
        ([0], "at least one document"),
        ([3, 70], "start at 0"),
        ([0, 40, 69], "end at the sequence length 70, got 69"),
        ([0, 40, 40, 70], "increase from document to document, got 40 after 40"),
        ([0, 90, 70], "increase from document to document, got 70 after 90"),
    ],
)
def test_wrong_boundaries_are_refused(bounds: list[int], cause: str) -> None:
    with pytest.raises(ValueError, match=cause) as error:
        packed(bounds)(*make_inputs()[:5])
    assert "\n" not in str(error.value)


def test_a_packed_batch_and_a_wrong_state_are_refused() -> None:
    with pytest.raises(ValueError, match="one row, got a batch of 2"):
        packed([0, 30, 70])(*make_inputs(b=2)[:5])
    with pytest.raises(ValueError, match=r"has shape \[1, 2, 8, 6\], needs \[2, 2, 8, 6\]"):
        packed([0, 30, 70])(*make_inputs())


def test_what_is_not_of_the_part_is_refused() -> None:
    inputs = make_inputs()
    with pytest.raises(ValueError, match="70 tokens were given, the part has 35"):
        ours(*inputs[:5], part=SequencePart(70, cp_size=2))
    with pytest.raises(ValueError, match="initial state comes from the previous rank"):
        ours(*inputs, part=SequencePart(140, cp_size=2))


# The border to flash-linear-attention. The kernels themselves need a GPU: tests/gpu/test_fla_kernels_gpu.py


def test_names_are_translated_for_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def kernel(*, q, k, v, g, beta, scale, initial_state, output_final_state, cu_seqlens, cu_seqlens_cpu):
        """Flash-linear-attention's names and state layout, [n, h, d, v], on the naive recurrence."""
        assert output_final_state and scale is None
        assert (
            cu_seqlens.dtype == cu_seqlens_cpu.dtype == torch.int64 and q.dtype == k.dtype == v.dtype == torch.bfloat16
        )
        assert g.dtype == beta.dtype == initial_state.dtype == torch.float32
        return one_by_one(naive, cu_seqlens.tolist())(q, k, v, g, beta, initial_state)

    inputs = make_inputs(documents=2, dtype=torch.bfloat16)
    part = SequencePart(70, documents=(0, 30, 70))
    monkeypatch.setattr(
        fla_kernels, "kernels", lambda: fla_kernels.Kernels(chunked=kernel, recurrent=None, conv=None, l2norm=None)
    )
    monkeypatch.setattr(fla_kernels, "serve", lambda x: True)
    actual = gated_delta_rule(*inputs[:5], initial_state_bhdv=inputs[5], part=part)
    monkeypatch.undo()
    assert_same(actual, packed([0, 30, 70])(*inputs), 2**-8)


def test_a_missing_kernel_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fla.ops.gated_delta_rule", None)
    fla_kernels.kernels.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert fla_kernels.kernels() is None and fla_kernels.kernels() is None
    fla_kernels.kernels.cache_clear()
    assert ["pip install 'flash-linear-attention" in str(w.message) for w in caught] == [True]
