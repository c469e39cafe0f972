# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Decoding from cache on one process: what whole forward passes and transformers' own generation give."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from hydra_mcore.config import HydraOptions, ModelCard, ModelShape, teacher_card
from hydra_mcore.convert.hf_export import export_hf
from hydra_mcore.evaluation.generation import from_memory, greedy
from hydra_mcore.evaluation.parallel import ParallelModel
from hydra_mcore.heads import HeadMap
from hydra_mcore.model.build import build_model, load_model
from hydra_mcore.model.cache import DecodingCache, LayerCache
from hydra_mcore.model.checkpoints import save_weights
from hydra_mcore.model.forward import last_hidden
from hydra_mcore.model.runtime import process_groups
from hydra_mcore.sequence import SequencePart
from tests.support.naive_decoding import naive_decoding
from tests.support.paths import TINY_TEACHER

SHAPE = ModelShape(
    num_layers=4,
    hidden_size=32,
    num_heads=6,
    num_kv_groups=2,
    head_dim=8,
    ffn_hidden_size=48,
    vocab_size=509,
    native_length=16,  # prompts are longer
    rope_theta=1e4,
    norm_epsilon=1e-2,  # or a GDN head's nearly zero output would be magnified, rounding included
)
# No FA head, some of both kv groups, one, all.
HEAD_MAP = HeadMap.from_fa([(1, 0), (1, 4), (1, 5), (2, 3), *((3, h) for h in range(6))], 4, 6, 2)
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "no scale, rotary": {"fa_log_scale": "never", "fa_position": "rope", "gdn_position": "nope", "gdn_qk_norm": "none"},
    "scale of a small base": {"fa_log_scale": "always", "fa_log_scale_base": 2.0},
    "no convolution": {
        "gdn_conv_kernel": 0,
        "fa_gate": "headwise",
        "gdn_gate": "elementwise",
        "gate_order": "after_norm",
    },
    "one tap": {"gdn_conv_kernel": 1, "gdn_conv_activation": "silu", "fusion": "competition"},
    "taps beyond the prompt": {
        "gdn_conv_kernel": 9,
        "gdn_conv_activation": "silu",
        "fa_gate": "none",
        "gdn_gate": "headwise",
    },
    "kv by group": {"gdn_kv": "per_group", "fusion": "norm", "fusion_norm_weight": "none", "gate_activation": "silu"},
    "kv of both branches": {"gdn_kv": "per_group", "qkv": "shared", "fusion": "none", "gdn_write_max": 2.0},
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


@pytest.fixture(scope="module", autouse=True)
def one_process(tiny_teacher: Path):
    """Process groups, after those in which the tiny teacher was imported."""
    with process_groups():
        yield


def random_model(card: ModelCard, dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    """Weights large enough that what is decoded varies."""
    model, generator = build_model(card, dtype=dtype).eval(), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.4 * noise if parameter.dim() > 1 else 1 + 0.3 * noise)
    return model


def student_card(shape: ModelShape = SHAPE, **options: Any) -> ModelCard:
    return dataclasses.replace(
        teacher_card(shape, "f"), head_map=HEAD_MAP, options=HydraOptions(**options), stage="student"
    )


def prompts(batch: int, length: int, vocabulary: int = SHAPE.vocab_size) -> Tensor:
    return torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(length))


@torch.no_grad()
def check(model: torch.nn.Module, ids_bs: Tensor, room: int, tolerance: float = 2e-6) -> None:
    """Every token, and the logits behind it, as whole forward passes give them; GDN heads round some steps to
    float32.
    """
    tokens_bs, logits_bsw = naive_decoding(model, ids_bs, room)
    steps = itertools.islice(from_memory(ParallelModel([model]), ids_bs, room), room)
    for step, (token_b, logits_bw) in enumerate(steps):
        torch.testing.assert_close(logits_bw, logits_bsw[:, step], rtol=0, atol=tolerance)
        assert torch.equal(token_b, tokens_bs[:, step])
    assert torch.equal(greedy(ParallelModel([model]), ids_bs, room, frozenset()), tokens_bs)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
def test_memory_gives_what_whole_forward_passes_give(options: dict[str, Any]) -> None:
    check(random_model(student_card(**options)), prompts(3, 37), 8)


@pytest.mark.parametrize("length", [1, 2, 64, 129])
def test_prompts_of_any_length(length: int) -> None:
    check(random_model(student_card()), prompts(2, length), 8)


@pytest.mark.parametrize(
    "changes", [{}, {"rope_scaling": YARN}, {"qkv_bias": True, "qk_norm": False}], ids=["plain", "yarn", "qwen2"]
)
def test_teachers(changes: dict[str, Any]) -> None:
    check(random_model(teacher_card(dataclasses.replace(SHAPE, **changes), "f")), prompts(2, 45), 8, tolerance=1e-9)


def test_a_student_with_biases() -> None:
    check(
        random_model(student_card(dataclasses.replace(SHAPE, qkv_bias=True), gdn_kv="per_group", qkv="shared")),
        prompts(2, 45),
        8,
    )


