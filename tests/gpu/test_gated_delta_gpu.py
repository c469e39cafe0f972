# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Flash-linear-attention's chunked delta rule against the torch reference on the same GPU.

Not yet run on a GPU. The same comparison passed once on a CPU in Triton's interpreter (flash-linear-attention
0.6.0, float32 and float16, packed and not, all gradients), which checks names, layouts and signs but no bf16.
The other kernels: ``test_fla_kernels_gpu.py``.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hydra_mcore.ops import fla_kernels
from hydra_mcore.ops.gated_delta import gated_delta_rule
from hydra_mcore.sequence import SequencePart

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU (not yet run on one)"),
    pytest.mark.skipif(importlib.util.find_spec("fla") is None, reason="needs flash-linear-attention"),
]


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 5e-3), (torch.bfloat16, 2e-2)], ids=str
)  # float32 in TF32
@pytest.mark.parametrize("bounds", [None, [0, 1, 64, 65, 200, 333]])
@pytest.mark.parametrize(("d", "v"), [(128, 128), (64, 128)])
def test_kernel_equals_reference(
    bounds: list[int] | None, d: int, v: int, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    b, s, h = (2, 333, 3) if bounds is None else (1, 333, 3)
    documents = b if bounds is None else len(bounds) - 1
    part = None if bounds is None else SequencePart(s, documents=tuple(bounds))
    randn = lambda *shape: torch.randn(shape, device="cuda", dtype=dtype)  # noqa: E731
    inputs = [F.normalize(randn(b, s, h, d), dim=-1), F.normalize(randn(b, s, h, d), dim=-1), randn(b, s, h, v)]
    inputs += [-0.2 * torch.rand(b, s, h, device="cuda"), 2 * torch.rand(b, s, h, device="cuda")]
    inputs += [torch.randn(documents, h, d, v, device="cuda")]
    grad_out, grad_state = randn(b, s, h, v), torch.randn(documents, h, d, v, device="cuda")

    def run() -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in inputs]
        results = gated_delta_rule(*leaves[:5], initial_state_bhdv=leaves[5], part=part)
        return [*results, *torch.autograd.grad(results, leaves, [grad_out, grad_state])]

    names = ("out", "state", "dq", "dk", "dv", "dlog_decay", "dwrite", "dinitial_state")
    with_kernel = run()
    monkeypatch.setattr(fla_kernels, "serve", lambda x: False)
    for name, x, y in zip(names, with_kernel, run(), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape, name
        error = (x.float() - y.float()).square().mean().sqrt() / y.float().square().mean().sqrt()
        assert error < tolerance, f"{name}: relative error {error:.1e}"


def test_no_heads_and_float64_take_the_reference() -> None:
    for h, dtype in [(0, torch.bfloat16), (1, torch.float64)]:
        x = torch.zeros(1, 5, h, 16, device="cuda", dtype=dtype)
        out, state = gated_delta_rule(x, x, x, x[..., 0], x[..., 0])
        assert out.shape == x.shape and out.dtype == dtype and state.shape == (1, h, 16, 16)
