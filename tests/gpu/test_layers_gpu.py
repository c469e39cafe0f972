# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Whole layers with flash-linear-attention's kernels against the same layers without: results, gradients, decoding.

Not yet run on a GPU. The same cases passed on a CPU in Triton's interpreter (flash-linear-attention 0.6.0, float32),
and so did two context-parallel ranks with the package's own context parallelism: results to 3e-7, gradients to 2e-5.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from hydra_mcore.config import HydraOptions, ModelCard, ModelShape
from hydra_mcore.heads import HeadMap
from hydra_mcore.model.build import build_model
from hydra_mcore.model.cache import DecodingCache
from hydra_mcore.model.forward import last_hidden
from hydra_mcore.model.runtime import process_groups
from hydra_mcore.ops import fla_kernels
from hydra_mcore.sequence import SequencePart
from tests.support.stages import randomise

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU (not yet run on one)"),
    pytest.mark.skipif(importlib.util.find_spec("fla") is None, reason="needs flash-linear-attention"),
]
SHAPE = ModelShape(
    num_layers=2, hidden_size=128, num_heads=4, num_kv_groups=2, head_dim=64, ffn_hidden_size=128, vocab_size=64,
    native_length=512
)  # fmt: skip
HEAD_MAP = HeadMap.from_fa([(0, 0), (1, 1), (1, 2)], SHAPE.num_layers, SHAPE.num_heads, SHAPE.num_kv_groups)
LENGTH, STEPS = 150, 3
TOLERANCE = {torch.float32: 5e-3, torch.bfloat16: 5e-2}  # float32 products run in TF32
DOCUMENTS = (0, 1, 3, 66, LENGTH)


@pytest.fixture(scope="module", autouse=True)
def groups() -> Iterator[None]:
    with process_groups():
        yield


def student(activation: str, dtype: torch.dtype) -> torch.nn.Module:
    options = HydraOptions(gdn_conv_activation=activation)
    model = build_model(ModelCard(shape=SHAPE, head_map=HEAD_MAP, options=options, fingerprint=""), "extend", dtype)
    randomise(model)
    return model


def check(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, truth in expected.items():
        error = (found[name].double() - truth.double()).square().mean().sqrt() / truth.double().square().mean().sqrt()
        assert error < tolerance, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("activation", ["none", "silu"])
@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["whole rows", "packed documents"])
def test_results_and_gradients(
    documents: tuple[int, ...] | None, activation: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = student(activation, dtype)
    ids_bs = torch.randint(SHAPE.vocab_size, (2 if documents is None else 1, LENGTH))

    def run() -> dict[str, Tensor]:
        model.zero_grad()
        hidden_sbm, _ = last_hidden([model], ids_bs, documents)
        weights = torch.randn(hidden_sbm.shape, generator=torch.Generator().manual_seed(1))
        (hidden_sbm * weights.to(hidden_sbm)).sum().backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
        return {"hidden": hidden_sbm.detach(), **gradients}

    found = run()
    monkeypatch.setattr(fla_kernels, "serve", lambda x: False)
    check(found, run(), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@torch.no_grad()
def test_decoding(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids_bs = student("silu", dtype).eval(), torch.randint(SHAPE.vocab_size, (2, LENGTH + STEPS))

    def run() -> dict[str, Tensor]:
        cache = DecodingCache(SequencePart(LENGTH), LENGTH + STEPS)
        results = {"prompt": last_hidden([model], ids_bs[:, :LENGTH], cache=cache)[0]}
        for step in range(LENGTH, LENGTH + STEPS):
            cache.follow(1)
            results[f"token {step}"] = last_hidden([model], ids_bs[:, step : step + 1], cache=cache)[0]
        return results

    found = run()
    monkeypatch.setattr(fla_kernels, "serve", lambda x: False)
    check(found, run(), TOLERANCE[dtype])
