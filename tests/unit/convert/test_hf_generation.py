# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The exported model in use: generation, training, saving, and life without hydra_mcore."""

from __future__ import annotations

import importlib
import json
import math
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, DynamicCache, PreTrainedModel

from hydra_mcore.convert.hf_code import AUTO_MAP, CODE_FILES, PACKAGE
from tests.support.hf_model import (
    EVERY_KIND,
    RECURRENT,
    TINY,
    each_variant,
    fresh,
    load,
    random_model,
    random_tokens,
    scramble,
    write_config,
)
from tests.support.naive_gated_delta import naive_gated_delta_rule

PROMPTS = [3, 11, 7, 20]
WAYS = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
    "sampled": {"do_sample": True, "temperature": 1.5, "top_k": 40},
}
each_way = pytest.mark.parametrize("way", WAYS.values(), ids=list(WAYS))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> PreTrainedModel:
    """In float64, with a first layer that has no FA head."""
    heads = [RECURRENT, EVERY_KIND, {"fa": [2, 3], "kda": [0, 1], "lightning": [4, 5]}]
    return random_model(tmp_path_factory.mktemp("hf"), heads=heads)


def generate(model: PreTrainedModel, tokens_bs: Tensor, mask_bs: Tensor | None = None, **options) -> Tensor:
    """The new tokens only, [b, 12]."""
    torch.manual_seed(9)
    mask_bs = torch.ones_like(tokens_bs) if mask_bs is None else mask_bs
    out = model.generate(
        tokens_bs, attention_mask=mask_bs, min_new_tokens=12, max_new_tokens=12, pad_token_id=0, **options
    )
    return out[:, tokens_bs.shape[1] :]


def left_padded(rows: list[Tensor], total: int) -> tuple[Tensor, Tensor]:
    tokens_bs = torch.stack([torch.nn.functional.pad(row, (total - len(row), 0)) for row in rows])
    return tokens_bs, (tokens_bs != 0).long()


# Generation


def test_layers_may_lie_on_several_devices(tmp_path, model):
    """A device map, here of memory and disk: what a layer needs to know of a call travels with it."""
    model.save_pretrained(tmp_path / "hf")
    where = dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.norm", "lm_head"), "cpu")
    spread = load(
        tmp_path / "hf",
        torch.float64,
        device_map=where | {"model.layers.1": "disk", "model.layers.2": "disk"},
        offload_folder=tmp_path,
    )
    tokens_bs, mask_bs = left_padded([random_tokens(length) for length in PROMPTS], max(PROMPTS))
    assert torch.equal(generate(spread, tokens_bs, mask_bs), generate(model, tokens_bs, mask_bs))


def test_greedy_tokens_are_the_likeliest(model):
    tokens_bs = random_tokens(2, 9)
    new_bs = generate(model, tokens_bs, **WAYS["greedy"])
    with torch.no_grad():
        for _ in range(12):
            likeliest_b1 = model(tokens_bs, use_cache=False).logits[:, -1:].argmax(dim=-1)
            tokens_bs = torch.cat([tokens_bs, likeliest_b1], dim=1)
    assert torch.equal(new_bs, tokens_bs[:, 9:]) and new_bs.unique().numel() > 5


@pytest.mark.parametrize("name", ["greedy", "beams"])
def test_a_left_padded_batch_equals_each_alone(model, name):
    rows = [random_tokens(length, seed=length) for length in PROMPTS]
    together = generate(model, *left_padded(rows, max(PROMPTS) + 2), **WAYS[name])
    alone = torch.cat([generate(model, row[None], **WAYS[name]) for row in rows])
    assert torch.equal(together, alone)


@each_way
def test_padding_and_the_cache_change_nothing(model, way):
    row = random_tokens(9)
    expected = generate(model, row[None], **way)
    assert torch.equal(generate(model, *left_padded([row], 14), **way), expected)
    assert torch.equal(generate(model, row[None], use_cache=False, **way), expected)
    assert torch.equal(generate(model, row[None], prefill_chunk_size=4, **way), expected)


