# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Rotary frequencies against the formulas of their definitions, and what a model makes of them."""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from hydra_mcore.config import ConfigError, HydraOptions, ModelCard, teacher_card
from hydra_mcore.heads import HeadMap
from hydra_mcore.model.build import build_model
from hydra_mcore.model.rotary import rotary_frequencies
from hydra_mcore.model.runtime import process_groups
from tests.support.teachers import SHAPE, VOCABULARY, random_teacher

D, THETA, LENGTH = SHAPE.head_dim, SHAPE.rope_theta, SHAPE.native_length
LINEAR = {"rope_type": "linear", "factor": 3.0}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 40,
}  # fmt: skip
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 2048,
    "beta_fast": 32.0,
    "beta_slow": 2.0,
}


def scaled(rope_scaling: dict[str, Any] | None) -> Any:
    return dataclasses.replace(SHAPE, rope_scaling=rope_scaling)


def plain(pair: int) -> float:
    return THETA ** (-2 * pair / D)


def llama3(pair: int) -> float:
    """Wavelengths up to 40 / 4 tokens stay, those from 40 / 1 on grow by the factor; between, a mixture of both."""
    turns = 40 * plain(pair) / (2 * math.pi)
    kept = min(max((turns - 1) / (4 - 1), 0), 1)
    return kept * plain(pair) + (1 - kept) * plain(pair) / 8


def yarn(pair: int) -> float:
    """Pairs that turn 32 times or more in 2048 tokens stay, those that turn twice or less are divided; between, a
    straight line.
    """
    first, last = (D / 2 * math.log(2048 / (turns * 2 * math.pi)) / math.log(THETA) for turns in (32, 2))
    divided = min(max((pair - math.floor(first)) / (math.ceil(last) - math.floor(first)), 0), 1)
    return (1 - divided) * plain(pair) + divided * plain(pair) / 4


