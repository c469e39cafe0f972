# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Long prompts on a CPU: only the positions asked for enter the output layer, and a few at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from hydra_mcore.config import HydraOptions, ModelCard, ModelShape, teacher_card
from hydra_mcore.evaluation.parallel import ParallelModel
from hydra_mcore.heads import HeadMap
from hydra_mcore.model.build import build_model
from hydra_mcore.model.runtime import process_groups
from tools.tracked_memory import tracked_peak

LONG = 32_768
# The tiny example's teacher, but for its larger vocabulary: logits of a long prompt would take 2 GiB.
SHAPE = ModelShape(
    num_layers=4,
    hidden_size=128,
    num_heads=8,
    num_kv_groups=4,
    head_dim=16,
    ffn_hidden_size=384,
    vocab_size=16_384,
    native_length=512,
    rope_theta=1e4,
)
TEACHER = teacher_card(SHAPE, "f")
STUDENT = dataclasses.replace(
    TEACHER,
    head_map=HeadMap.from_fa([(0, 1), (1, 4), (3, 2), (3, 7)], 4, 8, 4),
    options=HydraOptions(),
    stage="student",
)


@pytest.fixture(scope="module", autouse=True)
def one_process() -> Iterator[None]:
    with process_groups():
        yield


def random_ids(length: int) -> torch.Tensor:
    return torch.randint(SHAPE.vocab_size, (1, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("card", [STUDENT, pytest.param(TEACHER, marks=pytest.mark.slow)], ids=lambda card: card.stage)
def test_the_end_of_a_long_prompt(card: ModelCard) -> None:
    model, hidden = build_model(card).eval(), []
    model.decoder.register_forward_hook(lambda module, inputs, output: hidden.append(output[-9:].clone()))
    with tracked_peak() as memory:
        predicted_bp = ParallelModel([model]).predicted(random_ids(LONG), LONG - 8)
    logits_pw = hidden[0][:-1, 0].double() @ model.shared_embedding_or_output_weight().double().T
    assert torch.equal(predicted_bp[0], logits_pw.argmax(-1)) and len(set(predicted_bp[0].tolist())) > 1
    assert memory.peak_bytes < 4 * LONG * SHAPE.vocab_size / 3
    assert memory.largest_elements < LONG * SHAPE.vocab_size / 15


def test_losses_of_all_positions_never_meet_in_memory() -> None:
    length, model = 4096, build_model(STUDENT).eval()
    with tracked_peak() as memory:
        loss_bp, _ = ParallelModel([model]).token_losses(random_ids(length))
    assert (
        memory.largest_elements <= length * SHAPE.vocab_size / 4 and memory.peak_bytes < 4 * length * SHAPE.vocab_size
    )
    with torch.no_grad():
        logits_bsw = model(random_ids(length), torch.arange(length)[None], None)
    expected_bp = F.cross_entropy(logits_bsw[0, :-1], random_ids(length)[0, 1:], reduction="none")[None]
    torch.testing.assert_close(loss_bp, expected_bp, rtol=0, atol=1e-5)
