# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Every kernel of flash-linear-attention that we call, against float64 on the CPU.

Not yet run on a GPU. The same cases passed on a CPU in Triton's interpreter (flash-linear-attention 0.6.0, float32; the
recurrent kernels of all three recurrences with 1 and 5 tokens on 2026-11-29), which checks names, layouts, signs and
gradients but neither bfloat16 nor compiled code.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hydra_mcore.ops import fla_kernels
from tests.support.rules import RULES, Rule

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU (not yet run on one)"),
    pytest.mark.skipif(importlib.util.find_spec("fla") is None, reason="needs flash-linear-attention"),
]
DEVICE = "cuda"
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # of kernels without matrix products, which would run in TF32
each_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def check(
    kernel: Callable[..., Tensor], reference: Callable[..., Tensor], inputs: Sequence[Tensor], dtype: torch.dtype
) -> None:
    """Compare results and all gradients; the reference gets the kernel's own (rounded) inputs in float64."""
    rounded = [x.to(dtype) for x in inputs]
    results = []
    for function, device, kind in ((kernel, DEVICE, dtype), (reference, "cpu", torch.float64)):
        leaves = [x.to(device, kind).requires_grad_() for x in rounded]
        out = function(*leaves)
        grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype).to(device, kind)
        results.append([out, *torch.autograd.grad(out, leaves, grad_out)])
    for found, expected in zip(*results, strict=True):
        assert found.shape == expected.shape and found.dtype == dtype
        error = (found.double().cpu() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
        assert error < TOLERANCE[dtype], f"relative error {error:.1e}"


@each_dtype
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize(
    ("b", "s", "bounds"),
    [(1, 133, None), (2, 70, None), (2, 1, None), (1, 133, (0, 1, 3, 66, 133)), (1, 64, (0, 64))],
)
def test_short_conv(b: int, s: int, bounds: tuple[int, ...] | None, activation: str | None, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    h, c, taps = 3, 24, 4

    def kernel(x: Tensor, weight: Tensor) -> Tensor:
        return fla_kernels.short_conv(x, weight, bounds, activation)

    def reference(x: Tensor, weight: Tensor) -> Tensor:
        documents = [x[start:end].flatten(2).permute(1, 2, 0) for start, end in itertools.pairwise(bounds or (0, s))]
        out = [
            F.conv1d(F.pad(document, (taps - 1, 0)), weight[:, None], groups=h * c).permute(2, 0, 1)
            for document in documents
        ]
        joined = torch.cat(out).unflatten(2, (h, c))
        return F.silu(joined) if activation else joined

    check(kernel, reference, [torch.randn(s, b, h, c), torch.randn(h * c, taps)], dtype)


@each_dtype
@pytest.mark.parametrize(
    "size", [1.0, 1e-4]
)  # the second one is where an epsilon of 1e-6 beside the squared length would show
def test_unit_length(size: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    check(fla_kernels.unit_length, lambda x: F.normalize(x, dim=-1), [size * torch.randn(40, 2, 3, 64)], dtype)


@each_dtype
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
@pytest.mark.parametrize("s", [1, 5, 8])
@torch.no_grad()
def test_few_tokens_take_the_recurrent_kernel(
    s: int, rule: Rule, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = [x.to(dtype if i < 3 else torch.float32) for i, x in enumerate(rule.inputs(2, s, 3, 64, 64))]
    expected = rule.truth(*inputs)
    only_recurrent = fla_kernels.kernels()._replace(delta=None, channel_delta=None, linear=None)
    monkeypatch.setattr(fla_kernels, "kernels", lambda: only_recurrent)
    on_device = [x.to(DEVICE) for x in inputs]
    found = rule.ours(*on_device)
    assert found[0].dtype == dtype and found[1].dtype == torch.float32
    assert torch.equal(on_device[-1].cpu(), inputs[-1])  # a remembered state is not written to
    for x, y in zip(found, expected, strict=True):
        assert (x.double().cpu() - y).square().mean().sqrt() < TOLERANCE[dtype] * y.square().mean().sqrt()
