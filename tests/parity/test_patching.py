# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The short way to all receiver effects against the long one: a full forward pass for every head."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from hydra_mcore.config import ModelShape
from hydra_mcore.model.build import build_model, teacher_card
from hydra_mcore.model.runtime import process_groups
from hydra_mcore.selection.patching import PairEffects, answer_metric, receiver_effects
from tests.support.naive_patching import naive_receiver_effects

PAIRS, LENGTH, ANSWER = 3, 24, 4


@pytest.fixture(scope="module", autouse=True)
def groups() -> Iterator[None]:
    with process_groups():
        yield


def random_teacher(tied: bool):
    """A model that is nowhere trivial: grouped queries, head_dim that is not hidden / heads, random norms, large weights."""
    shape = ModelShape(
        num_layers=3, hidden_size=48, num_heads=6, num_kv_groups=2, head_dim=16, ffn_hidden_size=80, vocab_size=96,
        native_length=64, rope_theta=1e4, tied_embeddings=tied,
    )  # fmt: skip
    model = build_model(teacher_card(shape, "0" * 64)).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * noise if parameter.dim() == 1 else 0.15 * noise)
    return model


def random_pairs() -> tuple[torch.Tensor, torch.Tensor, int, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(6)
    clean_bs = torch.randint(96, (PAIRS, LENGTH), generator=generator)
    corrupt_bs = clean_bs.clone()
    corrupt_bs[:, 5 : 5 + ANSWER] = (clean_bs[:, 5 : 5 + ANSWER] + 7) % 96
    answer_bp = clean_bs[:, -ANSWER:]
    return clean_bs, corrupt_bs, LENGTH - ANSWER, answer_bp, (answer_bp + 11) % 96


@pytest.mark.parametrize("tied", [True, False])
def test_fast_equals_one_full_forward_a_head(tied: bool) -> None:
    model, pairs = random_teacher(tied), random_pairs()
    fast = receiver_effects(model, *pairs).effects_lhb
    naive = naive_receiver_effects(model, *pairs)
    assert naive.abs().min() > 1e-4  # every head of this model does something, so every entry is a real comparison
    torch.testing.assert_close(fast, naive, rtol=1e-4, atol=1e-5)
    assert ((fast - naive).abs().amax() / naive.abs().amax()) < 1e-5


def test_in_float64_they_agree_to_rounding_in_every_entry() -> None:
    """No approximation hides in float32's tolerance: not even where an effect is small."""
    model, pairs = random_teacher(True).double(), random_pairs()
    torch.testing.assert_close(receiver_effects(model, *pairs).effects_lhb, naive_receiver_effects(model, *pairs), rtol=1e-8, atol=1e-12)


def test_without_frozen_attention_the_effects_are_others() -> None:
    """The oracle does freeze: before the last layer, letting attention react changes the result."""
    model, pairs = random_teacher(True), random_pairs()
    frozen, free = (naive_receiver_effects(model, *pairs, freeze=freeze) for freeze in (True, False))
    assert (frozen[:-1] - free[:-1]).abs().min() > 1e-5
    torch.testing.assert_close(frozen[-1], free[-1], rtol=1e-9, atol=1e-9)


def test_a_head_patched_with_its_clean_value_has_no_effect() -> None:
    """Only the first pair's prompt differs: the other pairs' heads are patched with what they had."""
    model = random_teacher(True)
    clean_bs, corrupt_bs, *rest = random_pairs()
    corrupt_bs[1:] = clean_bs[1:]
    effects: PairEffects = receiver_effects(model, clean_bs, corrupt_bs, *rest)
    gap_b = effects.clean_b - effects.corrupt_b
    numerator_lhb = torch.nan_to_num(effects.effects_lhb * gap_b)
    assert gap_b[1:].abs().max() < 1e-9
    assert numerator_lhb[..., 0].abs().min() > 1e-5 and numerator_lhb[..., 1:].abs().max() < 1e-5


def test_traded_prompts_trade_their_metrics() -> None:
    model, (clean_bs, corrupt_bs, *rest) = random_teacher(True), random_pairs()
    one, other = receiver_effects(model, clean_bs, corrupt_bs, *rest), receiver_effects(model, corrupt_bs, clean_bs, *rest)
    torch.testing.assert_close(one.clean_b, other.corrupt_b, rtol=0, atol=1e-5)
    torch.testing.assert_close(one.corrupt_b, other.clean_b, rtol=0, atol=1e-5)
    assert one.effects_lhb.shape == (3, 6, PAIRS)


def test_hooks_are_gone_afterwards() -> None:
    model, pairs = random_teacher(True), random_pairs()
    receiver_effects(model, *pairs)
    with torch.no_grad():
        logits_bsw = model(pairs[0], torch.arange(LENGTH).expand_as(pairs[0]), None)
    assert logits_bsw.shape == (PAIRS, LENGTH, 96)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_solved_means_right_at_every_answer_position() -> None:
    model, (clean_bs, corrupt_bs, start, answer_bp, distractor_bp) = random_teacher(True), random_pairs()
    with torch.no_grad():  # causal: what follows a position does not change its logits, so the answer can be built up
        for position in range(start, LENGTH):
            clean_bs[:, position] = model(clean_bs, torch.arange(LENGTH).expand_as(clean_bs), None)[:, position - 1].argmax(-1)
    answer_bp = clean_bs[:, start:].clone()
    answer_bp[1, -1] = (answer_bp[1, -1] + 1) % 96
    corrupt_bs[:, start:] = clean_bs[:, start:]
    assert receiver_effects(model, clean_bs, corrupt_bs, start, answer_bp, distractor_bp).solved_b.tolist() == [True, False, True]


def test_metric_by_hand() -> None:
    chosen, other = torch.tensor([3.0, 5.0, 2.0]), torch.tensor([1.0, 6.0, -2.0])
    assert answer_metric(chosen, other).item() == pytest.approx((2 - 0.9 + 0.81 * 4) / (1 + 0.9 + 0.81), abs=1e-12)
    assert answer_metric(chosen, other, decay=1.0).item() == pytest.approx(5 / 3, abs=1e-12)
