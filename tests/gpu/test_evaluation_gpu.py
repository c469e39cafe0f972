# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Reading and decoding on a GPU against float64 logits of whole rows there. Not yet run on a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from hydra_mcore.config import HydraOptions, ModelCard, ModelShape
from hydra_mcore.evaluation.generation import from_memory
from hydra_mcore.evaluation.parallel import ParallelModel
from hydra_mcore.heads import HeadMap
from hydra_mcore.model.build import build_model
from hydra_mcore.model.runtime import process_groups

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU (not yet run on one)"),
]
SHAPE = ModelShape(
    num_layers=2, hidden_size=256, num_heads=4, num_kv_groups=2, head_dim=64, ffn_hidden_size=512, vocab_size=1024,
    native_length=512
)  # fmt: skip
STEPS = 6


@pytest.fixture(scope="module", autouse=True)
def groups() -> Iterator[None]:
    with process_groups():
        yield


@pytest.mark.parametrize("length", [64, 515])
@torch.no_grad()
def test_reading_and_decoding_equal_whole_rows(length: int) -> None:
    torch.manual_seed(0)
    card = ModelCard(
        shape=SHAPE, head_map=HeadMap.from_fa([(0, 1), (1, 0), (1, 3)], 2, 4, 2), options=HydraOptions(), fingerprint=""
    )
    whole = build_model(card).eval()
    for parameter in whole.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=0.1)
    model, ids_bs = ParallelModel([whole]), torch.randint(SHAPE.vocab_size, (2, length))

    def logits(row_bs: torch.Tensor) -> torch.Tensor:
        position_ids_bs = torch.arange(row_bs.shape[1], device="cuda").expand_as(row_bs)
        return whole(row_bs.cuda(), position_ids_bs, None).double().cpu()

    before_bsw = logits(ids_bs)[:, :-1]
    losses_bs, likeliest_bs = model.token_losses(ids_bs)
    expected_bs = F.cross_entropy(before_bsw.transpose(1, 2), ids_bs[:, 1:], reduction="none")
    torch.testing.assert_close(losses_bs.double(), expected_bs, rtol=1e-4, atol=1e-4)
    assert (likeliest_bs == before_bsw.argmax(-1)).float().mean() > 0.99  # near ties may fall either way
    torch.testing.assert_close(model.predicted(ids_bs, 9), likeliest_bs[:, 8:])
    for _, (token_b, logits_bw) in zip(range(STEPS), from_memory(model, ids_bs, STEPS), strict=False):
        torch.testing.assert_close(logits_bw.double().cpu(), logits(ids_bs)[:, -1], rtol=1e-3, atol=1e-3)
        ids_bs = torch.cat([ids_bs, token_b[:, None]], dim=1)
