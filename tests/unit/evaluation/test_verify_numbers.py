# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The numbers and verdicts of a verification, against plain arithmetic; what it reads, and on which layouts."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
from torch import Tensor

from hydra_mcore.config import ModelCard, ModelShape, teacher_card
from hydra_mcore.errors import InputError
from hydra_mcore.evaluation.comparison import KL_BAR, ROWS, TIE, Result, agreement
from hydra_mcore.evaluation.layout_logits import Layout, Rows
from hydra_mcore.evaluation.subject import MIN_LENGTH
from hydra_mcore.model.runtime import process_groups


def softmax(logits: list[float]) -> list[float]:
    weights = [math.exp(x - max(logits)) for x in logits]
    return [x / math.fsum(weights) for x in weights]


def naive_kl(reference_tw: Tensor, found_tw: Tensor) -> float:
    """Mean over tokens of sum p log(p / q)."""
    pairs = [(softmax(p), softmax(q)) for p, q in zip(reference_tw.tolist(), found_tw.tolist(), strict=True)]
    return math.fsum(x * math.log(x / y) for p, q in pairs for x, y in zip(p, q, strict=True)) / len(pairs)


def test_all_pairs_count_together_token_by_token() -> None:
    generator = torch.Generator().manual_seed(0)
    reference = [4 * torch.randn(shape, generator=generator) for shape in ((2, ROWS, 7), (5, 7))]
    found = [x + 0.5 * torch.randn(x.shape, generator=generator) for x in reference]
    result = agreement(zip(reference, found, strict=True))
    reference_tw, found_tw = (torch.cat([x.flatten(0, -2) for x in logits]).double() for logits in (reference, found))
    assert result.tokens == len(reference_tw) == 2 * ROWS + 5
    assert result.kl == pytest.approx(naive_kl(reference_tw, found_tw), rel=1e-10)
    assert result.agreeing == int((reference_tw.argmax(-1) == found_tw.argmax(-1)).sum()) < result.tokens
    assert result.max_difference == (reference_tw - found_tw).abs().max().item()
    assert result.relative == result.max_difference / reference_tw.abs().max().item()
    assert not result.passed


def verdict(reference: list[float], found: list[float]) -> tuple[bool, int, int]:
    result = agreement([(torch.tensor([reference]), torch.tensor([found]))])
    return result.passed, result.agreeing, result.ties


def test_float32_rounding_passes_and_more_does_not() -> None:
    logits_tw = torch.randn(40, 50, generator=torch.Generator().manual_seed(1))
    assert agreement([(logits_tw, logits_tw * (1 + 1e-6))]).passed
    shifted_tw = logits_tw.clone()
    shifted_tw[:, 0] += 1.1e-2  # of 50 logits one, by a hundredth
    result = agreement([(logits_tw, shifted_tw)])
    assert result.agreeing == 40 and KL_BAR < result.kl < 2e-6 and not result.passed
    assert agreement([(logits_tw, logits_tw + 3.0)]).kl < 1e-13, "a constant changes no probability"


def test_a_tie_is_no_disagreement_but_another_token_is() -> None:
    """Another choice than the reference's counts as the same only if the reference gives both nearly the same logit."""
    near, far = 10 - 0.9 * TIE * 10, 10 - 1.2 * TIE * 10
    assert verdict([10.0, near, 9.0], [near, 10.0, 9.0]) == (True, 1, 1)
    assert verdict([10.0, far, 9.0], [far, 10.0, 9.0]) == (False, 0, 0), "though KL is below its bar"
    assert verdict([10.0, near, 9.0], [9.0, near, 10.0])[1:] == (0, 1)
    assert verdict([-10.0, -10 - 0.9 * TIE * 10, -30.0], [-10 - 0.9 * TIE * 10, -10.0, -30.0]) == (True, 1, 1)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_never_passes(bad: float) -> None:
    for at in range(3):
        found = [3.0, 2.0, 1.0]
        found[at] = bad
        result = agreement([(torch.tensor([[3.0, 2.0, 1.0]]), torch.tensor([found]))])
        assert not result.passed and not math.isfinite(result.max_difference)
    line = Result("export", "", "checkpoint = export", "FAIL", str(result), result)
    assert json.loads(json.dumps(line.to_dict(), allow_nan=False))["numbers"]["max_difference"] is None


def test_other_shapes_are_named() -> None:
    with pytest.raises(InputError, match=r"logits of shape \[2, 5\] instead of \[2, 4\]"):
        agreement([(torch.zeros(2, 4), torch.zeros(2, 5))])


def test_documents_all_differ_in_length() -> None:
    for length in (*range(MIN_LENGTH, 600), 4096):
        bounds = Rows.of(torch.zeros(1, length, dtype=torch.long)).documents
        lengths = [end - start for start, end in itertools.pairwise(bounds)]
        assert bounds[0] == 0 and bounds[-1] == length and min(lengths) == 1 and len(set(lengths)) == len(lengths) == 5


def card() -> ModelCard:
    shape = ModelShape(
        num_layers=3,
        hidden_size=40,
        num_heads=6,
        num_kv_groups=2,
        head_dim=16,
        ffn_hidden_size=56,
        vocab_size=61,
        native_length=64,
    )
    return teacher_card(shape, "")


@pytest.mark.parametrize(
    ("layout", "name", "said"),
    [
        (Layout(tp=2), "TP 2", "tensor parallel size 2 does not divide the vocabulary of 61"),
        (Layout(tp=4), "TP 4", r"must be a multiple of tensor_model_parallel_size \(4\)"),
        (Layout(tp=2, pp=2), "TP 2 x PP 2", "pipeline parallel size 2 does not divide 3 layers"),
        (Layout(cp=2), "CP 2", "context parallel size 2 does not divide a sequence of 33 tokens"),
    ],
)
def test_layouts_that_do_not_fit_say_why(layout: Layout, name: str, said: str) -> None:
    assert str(layout) == name
    with pytest.raises(InputError, match=said):
        layout.check(card(), 33)


def test_layouts_that_fit_are_let_through() -> None:
    Layout(pp=3).check(card(), 33)
    Layout(cp=3).check(card(), 33)


def test_context_parallel_ranks_must_be_there() -> None:
    message = (
        "1 processes are no multiple of 1 tensor-parallel x 1 pipeline-parallel x 2 context-parallel ranks; start 2"
        " with"
    )
    with pytest.raises(InputError, match=message), process_groups(cp_size=2):
        raise AssertionError("not reached")