def test_sampling_draws_from_the_logits(model):
    """First tokens of many draws are as frequent as the temperature makes them."""
    tokens_bs, draws = random_tokens(1, 4), 4000
    torch.manual_seed(9)
    first = model.generate(
        tokens_bs.expand(draws, -1), max_new_tokens=1, do_sample=True, temperature=1.5, top_k=0, pad_token_id=0
    )[:, 4]
    with torch.no_grad():
        expected = (model(tokens_bs).logits[0, -1] / 1.5).softmax(dim=-1)
    found = first.bincount(minlength=TINY["vocab_size"]) / draws
    assert (found - expected).abs().max() < 4 * (expected.max() / draws).sqrt()


def test_a_second_turn_goes_on_from_the_returned_cache(model):
    first, second = random_tokens(1, 9), random_tokens(1, 5, seed=2)
    torch.manual_seed(9)
    out = model.generate(first, max_new_tokens=6, do_sample=False, return_dict_in_generate=True, pad_token_id=0)
    conversation = torch.cat([out.sequences, second], dim=1)
    assert out.past_key_values.get_seq_length() == 14, "all but the last new token"
    assert torch.equal(
        generate(model, conversation, past_key_values=out.past_key_values), generate(model, conversation)
    )


@pytest.mark.parametrize("options", [{}, {"config": True}], ids=["of no layers", "of the model's layers"])
def test_an_empty_dynamic_cache_becomes_ours(model, options):
    """It is what transformers' own models take; whoever made it may go on with it."""

    def cache() -> DynamicCache:
        return DynamicCache(config=model.config) if options else DynamicCache()

    first, second = random_tokens(1, 9), random_tokens(1, 5, seed=2)
    expected = generate(model, first)
    for ours in (cache(), None):
        assert torch.equal(generate(model, first, past_key_values=ours), expected)
    assert torch.equal(generate(model, first, past_key_values=cache(), use_cache=False), expected)
    mine, whole = cache(), torch.cat([first, second], dim=1)
    with torch.no_grad():
        steps = [
            model(part, past_key_values=mine, use_cache=use_cache).logits
            for part, use_cache in ((first, True), (second, False))
        ]
        torch.testing.assert_close(torch.cat(steps, dim=1), model(whole).logits, rtol=0, atol=1e-12)
    assert mine.get_seq_length() == 14
    out = model.generate(first, max_new_tokens=6, do_sample=False, past_key_values=(turn := cache()), pad_token_id=0)
    longer = torch.cat([out, second], dim=1)
    assert torch.equal(generate(model, longer, past_key_values=turn), generate(model, longer))


def test_other_caches_and_assistants_are_refused(model):
    with pytest.raises(ValueError, match="is a StaticCache; give a HydraHeadCache"):
        generate(model, random_tokens(1, 5), cache_implementation="static")
    filled = DynamicCache()
    filled.update(torch.zeros(1, 2, 3, 16), torch.zeros(1, 2, 3, 16), 0)
    for other, kind in ((filled, "DynamicCache;"), (((), ()), "tuple"), (3, "int")):
        with torch.no_grad(), pytest.raises(ValueError, match=f"past_key_values is a {kind}"):
            model(random_tokens(1, 5), past_key_values=other)
    with pytest.raises(ValueError, match="assisted generation is not supported"):
        generate(model, random_tokens(1, 5), assistant_model=model)


# Training


def gradients(model: PreTrainedModel, tokens_bs: Tensor, mask_bs: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(tokens_bs, attention_mask=mask_bs, labels=tokens_bs.masked_fill(mask_bs == 0, -100)).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@each_variant
def test_gradient_checkpointing_changes_no_gradient(options, tmp_path):
    model = random_model(tmp_path, **options).train()
    tokens_bs, mask_bs = left_padded([random_tokens(n, seed=n) for n in (30, 21)], 30)
    expected = gradients(model, tokens_bs, mask_bs)
    assert all(gradient.abs().max() > 0 for gradient in expected.values())
    model.gradient_checkpointing_enable()
    assert model.model.layers[0].gradient_checkpointing
    for name, gradient in gradients(model, tokens_bs, mask_bs).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-10, atol=1e-13, msg=name)


