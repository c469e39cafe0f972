# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The exported model computes what the Megatron model computes, whatever the padding and however it is read in."""

from __future__ import annotations

import dataclasses
import inspect

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from hydra_mcore.config import HydraOptions, ModelCard, ModelShape
from hydra_mcore.heads import HeadMap, HeadsByKind
from hydra_mcore.kinds import KINDS
from hydra_mcore.model.build import build_model
from hydra_mcore.model.runtime import process_groups
from tests.support.hf_model import (
    ALL,
    EVERY_KIND,
    RECURRENT,
    TINY,
    each_variant,
    fresh,
    load,
    random_model,
    random_tokens,
    scramble,
)

LENGTHS = [1, 2, 3, 7, 12, 20, 33, 40]
OPTIONS = {field.name: field.default for field in dataclasses.fields(HydraOptions)}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> PreTrainedModel:
    """The default options, in float64."""
    return random_model(tmp_path_factory.mktemp("hf"))


def logits(model: PreTrainedModel, tokens_bs: Tensor, **options) -> Tensor:
    with torch.no_grad():
        return model(tokens_bs, **options).logits


def assert_same(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    """Largest difference over the largest expected value."""
    assert actual.shape == expected.shape
    error = ((actual - expected).abs().max() / expected.abs().max()).item()
    assert error <= tolerance, f"relative error {error:.1e}"


# Truth: the Megatron model, and transformers' Qwen3


def hf_state(student: torch.nn.Module, head_map: HeadMap, d: int) -> dict[str, Tensor]:
    """A Megatron student's weights under the exported names, written out one by one."""
    state = {
        "model.embed_tokens.weight": student.embedding.word_embeddings.weight,
        "model.norm.weight": student.decoder.final_layernorm.weight,
    }
    state["lm_head.weight"] = (
        student.shared_embedding_or_output_weight()
        if student.share_embeddings_and_output_weights
        else student.output_layer.weight
    )
    for layer_idx, (theirs, heads) in enumerate(zip(student.decoder.layers, head_map.layers, strict=True)):
        attention, to = theirs.self_attention, f"model.layers.{layer_idx}."
        gate, up = theirs.mlp.linear_fc1.weight.chunk(2)
        state |= {
            to + f"mlp.{name}_proj.weight": x
            for name, x in (("gate", gate), ("up", up), ("down", theirs.mlp.linear_fc2.weight))
        }
        state |= {to + "input_layernorm.weight": theirs.input_layernorm.weight}
        state |= {to + "post_attention_layernorm.weight": theirs.pre_mlp_layernorm.weight}
        order = torch.tensor(heads.heads).argsort()
        state[to + "self_attn.o_proj.weight"] = attention.linear_proj.weight.unflatten(1, (-1, d))[:, order].flatten(1)
        state |= {to + f"self_attn.{name}": x for name, x in attention_state(attention, order, d).items()}
    return {name: x.detach().clone() for name, x in state.items()}


def attention_state(attention: torch.nn.Module, order: Tensor, d: int) -> dict[str, Tensor]:
    renamed = {
        "linear_q": "q_proj",
        "linear_decay": "decay_proj",
        "linear_decay_down": "decay_down_proj",
        "linear_write": "write_proj",
        "gate.linear": "gate_proj",
    }
    state = {}
    for name, x in attention.named_parameters():
        branch, _, rest = name.partition(".")
        owner, _, kind = rest.rpartition(".")
        if "linear_kv" in name:
            prefix = "" if branch == "linear_kv" else branch + "."
            for part, half in zip("kv", x.unflatten(0, (-1, 2, d)).unbind(1), strict=True):
                state[f"{prefix}{part}_proj.{name.rpartition('.')[2]}"] = half.flatten(0, 1)
        elif owner == "conv":
            state[f"{branch}.conv.weight"] = x[:, None]
        elif owner == "A_log":
            state[f"{branch}.A_log"] = x
        elif branch in KINDS:
            state[f"{branch}.{renamed.get(owner, owner)}.{kind}"] = x
        elif rest.startswith("norms."):
            state[f"{rest.split('.')[1]}_norm.weight"] = x
        elif rest == "scale.weight":
            state["scale"] = x[order]
        elif rest == "competition":
            state["competition.weight"] = x
    return state


def card_of(options: dict) -> ModelCard:
    """The Megatron card of the tiny model with some changes."""
    facts = {**TINY, **options}
    rope = dict(facts["rope_parameters"])
    shape = ModelShape(
        num_layers=facts["num_hidden_layers"], hidden_size=facts["hidden_size"], num_heads=facts["num_attention_heads"],
        num_kv_groups=facts["num_key_value_heads"], head_dim=facts["head_dim"],
        ffn_hidden_size=facts["intermediate_size"],
        vocab_size=facts["vocab_size"], native_length=facts["max_position_embeddings"],
        rope_theta=rope.pop("rope_theta"),
        tied_embeddings=facts["tie_word_embeddings"], qk_norm=facts.get("qk_norm", True),
        qkv_bias=facts.get("qkv_bias", False),
        rope_scaling=None if rope["rope_type"] == "default" else rope,
    )  # fmt: skip
    layers = tuple(HeadsByKind(**heads) for heads in facts["heads"])
    head_map = HeadMap(num_heads=shape.num_heads, num_kv_groups=shape.num_kv_groups, layers=layers)
    hydra = HydraOptions(**{name: value for name, value in facts.items() if name in OPTIONS})
    return ModelCard(shape=shape, head_map=head_map, options=hydra, fingerprint="")


@each_variant
def test_equals_the_megatron_model(options, tmp_path):
    card, tokens_bs = card_of(options), random_tokens(3, 33)
    with process_groups():
        student = build_model(card).eval()
        scramble(student)
        with torch.no_grad():
            expected = student(tokens_bs, torch.arange(33)[None], None)
        state = hf_state(student, card.head_map, card.shape.head_dim)
    model = fresh(tmp_path, **options)
    model.load_state_dict(state, strict=True)
    assert_same(logits(model, tokens_bs), expected, 1e-5)


SCALED = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 3.0},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
]


