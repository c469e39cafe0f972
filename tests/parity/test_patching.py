# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The short ways to all effects against the long ones: full forward passes, with hooks, for every single head."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.models.gpt import GPTModel

from hydra_mcore.heads import Head
from hydra_mcore.model.runtime import process_groups
from hydra_mcore.selection.attribution import attributed_effects
from hydra_mcore.selection.observe import observed_scores
from hydra_mcore.selection.probes import ProbeBatch
from hydra_mcore.selection.receivers import receiver_effects
from hydra_mcore.selection.score import CRITICAL
from hydra_mcore.selection.scoring import Scoring
from hydra_mcore.selection.senders import SenderRuns
from hydra_mcore.selection.teacher import Teacher, answer_metric
from tests.support.naive_patching import naive_receiver_effects, naive_sender_effects
from tests.support.teachers import LENGTH, PAIRS, SHAPE, VOCABULARY, random_pairs, random_teacher, tensors

TIED = dataclasses.replace(SHAPE, tied_embeddings=True)
ONE_KV_HEAD = dataclasses.replace(SHAPE, num_kv_groups=1, qk_norm=False)
EVERY_HEAD_ITS_OWN = dataclasses.replace(SHAPE, num_kv_groups=6)
RECEIVERS = {
    "last layer": [(3, 1), (3, 4)],
    "every layer": [(0, 3), (1, 0), (1, 5), (2, 5), (3, 3)],
    "one below the top": [(2, 2)],
}


@pytest.fixture(scope="module", autouse=True)
def groups() -> Iterator[None]:
    with process_groups():
        yield


@pytest.mark.parametrize(
    "shape", [SHAPE, TIED, ONE_KV_HEAD, EVERY_HEAD_ITS_OWN], ids=["gqa", "tied", "one kv head", "mha"]
)
def test_receivers_equal_one_full_forward_a_head(shape) -> None:
    model, batch = random_teacher(shape), random_pairs()
    fast = receiver_effects(Teacher(model), batch).effects_rlhb[0]
    naive = naive_receiver_effects(model, *tensors(batch))
    assert naive.abs().min() > 1e-4  # every head of this model does something, so every entry is a real comparison
    torch.testing.assert_close(fast, naive, rtol=1e-4, atol=1e-5)
    assert ((fast - naive).abs().amax() / naive.abs().amax()) < 1e-5


@pytest.mark.parametrize("receivers", RECEIVERS.values(), ids=RECEIVERS)
def test_senders_equal_two_full_forwards_a_head(receivers) -> None:
    model, batch = random_teacher(), random_pairs()
    naive = naive_sender_effects(model, *tensors(batch), receivers)
    highest = max(layer for layer, _ in receivers)
    assert naive[:highest].abs().min() > 1e-5 and not naive[highest:].any()
    torch.testing.assert_close(sender_effects(model, batch, receivers), naive, rtol=1e-4, atol=1e-5)


def test_in_float64_they_agree_to_rounding_in_every_entry() -> None:
    """No approximation hides in float32's tolerance: not even where an effect is small."""
    model, batch = random_teacher().double(), random_pairs()
    exact = {"rtol": 1e-8, "atol": 1e-12}
    fast = receiver_effects(Teacher(model), batch).effects_rlhb[0]
    torch.testing.assert_close(fast, naive_receiver_effects(model, *tensors(batch)), **exact)
    receivers = RECEIVERS["every layer"]
    fast = sender_effects(model, batch, receivers)
    torch.testing.assert_close(fast, naive_sender_effects(model, *tensors(batch), receivers), **exact)


