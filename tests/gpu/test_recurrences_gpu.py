# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Flash-linear-attention's chunked kernels of every recurrence against the torch functions on the same GPU.

Not yet run on a GPU. On 2026-11-29 the same comparisons passed on a CPU in Triton's interpreter (flash-linear-attention
0.6.0, float32, 70 tokens, 16 channels, packed and not, with an initial state): outputs, states and all gradients of all
three recurrences to 8e-7. Where three channels in ten decay by -5, -20 or -1,000, KDA's are equal to 3e-6, 2e-5 and
6e-4. Two context-parallel ranks of 70 tokens, KDA's and linear attention's, equal the naive recurrence to 1e-6. This
checks names, layouts and signs but neither bfloat16 nor compiled code. The interpreter (TRITON_INTERPRET=1) takes these
tests with DEVICE = "cpu", a ``serve`` that does not ask for a GPU, one configuration of each kernel, and loop counters
that have ``.to``. The other kernels: ``test_fla_kernels_gpu.py``.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import Tensor

from hydra_mcore.ops import fla_kernels
from tests.support.rules import CHANNEL_DECAY, RULES, Inputs, Rule

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU (not yet run on one)"),
    pytest.mark.skipif(importlib.util.find_spec("fla") is None, reason="needs flash-linear-attention"),
]
DEVICE = "cuda"
NAMES = ("out", "state", "dq", "dk", "dv")
each_rule = pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)


def kernel_and_reference(
    rule: Rule, inputs: Inputs, bounds: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> list[tuple[Tensor, Tensor]]:
    """Outputs, states and all gradients of both, with the same random gradients into both results."""
    apply = rule.ours if bounds is None else rule.packed(bounds)
    grads = [torch.randn_like(inputs[2]), torch.randn_like(inputs[-1])]

    def run() -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in inputs]
        results = apply(*leaves)
        return [*results, *torch.autograd.grad(results, leaves, grads)]

    with_kernel = run()
    monkeypatch.setattr(fla_kernels, "serve", lambda x: False)
    return list(zip(with_kernel, run(), strict=True))


def relative_errors(pairs: list[tuple[Tensor, Tensor]]) -> list[float]:
    errors = []
    for x, y in pairs:
        assert x.dtype == y.dtype and x.shape == y.shape and x.isfinite().all()
        errors.append(((x.float() - y.float()).square().mean() / y.float().square().mean()).sqrt().item())
    return errors


def on_device(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """Queries, keys and values in this dtype, gates and state in float32."""
    return [x.to(DEVICE, dtype if i < 3 else torch.float32) for i, x in enumerate(inputs)]


@each_rule
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 5e-3), (torch.bfloat16, 2e-2)], ids=str
)  # float32 in TF32
@pytest.mark.parametrize("bounds", [None, [0, 1, 64, 65, 200, 333]])
@pytest.mark.parametrize(("d", "v"), [(128, 128), (64, 128)])
def test_kernel_equals_reference(
    rule: Rule,
    bounds: list[int] | None,
    d: int,
    v: int,
    dtype: torch.dtype,
    tolerance: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    inputs = on_device(rule.inputs(1 if bounds else 2, 333, 3, d, v, documents=len(bounds or [0, 0]) - 1), dtype)
    errors = relative_errors(kernel_and_reference(rule, inputs, bounds, monkeypatch))
    assert max(errors) < tolerance, [f"{error:.1e}" for error in errors]


@pytest.mark.parametrize("strongest", [-5.0, -20.0, -1000.0])
def test_strong_decays_of_some_channels(strongest: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel sums log decays over 64 tokens in float32, so what follows decays of -1,000 is known to 1e-3."""
    torch.manual_seed(0)
    inputs = CHANNEL_DECAY.inputs(s=150, h=2, d=64, v=64)
    inputs[3] = torch.where(torch.rand(inputs[3].shape) < 0.3, strongest, inputs[3])
    pairs = kernel_and_reference(CHANNEL_DECAY, on_device(inputs, torch.float32), None, monkeypatch)
    errors = relative_errors(pairs)
    assert max(errors) < 1e-2, [f"{error:.1e}" for error in errors]


@each_rule
def test_no_heads_and_float64_take_the_reference(rule: Rule) -> None:
    for h, dtype in [(0, torch.bfloat16), (1, torch.float64)]:
        inputs = [x.to(DEVICE, dtype) for x in rule.inputs(s=20, h=h)]
        out, state = rule.ours(*inputs)
        assert out.shape == inputs[2].shape and out.dtype == dtype and state.shape == inputs[-1].shape