@pytest.mark.parametrize("rope", SCALED, ids=lambda rope: rope["rope_type"])
def test_all_fa_model_without_additions_is_qwen3(rope, tmp_path):
    """Under every kind of rotary scaling, and with a left-padded batch."""
    rope = {**rope, "rope_theta": 5000.0}
    plain = {"fa_position": "rope", "fa_log_scale": "never", "fa_gate": "none", "fusion": "none", "heads": None}
    model = random_model(tmp_path, rope_parameters=rope, **plain)
    facts = {name: value for name, value in TINY.items() if name not in ("heads", "rope_parameters")}
    qwen = Qwen3ForCausalLM(Qwen3Config(**facts, rope_parameters=rope)).double().eval()
    qwen.load_state_dict({name.replace("self_attn.fa.", "self_attn."): x for name, x in model.state_dict().items()})
    tokens_bs, mask_bs = random_tokens(2, 33), torch.ones(2, 33, dtype=torch.long)
    mask_bs[0, :9] = 0
    actual, expected = (logits(m, tokens_bs, attention_mask=mask_bs) for m in (model, qwen))
    assert_same(actual[mask_bs.bool()], expected[mask_bs.bool()], 1e-6)  # Qwen3's RMSNorm computes in float32


def test_shared_keys_and_values_come_by_group_whatever_the_kinds_say(tmp_path):
    by_group = {f"{kind}_kv": "per_group" for kind in RECURRENT}
    model = random_model(tmp_path / "shared", qkv="shared")
    other = fresh(tmp_path / "by_group", qkv="shared", **by_group).double()
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(logits(model, random_tokens(2, 9)), logits(other, random_tokens(2, 9)))


# Padding


def padded(places: list[list[int]], total: int) -> tuple[Tensor, Tensor]:
    """Sequences of ``random_tokens``, token j of row i at column places[i][j]: ids and mask, [b, total]."""
    tokens_bs, mask_bs = (
        torch.zeros(len(places), total, dtype=torch.long),
        torch.zeros(len(places), total, dtype=torch.long),
    )
    for row, columns in enumerate(places):
        tokens_bs[row, columns], mask_bs[row, columns] = sequence(row, len(columns)), 1
    return tokens_bs, mask_bs


def sequence(row: int, length: int) -> Tensor:
    return random_tokens(length, seed=row)


def places(kind: str, total: int) -> list[list[int]]:
    starts = {"left": [total - n for n in LENGTHS], "right": [0] * len(LENGTHS)}
    if kind in starts:
        return [list(range(start, start + n)) for start, n in zip(starts[kind], LENGTHS, strict=True)]
    generator = torch.Generator().manual_seed(4)
    return [torch.randperm(total, generator=generator)[:n].sort().values.tolist() for n in LENGTHS]