def test_several_tokens_at_once_are_causal_among_themselves() -> None:
    model, ids_bs = random_model(student_card()), prompts(2, 60)
    with torch.no_grad():
        whole_sbm, _ = last_hidden([model], ids_bs)
        cache, start = DecodingCache(SequencePart(41), 60), 41
        pieces = [last_hidden([model], ids_bs[:, :start], cache=cache)[0]]
        for tokens in (1, 7, 11):
            cache.follow(tokens)
            pieces.append(last_hidden([model], ids_bs[:, start : start + tokens], cache=cache)[0])
            start += tokens
    torch.testing.assert_close(torch.cat(pieces), whole_sbm, rtol=0, atol=2e-6)


def test_memory_is_what_must_be_remembered_and_no_more() -> None:
    """Keys and values of living groups in the model's dtype with room for what comes, a float32 state, nothing on
    modules.
    """
    model, cache = random_model(student_card(), torch.bfloat16), DecodingCache(SequencePart(50), 60)
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    with torch.no_grad():
        last_hidden([model], prompts(2, 50), cache=cache)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    tensors = {
        (layer_idx, name): (x.dtype, x.untyped_storage().nbytes())
        for layer_idx, layer in cache.layers.items()
        for name, x in held_tensors(layer).items()
    }
    expected, b, d = {}, 2, 8
    for layer_idx, (groups, gdn) in enumerate([(0, 6), (2, 3), (1, 5), (2, 0)]):
        if groups:
            expected |= {
                (layer_idx, name): (torch.bfloat16, b * groups * 60 * d * 2) for name in ("keys_bgtd", "values_bgtd")
            }
        if gdn:
            expected[layer_idx, "gdn state"] = (torch.float32, b * gdn * d * d * 4)
            expected[layer_idx, "gdn taps"] = (torch.bfloat16, 3 * b * gdn * 3 * d * 2)
    assert tensors == expected


def held_tensors(layer: LayerCache) -> dict[str, Tensor]:
    """Every tensor that a layer's cache holds: those of its keys and values, and the states of each kind by name."""
    held = dict(vars(layer.keys_values))
    for kind, states in layer.states.items():
        held |= {f"{kind} {name}": x for name, x in states.items()}
    assert set(vars(layer)) == {"keys_values", "states"}
    return {name: x for name, x in held.items() if isinstance(x, Tensor)}


def test_a_stop_token_is_repeated_and_ends_the_loop_when_all_rows_have_met_one() -> None:
    model, ids_bs = random_model(student_card()), prompts(3, 37)
    free_bs, _ = naive_decoding(model, ids_bs, 8)
    for at in ([2, 2, 2], [1, 5, 3]):
        stop = frozenset(free_bs[row, step].item() for row, step in enumerate(at))
        expected_bs = free_bs.clone()
        for row in range(3):
            first = next(step for step in range(8) if free_bs[row, step].item() in stop)
            expected_bs[row, first:] = free_bs[row, first]
        longest = max(int((expected_bs[row] == expected_bs[row, -1]).int().argmax()) for row in range(3))
        calls = []
        with model.decoder.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1)):
            assert torch.equal(greedy(ParallelModel([model]), ids_bs, 8, stop), expected_bs)
        assert len(calls) == longest + 1, "the prompt and every token but the last are read, and nothing after that"
    assert greedy(ParallelModel([model]), ids_bs, 0, frozenset()).shape == (3, 0)


def test_the_tiny_teacher_writes_what_transformers_writes(tiny_teacher: Path) -> None:
    _, model = load_model(tiny_teacher)
    theirs = AutoModelForCausalLM.from_pretrained(TINY_TEACHER).eval()
    text = "The lighthouse keeper wrote down every number that the sailors told him, and the next morning"
    ids_bs = torch.tensor([PreTrainedTokenizerFast.from_pretrained(TINY_TEACHER).encode(text)])
    expected_bs = generate(theirs, ids_bs, 24)
    assert len(expected_bs.unique()) > 6
    assert torch.equal(greedy(ParallelModel([model]), ids_bs, 24, frozenset()), expected_bs)


@pytest.mark.parametrize(
    "options", [{}, {"gdn_kv": "per_group", "qkv": "shared", "gdn_gate": "elementwise"}], ids=["default", "shared"]
)
def test_a_student_writes_what_its_export_writes(tmp_path: Path, options: dict[str, Any]) -> None:
    card, ids_bs = student_card(**options), prompts(2, 33)
    model = random_model(card)
    save_weights([model], card, tmp_path / "student")
    export_hf(tmp_path / "student", tmp_path / "hf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True).eval()
    assert torch.equal(greedy(ParallelModel([model]), ids_bs, 12, frozenset()), generate(theirs, ids_bs, 12))


def generate(model: torch.nn.Module, ids_bs: Tensor, room: int) -> Tensor:
    options = {"do_sample": False, "max_new_tokens": room, "pad_token_id": 0, "eos_token_id": None}
    return model.generate(ids_bs, attention_mask=torch.ones_like(ids_bs), **options)[:, ids_bs.shape[1] :]
