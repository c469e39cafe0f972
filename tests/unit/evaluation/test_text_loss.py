# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Loss on held-out text, as a whole and by position, against a loop in float64."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from hydra_mcore.config import teacher_card
from hydra_mcore.costs.batch_sizes import TOKENS_A_FORWARD
from hydra_mcore.errors import InputError
from hydra_mcore.evaluation.parallel import ParallelModel
from hydra_mcore.evaluation.perplexity import LONG_WINDOWS, TEXT_TOKENS, TextLoss, edges, text_windows, window_losses
from hydra_mcore.files import from_fields
from hydra_mcore.heads import HeadMap
from hydra_mcore.model.runtime import process_groups
from tests.support.contestants import SHAPE as CONTESTANTS_SHAPE
from tests.support.contestants import random_model

SHAPE = dataclasses.replace(CONTESTANTS_SHAPE, vocab_size=96, native_length=48)


@pytest.fixture(scope="module")
def student() -> Iterator[torch.nn.Module]:
    """A hybrid model whose logits vary with position and content."""
    head_map = HeadMap.from_fa([(0, 1), (1, 0), (1, 3)], SHAPE.num_layers, SHAPE.num_heads, SHAPE.num_kv_groups)
    with process_groups():
        yield random_model(dataclasses.replace(teacher_card(SHAPE, "f"), head_map=head_map), seed=0)


def measured(model: torch.nn.Module, windows_bs: torch.Tensor) -> tuple[TextLoss, np.ndarray, list[int]]:
    """Loss, likeliest tokens, sizes of batches."""
    batches = list(window_losses(ParallelModel([model]), windows_bs))
    found = [window for batch in batches for window in batch]
    loss = TextLoss(windows_bs.shape[1], tuple(means for means, _ in found), text_bytes=1)
    return loss, np.stack([likeliest for _, likeliest in found]), [len(batch) for batch in batches]


@torch.no_grad()
def looped(model: torch.nn.Module, windows_bs: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Losses and likeliest tokens [b, s - 1], one token after the other, from whole logits in float64."""
    losses, likeliest = np.zeros((2, windows_bs.shape[0], windows_bs.shape[1] - 1))
    for row, ids in enumerate(windows_bs):
        logits_sw = model(ids[None], torch.arange(len(ids))[None], None)[0].double().numpy()
        for place in range(len(ids) - 1):
            logits = logits_sw[place]
            losses[row, place] = math.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[ids[place + 1]]
            likeliest[row, place] = logits.argmax()
    return losses, likeliest


def test_loss_as_a_whole_and_by_position_equals_a_loop(student: torch.nn.Module) -> None:
    windows_bs = torch.from_numpy(np.random.default_rng(0).integers(SHAPE.vocab_size, size=(5, 300)))
    losses, likeliest = looped(student, windows_bs)
    assert losses.std() > 0.5, "one loss everywhere would prove little"
    found, found_likeliest, _ = measured(student, windows_bs)
    assert np.array_equal(found_likeliest, likeliest) and found_likeliest.dtype == np.int32
    assert (found.length, found.tokens) == (300, 5 * 299)
    assert found.nll == pytest.approx(losses.mean(), rel=1e-6)
    assert found.perplexity == pytest.approx(math.exp(losses.mean()), rel=1e-5)
    # a token with p before it: p = 1..299, its loss standing at p - 1
    for part, (start, end) in zip(found.by_position, [(1, 64), (64, 128), (128, 256), (256, 300)], strict=True):
        means = [np.mean([row[p - 1] for p in range(start, end)]) for row in losses]
        assert (part.start, part.end) == (start, end)
        assert part.nll == pytest.approx(np.mean(means), rel=1e-6)
        assert part.error == pytest.approx(np.std(means, ddof=1) / math.sqrt(5), rel=1e-5)
    halves = [[np.mean(row[start - 1 : end - 1]) for row in losses] for start, end in ((64, 128), (256, 300))]
    differences = np.subtract(halves[1], halves[0])
    expected = (differences.mean(), differences.std(ddof=1) / math.sqrt(5))
    assert found.rise(1, 3) == pytest.approx(expected, rel=1e-4)


def test_batches_are_bounded_and_one_window_has_no_error(student: torch.nn.Module) -> None:
    count = 2 * TOKENS_A_FORWARD // 64 + 3
    _, likeliest, sizes = measured(student, torch.ones(count, 64, dtype=torch.int64))
    assert sizes == [TOKENS_A_FORWARD // 64, TOKENS_A_FORWARD // 64, 3] and likeliest.shape == (count, 63)
    alone, _, _ = measured(student, torch.ones(1, 130, dtype=torch.int64))
    assert [part.error for part in alone.by_position] == [None] * 3 and alone.rise(0, 1)[1] is None


@pytest.mark.parametrize("length", [2, 3, 63, 64, 65, 128, 1000, 2**19])
def test_bins_double_and_cover_every_predicted_token_once(length: int) -> None:
    bins = edges(length)
    assert [place for start, end in bins[:6] for place in range(start, end)] == list(range(1, bins[:6][-1][1]))
    assert bins[0][0] == 1 and bins[-1][1] == length and all(start < end for start, end in bins)
    assert all(start == 64 * 2**power for power, (start, _) in enumerate(bins[1:]))


def test_windows_of_every_length_read_the_same_text() -> None:
    ids = np.arange(20 * TEXT_TOKENS)
    for length in (2, 512, 1024, TEXT_TOKENS // LONG_WINDOWS):
        assert torch.equal(text_windows(ids, length).flatten(), torch.arange(TEXT_TOKENS))
    assert text_windows(ids, TEXT_TOKENS).shape == (LONG_WINDOWS, TEXT_TOKENS)  # longer ones read more
    assert text_windows(ids[: 3 * TEXT_TOKENS - 1], TEXT_TOKENS).shape == (2, TEXT_TOKENS)  # as much as there is
    assert text_windows(ids[: 5 * 33 + 7], 33).shape == (5, 33)


@pytest.mark.parametrize(
    ("tokens", "length", "message"),
    [(100, 1, "at least 2 are needed"), (100, 101, r"101 tokens a window: the text has 100 tokens")],
)
def test_text_that_does_not_do_is_refused(tokens: int, length: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        text_windows(np.arange(tokens), length)


def test_bits_per_byte() -> None:
    loss = TextLoss(3, ((math.log(2),), (math.log(8),)), text_bytes=16)
    assert loss.nll == pytest.approx(math.log(4)) and loss.bits_per_byte == pytest.approx(4 * 2 / 16)
    assert from_fields(TextLoss, json.loads(json.dumps(loss.to_dict())), "loss") == loss