def test_training_lowers_the_loss(tmp_path):
    model, tokens_bs = fresh(tmp_path).train(), random_tokens(4, 32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(15):
        output = model(tokens_bs, labels=tokens_bs)
        assert output.past_key_values is None, "no cache while training"
        losses.append(output.loss.item())
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    assert abs(losses[0] - math.log(TINY["vocab_size"])) < 0.2 and losses[-1] < 0.5 * losses[0]


def test_loss_is_that_of_the_next_token_and_logits_can_be_spared(model):
    tokens_bs = random_tokens(2, 9)
    with torch.no_grad():
        output = model(tokens_bs, labels=tokens_bs, output_hidden_states=True)
        spared, chosen = (
            model(tokens_bs, logits_to_keep=2).logits,
            model(tokens_bs, logits_to_keep=torch.tensor([0, 4])).logits,
        )
    expected = torch.nn.functional.cross_entropy(
        output.logits[:, :-1].flatten(0, 1).float(), tokens_bs[:, 1:].flatten()
    )
    torch.testing.assert_close(output.loss, expected, check_dtype=False)
    torch.testing.assert_close(spared, output.logits[:, -2:], rtol=0, atol=1e-13)
    torch.testing.assert_close(chosen, output.logits[:, [0, 4]], rtol=0, atol=1e-13)
    assert [tuple(x.shape) for x in output.hidden_states] == [(2, 9, 40)] * 4
    torch.testing.assert_close(model.lm_head(output.hidden_states[-1]), output.logits)


def test_a_fresh_model_starts_as_the_framework_starts_one(tmp_path):
    options = {"gdn_half_life": 40.0, "kda_half_life": 40.0, "gdn_gate": "headwise", "fusion": "competition"}
    model = fresh(tmp_path, **options, hidden_size=400)
    attention, x_bsm = model.model.layers[0].self_attn, torch.randn(2, 5, 400)
    for branch, shape in ((attention.gdn, (2, 5, 1)), (attention.kda, (2, 5, 1, 16))):
        log_decay, write_bsh = branch.decay_and_write(x_bsm, None)
        torch.testing.assert_close(40 * log_decay, torch.full(shape, -math.log(2.0)))
        torch.testing.assert_close(write_bsh, torch.full((2, 5, 1), 0.5))
        taps = torch.tensor([0.0, 0.0, 0.0, 1.0]).expand_as(branch.conv.weight)
        assert torch.equal(branch.conv.weight, taps)
    assert 0.015 < attention.kda.decay_down_proj.weight.std() < 0.025, "else nothing could be learned"
    assert attention.scale.eq(1).all() and attention.competition.weight.eq(0).all()
    for gate in (attention.fa.gate_proj, attention.gdn.gate_proj, attention.lightning.gate_proj):
        assert gate.bias.eq(1).all() and 5e-4 < gate.weight.std() < 2e-3
    assert 0.015 < attention.o_proj.weight.std() < 0.025 and attention.fa_norm.weight.eq(1).all()


# Folders


@each_variant
def test_a_saved_model_comes_back_with_its_code(options, tmp_path):
    model, tokens_bs = random_model(tmp_path / "exported", **options), random_tokens(2, 9)
    model.save_pretrained(tmp_path / "saved")
    assert {path.name for path in (tmp_path / "saved").glob("*.py")} == {name.rpartition("/")[2] for name in CODE_FILES}
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["auto_map"] == AUTO_MAP
    again = load(tmp_path / "saved", torch.float64)
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == options.get("tie_word_embeddings", False)
    assert all(torch.equal(x, y) for x, y in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    torch.testing.assert_close(again(tokens_bs).logits, model(tokens_bs).logits, rtol=0, atol=1e-13)


def test_the_bare_model_and_the_configuration_load_by_themselves(tmp_path):
    model, tokens_bs = random_model(tmp_path, torch.float32), random_tokens(2, 9)
    bare = AutoModel.from_pretrained(tmp_path, trust_remote_code=True)
    assert torch.equal(bare(tokens_bs).last_hidden_state, model.model(tokens_bs).last_hidden_state)
    config = AutoConfig.from_pretrained(
        write_config(tmp_path / "new", stage="extend", teacher={"model_type": "qwen3"}), trust_remote_code=True
    )
    assert (config.stage, config.teacher) == ("extend", {"model_type": "qwen3"})
    assert config.heads == TINY["heads"]


def test_weights_left_out_keep_their_start(tmp_path):
    """Loading goes over the meta device: what the file lacks must be made as in a fresh model."""
    model = fresh(tmp_path)
    scramble(model)
    lacking = (".conv.weight", ".A_log", "self_attn.scale")
    model.save_pretrained(
        tmp_path, state_dict={name: x for name, x in model.state_dict().items() if not name.endswith(lacking)}
    )
    for name, x in load(tmp_path).state_dict().items():
        if name.endswith(".conv.weight"):
            assert x[..., -1].eq(1).all() and x[..., :-1].eq(0).all()
        elif name.endswith((".A_log", "self_attn.scale")):
            assert x.eq(float("scale" in name)).all()
        else:
            assert torch.equal(x, model.state_dict()[name]), name


def test_hydra_mcore_is_not_needed(tmp_path):
    random_model(tmp_path / "hf", torch.float32)
    code = f"""
import os, sys
os.environ["HF_MODULES_CACHE"] = {str(tmp_path / "modules")!r}
sys.modules.update(hydra_mcore=None, megatron=None)  # an import of them fails
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "hf")!r}, trust_remote_code=True)
found = [model.generate(torch.arange(1, 6)[None], max_new_tokens=4, use_cache=cached) for cached in (True, False)]
assert torch.equal(*found)
print(found[0].shape[1])
assert not [name for name in sys.modules if name.startswith(("hydra_mcore.", "megatron."))]
"""
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stdout.strip()) == (0, "9"), done.stderr[-4000:]


@pytest.mark.parametrize("by_channel", [False, True])
@pytest.mark.parametrize("s", [1, 5, 130])
def test_the_travelling_delta_rule_is_the_naive_recurrence(s, by_channel, tmp_path, monkeypatch):
    """The copy in a model's folder, imported from there: chunk by chunk and token by token, gradients included."""
    package = f"travelling_{s}_{by_channel}"
    write_config(tmp_path / package)
    monkeypatch.syspath_prepend(tmp_path)
    travelling = importlib.import_module(f"{package}.chunked_delta_rule")
    generator = torch.Generator().manual_seed(s)
    q, k, v, decay, write, state = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((2, s, 3, 8), (2, s, 3, 8), (2, s, 3, 6), (2, s, 3, 8)[: 3 + by_channel], (2, s, 3), (2, 3, 8, 6))
    )
    k, decay, write = torch.nn.functional.normalize(k, dim=-1), -decay.abs(), write.sigmoid()
    found = []
    for rule in (naive_gated_delta_rule, travelling.chunked_delta_rule, travelling.recurrent_delta_rule):
        leaves = [x.clone().requires_grad_() for x in (q, k, v, decay, write, state)]
        out, last = rule(*leaves[:5], initial_state_bhdv=leaves[5])
        found.append([out, last, *torch.autograd.grad(out.square().sum() + last.square().sum(), leaves)])
    for others in found[1:]:
        for actual, expected in zip(others, found[0], strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match=r"has shape \[1, 3, 8, 6\], needs \[2, 3, 8, 6\]"):
        travelling.recurrent_delta_rule(q, k, v, decay, write, initial_state_bhdv=state[:1])


def test_the_travelling_files_are_the_frameworks_own(tmp_path):
    write_config(tmp_path)
    for name in CODE_FILES:
        assert (tmp_path / name.rpartition("/")[2]).read_bytes() == (PACKAGE / name).read_bytes()
