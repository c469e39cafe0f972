# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The exported model on a GPU, with whatever kernels are there, against itself on the CPU. Not yet run on a GPU.

Both kernels gave what the torch functions give in Triton's interpreter on a CPU (flash-linear-attention 0.6.0, float32
and float16).
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.support.hf_model import load, random_model, random_tokens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU (not yet run on one)"),
]
# The kernels want heads of at least 16 channels; float32 products of theirs run in TF32.
SHAPE = {"head_dim": 64}
TOLERANCE = {torch.float32: 1e-2, torch.bfloat16: 1e-1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hf")
    random_model(folder, **SHAPE)
    return folder


def in_two_chunks_and_steps(model: PreTrainedModel, tokens_bs: Tensor, mask_bs: Tensor) -> Tensor:
    """Logits of a prefill in two chunks and ten single tokens."""
    memory, logits, end = None, [], 0
    for ids_bs in tokens_bs.split([60, 130, *[1] * 10], dim=1):
        end += ids_bs.shape[1]
        out = model(ids_bs, attention_mask=mask_bs[:, :end], past_key_values=memory, use_cache=True)
        memory = out.past_key_values
        logits.append(out.logits)
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@torch.no_grad()
def test_prefill_and_decode_equal_float64_on_the_cpu(folder: Path, dtype: torch.dtype) -> None:
    tokens_bs, mask_bs = random_tokens(3, 200), torch.ones(3, 200, dtype=torch.long)
    mask_bs[0, :70], mask_bs[1, :5] = 0, 0
    expected = load(folder, torch.float64)(tokens_bs, attention_mask=mask_bs).logits
    model = load(folder, dtype).cuda()
    inputs = (tokens_bs.cuda(), mask_bs.cuda())
    for found in (model(inputs[0], attention_mask=inputs[1]).logits, in_two_chunks_and_steps(model, *inputs)):
        difference = (found.double().cpu() - expected)[mask_bs.bool()].square().mean().sqrt()
        assert difference / expected.std() < TOLERANCE[dtype]


def test_gradients_equal_float64_on_the_cpu(folder: Path) -> None:
    tokens_bs = random_tokens(2, 100)
    reference, model = load(folder, torch.float64), load(folder).cuda()
    reference(tokens_bs, labels=tokens_bs).loss.backward()
    model(tokens_bs.cuda(), labels=tokens_bs.cuda()).loss.backward()
    for (name, expected), found in zip(reference.named_parameters(), model.parameters(), strict=True):
        difference = (found.grad.double().cpu() - expected.grad).square().mean().sqrt()
        assert difference <= 2e-2 * expected.grad.square().mean().sqrt() + 1e-9, name