def test_senders_where_rows_go_in_several_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads one at a time, tokens seven at a time, give what all at once give."""
    model, batch = random_teacher().double(), random_pairs()
    at_once = sender_effects(model, batch, RECEIVERS["every layer"])
    monkeypatch.setattr("hydra_mcore.selection.senders.TOKENS_A_BATCH", 1)
    monkeypatch.setattr("hydra_mcore.selection.teacher.TOKENS_A_BATCH", 7)
    torch.testing.assert_close(sender_effects(model, batch, RECEIVERS["every layer"]), at_once, rtol=1e-10, atol=1e-13)


def sender_effects(model, batch, receivers) -> torch.Tensor:
    runs = SenderRuns(Teacher(model), batch, receivers)
    return torch.stack([runs.effects(layer_idx) for layer_idx in range(SHAPE.num_layers)])


def test_without_frozen_attention_the_effects_are_others() -> None:
    """The oracle does freeze: before the last layer, letting attention react changes the result."""
    model, batch = random_teacher(), random_pairs()
    frozen, free = (naive_receiver_effects(model, *tensors(batch), freeze=freeze) for freeze in (True, False))
    assert (frozen[:-1] - free[:-1]).abs().min() > 1e-6
    torch.testing.assert_close(frozen[-1], free[-1], rtol=1e-9, atol=1e-9)


def test_a_head_patched_with_its_clean_value_has_no_effect() -> None:
    """Only the first pair's prompt differs: the other pairs' heads are patched with what they had."""
    batch = random_pairs()
    corrupt_bs = torch.cat([batch.corrupt_bs[:1], batch.clean_bs[1:]])
    result = receiver_effects(Teacher(random_teacher()), dataclasses.replace(batch, corrupt_bs=corrupt_bs))
    gap_b = result.clean_b - result.corrupt_b
    numerator_lhb = torch.nan_to_num(result.effects_rlhb[0] * gap_b)
    assert gap_b[1:].abs().max() < 1e-5
    assert numerator_lhb[..., 0].abs().min() > 1e-5 and numerator_lhb[..., 1:].abs().max() < 1e-5


def test_traded_prompts_trade_their_metrics() -> None:
    teacher, batch = Teacher(random_teacher()), random_pairs()
    traded = dataclasses.replace(batch, clean_bs=batch.corrupt_bs, corrupt_bs=batch.clean_bs)
    one, other = receiver_effects(teacher, batch), receiver_effects(teacher, traded)
    torch.testing.assert_close(one.clean_b, other.corrupt_b, rtol=0, atol=1e-5)
    torch.testing.assert_close(one.corrupt_b, other.clean_b, rtol=0, atol=1e-5)
    assert one.effects_rlhb.shape == (1, 4, 6, PAIRS)


def test_hooks_are_gone_afterwards() -> None:
    model, batch = random_teacher(), random_pairs()
    teacher = Teacher(model)
    receiver_effects(teacher, batch)
    SenderRuns(teacher, batch, [(2, 2)]).effects(0)
    attributed_effects(teacher, batch)
    observed_scores(teacher, batch)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with torch.no_grad():
        logits_bsw = model(batch.clean_bs, torch.arange(LENGTH).expand_as(batch.clean_bs), None)
    assert logits_bsw.shape == (PAIRS, LENGTH, VOCABULARY)


def test_solved_means_right_at_every_answer_position() -> None:
    model = random_teacher()
    batch = answered(model, random_pairs())
    answer_bp = batch.answer_bp.clone()
    answer_bp[1, -1] = (answer_bp[1, -1] + 1) % VOCABULARY
    asked = dataclasses.replace(batch, answer_bp=answer_bp)
    assert receiver_effects(Teacher(model), asked).solved_b.tolist() == [True, False, True]
    assert attributed_effects(Teacher(model), asked).solved_b.tolist() == [True, False, True]


def test_attribution_is_the_slope_of_the_exact_effects() -> None:
    """Heads patched by a ten-thousandth of the way: the change of the metric, ten thousand times, is the estimate."""
    model, batch = random_teacher().double(), random_pairs()
    teacher = Teacher(model)
    estimate = attributed_effects(teacher, batch)
    step = 1e-4
    for freeze, expected in ((True, estimate.effects_rlhb[0]), (False, estimate.effects_rlhb.sum(0))):
        slope = naive_receiver_effects(model, *tensors(batch), freeze=freeze, step=step) / step
        torch.testing.assert_close(expected, slope, rtol=0.02, atol=1e-4)
    exact = receiver_effects(teacher, batch)
    torch.testing.assert_close(estimate.clean_b, exact.clean_b, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(estimate.corrupt_b, exact.corrupt_b, rtol=1e-9, atol=1e-9)


def test_metric_by_hand() -> None:
    chosen, other = torch.tensor([3.0, 5.0, 2.0]), torch.tensor([1.0, 6.0, -2.0])
    assert answer_metric(chosen, other).item() == pytest.approx((2 - 0.9 + 0.81 * 4) / (1 + 0.9 + 0.81), abs=1e-12)
    assert answer_metric(chosen, other, decay=1.0).item() == pytest.approx(5 / 3, abs=1e-12)


def test_no_head_is_a_receiver_twice(tmp_path: Path) -> None:
    """In a random model heads are receivers and senders at once; a round is made of heads that are critical for the
    first time.
    """
    model, batch = random_teacher(), random_pairs()
    (probe,) = Scoring(Teacher(model), {"own": [answered(model, batch)]}, tmp_path, {}).exact().values()
    critical = [
        {tuple(head) for head in np.argwhere(abs(mean_lh) >= CRITICAL).tolist() if head[0] > 0}
        for mean_lh in probe.mean_rlh()
    ]
    assert probe.usable and critical[0] & critical[1]
    known: set[Head] = set()
    for found, receivers in zip(critical, [*map(set, probe.receivers), set()], strict=True):
        assert receivers == found - known
        known |= receivers


def answered(model: GPTModel, batch: ProbeBatch) -> ProbeBatch:
    """The same pairs with the model's own answers, and as distractors the tokens that the corrupt prompt makes
    likelier.
    """
    clean_bs, corrupt_bs, start = batch.clean_bs.clone(), batch.corrupt_bs.clone(), batch.answer_start

    def logits_bsw(ids_bs: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return model(ids_bs, torch.arange(LENGTH).expand_as(ids_bs), None)[:, start - 1 : LENGTH - 1]

    for position in range(start, LENGTH):  # causal: what follows a position does not change its logits
        clean_bs[:, position] = corrupt_bs[:, position] = logits_bsw(clean_bs)[:, position - start].argmax(-1)
    distractor_bp = (logits_bsw(corrupt_bs) - logits_bsw(clean_bs)).argmax(-1)
    return dataclasses.replace(
        batch, clean_bs=clean_bs, corrupt_bs=corrupt_bs, answer_bp=clean_bs[:, start:], distractor_bp=distractor_bp
    )