@pytest.mark.parametrize(
    ("rope_scaling", "formula", "factor"),
    [
        (None, plain, 1.0),
        (LINEAR, lambda pair: plain(pair) / 3, 1.0),
        (LLAMA3, llama3, 1.0),
        (YARN, yarn, 0.1 * math.log(4) + 1),
        (YARN | {"attention_factor": 0.9}, yarn, 0.9),
    ],
    ids=["none", "linear", "llama3", "yarn", "yarn with its own factor"],
)
def test_frequencies_are_those_of_the_definition(
    rope_scaling: dict | None, formula: Callable[[int], float], factor: float
) -> None:
    found, attention_factor = rotary_frequencies(scaled(rope_scaling))
    expected = torch.tensor([formula(pair) for pair in range(D // 2)], dtype=torch.float64)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
    assert attention_factor == pytest.approx(factor, rel=1e-12)


@pytest.mark.parametrize(("formula", "divisor"), [(llama3, 8), (yarn, 4)])
def test_the_examples_reach_every_band(formula: Callable[[int], float], divisor: float) -> None:
    ratios = [plain(pair) / formula(pair) for pair in range(D // 2)]
    assert ratios[0] == 1 and ratios[-1] == pytest.approx(divisor)
    assert any(1.1 < ratio < divisor / 1.1 for ratio in ratios)


def test_a_shape_is_not_changed_by_reading_it() -> None:
    shape = scaled({"rope_type": "linear", "factor": 3.0})
    rotary_frequencies(shape)
    assert shape.rope_scaling == {"rope_type": "linear", "factor": 3.0}


@pytest.mark.parametrize(
    ("rope_scaling", "words"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "rope_type 'dynamic'; supported are linear, llama3, yarn"),
        ({"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}, "rope_type 'longrope'; supported are"),
        ({"factor": 2.0}, "rope_type None; supported are"),
        ({"rope_type": "linear"}, "'factor'"),
        ({"rope_type": "linear", "factor": "two"}, "'str'"),
        ({"rope_type": "linear", "factor": -2.0}, "the factor must be positive"),
        ({"rope_type": "linear", "factor": 0.0}, "the factor must be positive"),
        (YARN | {"factor": float("nan")}, "the factor must be positive"),
        ({key: value for key, value in LLAMA3.items() if key != "low_freq_factor"}, "'low_freq_factor'"),
        (LLAMA3 | {"low_freq_factor": 0}, "division by zero"),
        (YARN | {"original_max_position_embeddings": None}, "'NoneType'"),
    ],
)
def test_scalings_that_are_refused(rope_scaling: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)) as refused:
        rotary_frequencies(scaled(rope_scaling))
    assert "\n" not in str(refused.value)
    with process_groups(), pytest.raises(ConfigError, match=re.escape(words)):
        build_model(teacher_card(scaled(rope_scaling), ""))


@pytest.fixture
def one_process() -> Iterator[None]:
    with process_groups():
        yield


def seen(rope_scaling: dict | None) -> list[torch.Tensor]:
    """Queries, keys and values of the first layer, then the logits, of one random teacher with this scaling."""
    model, caught = random_teacher(scaled(rope_scaling)), []
    core = model.decoder.layers[0].self_attention.fa.core_attention
    core.register_forward_pre_hook(lambda module, args: caught.extend(args[1:]))
    ids_bs = torch.arange(2 * LENGTH)[None] % VOCABULARY
    with torch.no_grad():
        logits = model(ids_bs, torch.arange(2 * LENGTH)[None], None)
    return [*caught, logits]


def test_scaled_frequencies_turn_queries_and_keys(one_process: None) -> None:
    """By their own angle, at every position up to twice the native length; values are left alone."""
    (q, k, v, logits), (scaled_q, scaled_k, scaled_v, scaled_logits) = seen(None), seen(LLAMA3)
    turn = torch.outer(
        torch.arange(2 * LENGTH).double(),
        torch.tensor([llama3(p) - plain(p) for p in range(D // 2)], dtype=torch.float64),
    )
    turn_s1hd = torch.polar(torch.ones_like(turn), turn)[:, None, None]
    for without, found in ((q, scaled_q), (k, scaled_k)):
        expected = torch.complex(*without.double().chunk(2, dim=-1)) * turn_s1hd
        torch.testing.assert_close(found.double(), torch.cat([expected.real, expected.imag], dim=-1), rtol=0, atol=1e-4)
    assert torch.equal(v, scaled_v)
    assert (logits - scaled_logits).abs().max() > 0.1


def test_rotary_reaches_beyond_the_native_length(one_process: None) -> None:
    """A model answers at any length as one whose native length is larger would."""
    ids_bs, logits = torch.arange(200)[None] % 7, []
    for native in (16, 4096):
        model = random_teacher(dataclasses.replace(SHAPE, native_length=native))
        with torch.no_grad():
            logits.append(model(ids_bs, torch.arange(200)[None], None))
    assert torch.equal(*logits)
    # Same token, same phase of the pattern: only rotary tells position 150 from 150 + 49 apart.
    assert (logits[0][0, 150] - logits[0][0, 199]).abs().max() > 1e-6


def test_attention_factor_multiplies_queries_and_keys(one_process: None) -> None:
    (q, k, v, logits), (scaled_q, scaled_k, scaled_v, scaled_logits) = (
        seen(YARN | {"attention_factor": 1.0}),
        seen(YARN),
    )
    factor = 0.1 * math.log(4) + 1
    torch.testing.assert_close(scaled_q, factor * q, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scaled_k, factor * k, rtol=1e-5, atol=1e-5)
    assert torch.equal(v, scaled_v)
    assert (logits - scaled_logits).abs().max() > 0.1


def test_attention_factor_leaves_heads_without_rotary_positions_alone(one_process: None) -> None:
    """FA heads are NoPE and the L2 norm of GDN heads takes a factor away."""
    head_map = HeadMap.from_fa([(0, 0), (1, 4), (3, 2)], SHAPE.num_layers, SHAPE.num_heads, SHAPE.num_kv_groups)
    models = []
    for rope_scaling in (YARN, YARN | {"attention_factor": 1.0}):
        card = ModelCard(shape=scaled(rope_scaling), head_map=head_map, options=HydraOptions(), fingerprint="")
        models.append(build_model(card).eval())
    models[1].load_state_dict(models[0].state_dict())
    ids_bs = torch.arange(LENGTH)[None] % VOCABULARY
    with torch.no_grad():
        one, other = (model(ids_bs, torch.arange(LENGTH)[None], None) for model in models)
    assert torch.equal(one, other)