@each_variant
def test_padded_sequences_equal_each_alone(options, tmp_path):
    model, total = random_model(tmp_path, **options), max(LENGTHS) + 3
    alone = [logits(model, sequence(row, n)[None])[0] for row, n in enumerate(LENGTHS)]
    for kind in ("left", "right", "mixed"):
        columns = places(kind, total)
        tokens_bs, mask_bs = padded(columns, total)
        together = logits(model, tokens_bs, attention_mask=mask_bs)
        assert together.isfinite().all()
        for row, expected in enumerate(alone):
            assert_same(together[row, columns[row]], expected)


@each_variant
def test_padded_sequences_in_chunks_equal_each_alone(options, tmp_path):
    """Chunks with padding anywhere, rows that are all padding in one of them, and one-token steps."""
    model, total = random_model(tmp_path, **options), max(LENGTHS) + 3
    columns = places("mixed", total)
    tokens_bs, mask_bs = padded(columns, total)
    together = in_chunks(model, tokens_bs, [5, 1, 1, 9, 1, 20, total - 37], mask_bs)
    for row, n in enumerate(LENGTHS):
        assert_same(together[row, columns[row]], logits(model, sequence(row, n)[None])[0])


def test_gradients_of_padded_sequences_are_those_of_each_alone(tmp_path):
    """In two calls, so that gradients go through the states between them too."""
    model, columns = random_model(tmp_path, heads=[RECURRENT, {"lightning": ALL}, EVERY_KIND]), places("mixed", 43)
    tokens_bs, mask_bs = padded(columns, 43)
    weight_bsw = torch.randn(*tokens_bs.shape, TINY["vocab_size"], dtype=torch.float64) * mask_bs[..., None]

    def gradients(logits_bsw: Tensor, weight_bsw: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad((logits_bsw * weight_bsw).sum(), list(model.parameters()))

    first = model(tokens_bs[:, :25], attention_mask=mask_bs[:, :25], use_cache=True)
    second = model(tokens_bs[:, 25:], attention_mask=mask_bs, past_key_values=first.past_key_values)
    together = gradients(torch.cat([first.logits, second.logits], dim=1), weight_bsw)
    alone = [
        gradients(model(tokens_bs[row : row + 1, places_s]).logits, weight_bsw[row : row + 1, places_s])
        for row, places_s in enumerate(columns)
    ]
    for found, *parts in zip(together, *alone, strict=True):
        assert_same(found, sum(parts), 1e-10)


def test_every_query_has_a_key(model):
    """Padding too, or a softmax over nothing would be NaN on some devices; and no real query sees padding."""
    tokens_bs, mask_bs = padded([[3, 4], [0, 2], []], 6)
    seen_b1st = model.model._describe(model.get_input_embeddings()(tokens_bs), mask_bs, None, None).mask_b1st
    assert seen_b1st.any(dim=-1).all()
    for row in range(3):
        expected = [[key for key in range(6) if key <= query and mask_bs[row, key]] for query in range(6)]
        found = [seen_b1st[row, 0, query].nonzero()[:, 0].tolist() for query in range(6)]
        assert all(ours == theirs for ours, theirs, real in zip(found, expected, mask_bs[row], strict=True) if real)


def in_chunks(model: PreTrainedModel, tokens_bs: Tensor, lengths: list[int], mask_bs: Tensor | None = None) -> Tensor:
    """Logits of several calls with one cache."""
    cache, out, start = None, [], 0
    for length in lengths:
        end = start + length
        mask = None if mask_bs is None else mask_bs[:, :end]
        with torch.no_grad():
            result = model(tokens_bs[:, start:end], attention_mask=mask, past_key_values=cache, use_cache=True)
        cache, start = result.past_key_values, end
        assert cache.get_seq_length() == end
        out.append(result.logits)
    return torch.cat(out, dim=1)


# The cache


@each_variant
@pytest.mark.parametrize("lengths", [[1] * 24, [7, 1, 1, 9, 2, 4], [23, 1], [1, 23]], ids=str)
def test_reading_in_chunks_equals_reading_at_once(options, lengths, tmp_path):
    model, tokens_bs = random_model(tmp_path, **options), random_tokens(2, 24)
    assert_same(in_chunks(model, tokens_bs, lengths), logits(model, tokens_bs))


@pytest.mark.parametrize("steps", [100, pytest.param(2000, marks=pytest.mark.slow)])
def test_many_steps_equal_one_call(model, steps):
    tokens_bs = random_tokens(2, 10 + steps)
    assert_same(in_chunks(model, tokens_bs, [10, *[1] * steps]), logits(model, tokens_bs), 1e-11)


def cache_bytes(layer, *names: str) -> int:
    tensors = [getattr(layer, name) for name in names if getattr(layer, name) is not None]
    return sum(x.untyped_storage().nbytes() for x in tensors)


def test_cache_holds_what_the_formula_says(tmp_path):
    random_model(tmp_path, heads=[RECURRENT, EVERY_KIND, {"fa": [2, 3], "gdn": [0, 1, 4, 5]}])
    model, d, b, half = load(tmp_path, torch.bfloat16), TINY["head_dim"], 2, 2
    cache, tokens_bs, tokens = None, random_tokens(b, 40), 0
    for length in (30, 7, 1, 1, 1):
        with torch.no_grad():
            cache = model(tokens_bs[:, tokens : tokens + length], past_key_values=cache, use_cache=True).past_key_values
        tokens += length
        assert cache.get_seq_length() == tokens
        for layer, living, heads in zip(cache.layers, (0, 2, 2), model.config.heads, strict=True):
            assert cache_bytes(layer, "keys", "values") == 2 * living * d * tokens * b * half
            for kind in RECURRENT:
                h, states = len(heads.get(kind, ())), layer.states.get(kind, {})
                expected = {"recurrent": b * h * d * d * 4} if h else {}
                if h and kind != "lightning":
                    expected["conv"] = b * h * 3 * d * 3 * half
                assert {name: x.nbytes for name, x in states.items()} == expected
    assert cache.layers[0].states["gdn"]["recurrent"].dtype == torch.float32


def test_cache_holds_living_groups_only(tmp_path):
    for options in ({}, {"qkv": "shared"}):
        model = random_model(tmp_path / str(len(options)), heads=None, fa_heads=[[1], [4, 5], []], **options)
        cache = model(random_tokens(2, 9), use_cache=True).past_key_values
        assert [None if layer.keys is None else layer.keys.shape[1] for layer in cache.layers] == [1, 1, None]


class _Sizes(TorchDispatchMode):
    """Elements written by each operator."""

    def __enter__(self):
        self.sizes: list[int] = []
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not func.is_view:
            self.sizes.append(result.numel())
        return result


def test_a_step_copies_no_keys_per_head_and_states_cost_the_same_at_any_length(tmp_path):
    b, long = 2, 3000
    attention = fresh(tmp_path / "fa", heads=[{"fa": [0, 3, 4, 5], "gdn": [1, 2]}] * 3)
    recurrent = fresh(tmp_path / "recurrent", heads=[RECURRENT] * 3)
    written = {}
    for name, model, length in (("fa", attention, long), ("states", recurrent, 30), ("states", recurrent, 300)):
        cache = None
        with torch.no_grad():
            cache = model(random_tokens(b, length), use_cache=True, logits_to_keep=1).past_key_values
            with _Sizes() as mode:
                model(random_tokens(b, 1), past_key_values=cache)
        written.setdefault(name, []).append(mode.sizes)
    assert max(written["fa"][0]) == 2 * (long + 1) * TINY["head_dim"] * b, (
        "the keys of two groups; four heads would be twice that"
    )
    assert written["states"][0] == written["states"][1]


def test_cache_rows_are_selected_repeated_and_reordered(model):
    tokens_bs, following_bs = random_tokens(3, 12), random_tokens(3, 1, seed=2)
    wanted = torch.tensor([2, 0, 0])
    expected = logits(model, torch.cat([tokens_bs[wanted], following_bs], dim=1))[:, -1:]
    for change in ("reorder_cache", "batch_select_indices"):
        cache = model(tokens_bs, use_cache=True).past_key_values
        getattr(cache, change)(wanted)
        assert_same(logits(model, following_bs, past_key_values=cache), expected)
    cache = model(tokens_bs[:1], use_cache=True).past_key_values
    cache.batch_repeat_interleave(3)
    expected = logits(model, torch.cat([tokens_bs[:1].expand(3, -1), following_bs], dim=1))[:, -1:]
    assert_same(logits(model, following_bs, past_key_values=cache), expected)


def test_a_reset_cache_has_forgotten(model):
    tokens_bs = random_tokens(2, 12)
    cache = model(random_tokens(2, 9, seed=5), use_cache=True).past_key_values
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(logits(model, tokens_bs, past_key_values=cache), logits(model, tokens_bs))


def test_a_cache_cannot_be_cut(model):
    cache = model(random_tokens(1, 9), use_cache=True).past_key_values
    cache.crop(0)
    cache.crop(9)
    for wanted in (-1, 8):
        with pytest.raises(NotImplementedError, match="cannot be cut"):
            cache.crop(wanted)


# Refusals


BAD_CONFIGS = [
    ({"fa_gate": "sometimes"}, r"fa_gate is 'sometimes'; choose one of 'none', 'elementwise', 'headwise'"),
    ({"gdn_conv_kernel": -1}, "gdn_conv_kernel is -1"),
    ({"gdn_write_max": 2.5}, "stable for 0 < max <= 2"),
    ({"fa_log_scale_base": 1.0}, "fa_log_scale_base must exceed 1"),
    ({"gdn_half_life": float("nan")}, "gdn_half_life must exceed 0"),
    ({"kda_gate": "sometimes"}, "kda_gate is 'sometimes'; choose one of"),
    ({"kda_conv_kernel": 1.5}, "kda_conv_kernel is 1.5; it counts taps"),
    ({"kda_write_max": float("nan")}, "kda_write_max is nan"),
    ({"kda_half_life": float("inf")}, "kda_half_life must exceed 0"),
    ({"lightning_position": None}, "lightning_position is None; choose one of"),
    ({"lightning_slope": 0.0}, "lightning_slope is 0.0; choose 0 < slope <= 1"),
    ({"lightning_slope": float("nan")}, "lightning_slope is nan"),
    ({"heads": None, "fa_heads": [[0], [1]]}, "lists 2 layers, the model has 3"),
    ({"heads": [EVERY_KIND, {"kda": [6]}, {"gdn": ALL}]}, "layer 1 lists head 6; heads are 0 to 5"),
    ({"heads": [RECURRENT, {"gdn": ALL}, {"kda": ALL, "lightning": [2]}]}, "layer 2 lists a head twice"),
    ({"heads": [RECURRENT, {"gdn": ALL}, {"kda": [1, 2]}]}, "layer 2 lists 2 heads of 6"),
    ({"heads": [{"mamba": ALL}] * 3}, "layer 0 has kind 'mamba'; the kinds are fa, gdn, kda, lightning"),
    ({"num_key_value_heads": 4}, "6 heads do not divide into 4"),
    ({"head_dim": 15}, "need an even one"),
    ({"hidden_size": 0}, "hidden_size is 0"),
    ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_type is 'dynamic'"),
]


@pytest.mark.parametrize(("change", "words"), BAD_CONFIGS, ids=lambda x: x if isinstance(x, str) else None)
def test_bad_configurations_are_refused_in_one_line(change, words, tmp_path):
    with pytest.raises(ValueError, match=words) as error:
        fresh(tmp_path, **change)
    assert "\n" not in str(error.value)


def test_options_are_those_of_the_framework(model):
    """Names, defaults and choices of ``HydraOptions``, which the travelling code cannot import."""
    ours = inspect.signature(type(model.config).__init__).parameters
    hints = {name: hint for base in HydraOptions.__mro__ for name, hint in inspect.get_annotations(base).items()}
    assert {name: ours[name].default for name in OPTIONS} == OPTIONS
    assert {name: ours[name].annotation for name in OPTIONS} == {name: hints[name] for name in OPTIONS}


def test_arguments_that_do_not_fit_are_refused(model):
    tokens_bs = random_tokens(2, 5)
    cache = model(tokens_bs, use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"shape \[2, 5\], needs \[2, 10\]"):
        model(tokens_bs, attention_mask=torch.ones(2, 5), past_key_values=cache)
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="output_attentions is not supported"):
        model(tokens_bs, output_attentions=True)
    with pytest.raises(ValueError, match="is a str; give a HydraHeadCache"):
        model(tokens_bs, past_key_values="cache")


def test_other_attention_implementations_are_refused(tmp_path):
    fresh(tmp_path).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does not support Flash Attention 2"):
        load(tmp_path, attn_implementation="flash_attention_2")
