# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Transformer Engine on a GPU: its layers and FP8 against torch's in bf16, its fusions, its attention.

Not yet run on a GPU. On a CPU the same layers compute what the local ones do (``tests/te``); FP8 is emulated there.
Bounds are of the loss: in bf16 two implementations that round alike differ by some 2^-8 of a value.
"""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU (not yet run on one)"),
    pytest.mark.skipif(importlib.util.find_spec("transformer_engine") is None, reason="needs Transformer Engine"),
]
Losses = dict[int, float]
STEPS, LAST = 50, 10  # of the last ones the mean is compared: single steps of two runs part
TE, LOCAL = (("--transformer-impl", name) for name in ("transformer_engine", "local"))
RECIPES = {
    "tensorwise": ("--fp8-format", "hybrid", "--fp8-recipe", "tensorwise"),
    "blockwise": ("--fp8-format", "hybrid", "--fp8-recipe", "blockwise"),
}
LENGTH, HEADS, CHANNELS = 8192, 16, 128


@pytest.fixture(scope="module")
def distilled(run_folder: Path, train: Callable[..., Losses]) -> Callable[..., Losses]:
    """``distilled(name, *flags)``: the losses of a run of 50 steps from the same student, each name once."""
    found: dict[str, Losses] = {}

    def distill(name: str, *flags: str) -> Losses:
        if name not in found:
            start = ("--start-from", str(run_folder / "student"), "--train-iters", str(STEPS))
            found[name] = train("distill", *start, *flags, run=f"te-{name}")
        return found[name]

    return distill


def at_the_end(losses: Losses) -> float:
    return statistics.mean(losses[step] for step in range(STEPS - LAST + 1, STEPS + 1))


def test_layers_train_as_local_ones(distilled: Callable[..., Losses]) -> None:
    local, te = distilled("local", *LOCAL), distilled("bf16", *TE)
    assert te[1] == pytest.approx(local[1], rel=5e-3)
    assert at_the_end(te) == pytest.approx(at_the_end(local), rel=2e-2)
    assert at_the_end(te) < 0.9 * te[1]  # it learns, or nothing would have been compared


@pytest.mark.parametrize("recipe", RECIPES)
def test_fp8_trains_as_bf16(recipe: str, distilled: Callable[..., Losses]) -> None:
    """On one step within the error of E4M3's three bits, averaged over tokens; at the end within what that costs."""
    bf16, fp8 = distilled("bf16", *TE), distilled(recipe, *TE, *RECIPES[recipe])
    assert fp8[1] != bf16[1], "the flags have no effect"
    assert fp8[1] == pytest.approx(bf16[1], rel=2e-2)
    assert at_the_end(fp8) == pytest.approx(at_the_end(bf16), rel=5e-2)


@pytest.mark.parametrize("fusion", ["gradient-accumulation-fusion", "rope-fusion"])
def test_fusions_change_nothing(fusion: str, distilled: Callable[..., Losses], tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(f"no-{fusion}: false\n")
    plain = distilled("bf16", *TE)
    fused = distilled(fusion, *TE, "--config", str(tmp_path / "recipe.yaml"))
    assert fused[1] == pytest.approx(plain[1], rel=5e-3)
    assert at_the_end(fused) == pytest.approx(at_the_end(plain), rel=2e-2)


def test_attention_beside_torch_s(capsys: pytest.CaptureFixture[str]) -> None:
    """One is as good as the other; which is faster is printed, for the choice of FA heads' kernel."""
    from transformer_engine.pytorch import DotProductAttention

    torch.manual_seed(0)
    q, k, v = (torch.randn(LENGTH, 1, HEADS, CHANNELS, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    attend = DotProductAttention(HEADS, CHANNELS, attn_mask_type="causal", qkv_format="sbhd").cuda()

    def with_torch() -> torch.Tensor:
        out = F.scaled_dot_product_attention(*(x.permute(1, 2, 0, 3) for x in leaves), is_causal=True)
        return out.permute(2, 0, 1, 3).flatten(2)

    def with_te() -> torch.Tensor:
        return attend(*leaves)

    results, milliseconds = {}, {}
    for name, forward in (("torch", with_torch), ("Transformer Engine", with_te)):
        out = forward()
        results[name] = [out, *torch.autograd.grad(out.float().square().sum(), leaves)]
        milliseconds[name] = timed(lambda forward=forward: forward().float().sum().backward())
    for found, expected in zip(results["Transformer Engine"], results["torch"], strict=True):
        error = (found.float() - expected.float()).norm() / expected.float().norm()
        assert error < 2e-2
    with capsys.disabled():
        said = ", ".join(f"{name} {taken:.2f} ms" for name, taken in milliseconds.items())
        print(f"\nattention, {LENGTH} tokens, {HEADS} heads x {CHANNELS}, forward and backward: {said}")


def timed(call: Callable[[], object], repeats: int = 5) -> float:
    """Milliseconds of the fastest call."""
    best = float("inf")
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        best = min(best, start.elapsed_time(end))
    return best
