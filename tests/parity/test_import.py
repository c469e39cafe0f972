# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Imported checkpoints compute what transformers computes; directories that cannot be used are refused in one line."""

import errno
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hydra_mcore.config import ModelCard
from hydra_mcore.convert import hf_import
from hydra_mcore.convert.families import EMBEDDING, FAMILIES
from hydra_mcore.convert.hf_config import HuggingFaceError, read_config
from hydra_mcore.convert.hf_export import export_hf
from hydra_mcore.convert.hf_import import import_hf
from hydra_mcore.convert.tensor_table import tensor_rules
from hydra_mcore.errors import InputError
from hydra_mcore.model.build import load_model
from hydra_mcore.model.checkpoints import TRACKER
from hydra_mcore.model.runtime import process_groups
from hydra_mcore.model.streaming import StoredTensors
from tests.support.paths import ROOT, TINY_TEACHER
from tests.support.tiny_hf import random_tokens, tiny_model, tiny_qwen3

COMMAND = ROOT / "tools" / "convert.py"


@pytest.fixture(scope="module", autouse=True)
def one_process():
    with process_groups():
        yield


def logits_of(checkpoint_dir: Path, tokens_bs: torch.Tensor) -> torch.Tensor:
    _, model = load_model(checkpoint_dir)
    with torch.no_grad():
        return model(tokens_bs, torch.arange(tokens_bs.shape[1])[None], None)


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


@pytest.mark.parametrize(
    ("family", "changes", "shard_size"),
    [
        ("qwen3", {"tie_word_embeddings": True}, "1GB"),
        ("qwen3", {"tie_word_embeddings": False}, "20KB"),
        ("qwen3", {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8, "rms_norm_eps": 1e-3}, "1GB"),
        ("qwen3", {"num_key_value_heads": 1, "num_hidden_layers": 1, "tie_word_embeddings": True}, "20KB"),
        ("qwen3", {"rope_parameters": {"rope_theta": 5000.0, **YARN}}, "1GB"),
        ("qwen2", {"head_dim": None, "hidden_size": 48, "tie_word_embeddings": True}, "1GB"),
        (
            "qwen2",
            {"num_key_value_heads": 6, "rope_parameters": {"rope_theta": 5000.0, **YARN, "attention_factor": 1.3}},
            "20KB",
        ),
        ("llama", {"rope_parameters": {"rope_theta": 5000.0, **LLAMA3}}, "20KB"),
        ("llama", {"head_dim": None, "hidden_size": 48, "tie_word_embeddings": True}, "1GB"),
        (
            "llama",
            {"rope_parameters": {"rope_theta": 5000.0, "rope_type": "linear", "factor": 2.0}, "num_key_value_heads": 3},
            "1GB",
        ),
    ],
    ids=lambda value: str(value)[:60],
)
def test_logits_equal_transformers(tmp_path, family, changes, shard_size):
    truth = tiny_model(family, tmp_path / "hf", shard_size, **changes)
    assert (tmp_path / "hf" / "model.safetensors").exists() == (shard_size == "1GB")
    import_hf(tmp_path / "hf", tmp_path / "out")
    tokens_bs = random_tokens(length=60)
    with torch.no_grad():
        expected, found = truth(tokens_bs).logits, logits_of(tmp_path / "out", tokens_bs)
    assert expected.std() > 0.5, "flat logits would prove nothing"
    assert (found - expected).abs().max() < 1e-4
    assert torch.equal(found.argmax(-1), expected.argmax(-1))


def test_fingerprint_names_the_values_not_their_layout(tmp_path):
    model = tiny_qwen3(tmp_path / "single", tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    model.save_pretrained(tmp_path / "with_lm_head")
    edit_tensors(tmp_path / "with_lm_head", lambda t: t.update({"lm_head.weight": t[EMBEDDING.hf].clone()}))
    with torch.no_grad():
        model.model.norm.weight[3] += 1e-3
    model.save_pretrained(tmp_path / "other")
    cards = {
        path.name: import_hf(path, tmp_path / "out" / path.name) for path in sorted(tmp_path.iterdir()) if path.is_dir()
    }
    assert cards["single"].fingerprint == cards["sharded"].fingerprint == cards["with_lm_head"].fingerprint
    assert cards["single"].fingerprint != cards["other"].fingerprint
    assert ModelCard.load(tmp_path / "out" / "single") == cards["single"]


def test_tokenizer_files_travel_and_others_do_not(tmp_path):
    tiny_qwen3(tmp_path / "hf")
    for name in ("tokenizer.json", "needles.json"):
        shutil.copy(TINY_TEACHER / name, tmp_path / "hf")
    (tmp_path / "hf" / "notes.txt").write_text("notes")
    import_hf(tmp_path / "hf", tmp_path / "out")
    folder = tmp_path / "out" / "tokenizer"
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "generation_config.json",
        "needles.json",
        "tokenizer.json",
    ]
    assert (folder / "needles.json").read_text() == (tmp_path / "hf" / "needles.json").read_text()
    assert json.loads((folder / "config.json").read_text()) == {"model_type": "qwen3"}


def stored_dtype(checkpoint_dir: Path) -> torch.dtype:
    return StoredTensors(checkpoint_dir).dtype("decoder.layers.1.self_attention.fa.linear_q.weight")


def test_bfloat16_checkpoint_holds_rounded_values(tmp_path):
    truth = tiny_qwen3(tmp_path / "hf")
    import_hf(tmp_path / "hf", tmp_path / "out", torch.bfloat16)
    _, model = load_model(tmp_path / "out")
    expected = truth.model.layers[1].self_attn.q_proj.weight.bfloat16().float()
    assert torch.equal(model.decoder.layers[1].self_attention.fa.linear_q.weight, expected)
    assert stored_dtype(tmp_path / "out") == torch.bfloat16


@pytest.mark.parametrize(("dtype", "kept"), [("bfloat16", "bfloat16"), ("float16", "float32"), ("float32", "float32")])
def test_unless_told_otherwise_nothing_is_rounded(tmp_path, dtype, kept):
    model = tiny_qwen3()
    model.to(getattr(torch, dtype)).save_pretrained(tmp_path / "hf")
    card = import_hf(tmp_path / "hf", tmp_path / "out")
    assert stored_dtype(tmp_path / "out") == getattr(torch, kept)
    assert (card.source["dtype"], card.source["other_dtypes"]) == (dtype, {})


def test_old_style_config_gives_the_same_shape(tmp_path):
    """Before transformers 5, rope_theta stood by itself and rope_scaling beside it, whose type was once called so."""
    tiny_qwen3(tmp_path, rope_parameters={"rope_theta": 5000.0, **YARN})
    new = read_config(tmp_path).shape
    assert new.rope_theta == 5000.0 and new.rope_scaling == YARN

    def age(raw: dict) -> None:
        rope = raw.pop("rope_parameters")
        raw["rope_theta"] = rope.pop("rope_theta")
        raw["rope_scaling"] = {"type": rope.pop("rope_type"), **rope}
        raw.pop("layer_types")

    edit_config(tmp_path, age)
    assert read_config(tmp_path).shape == new


def test_missing_keys_mean_what_the_family_says(tmp_path):
    """Old Llama configs know neither head_dim nor kv groups."""
    tiny_model("llama", tmp_path, num_key_value_heads=6, head_dim=None, hidden_size=48)
    edit_config(tmp_path, lambda raw: [raw.pop(key) for key in ("head_dim", "num_key_value_heads", "rms_norm_eps")])
    edit_config(
        tmp_path, lambda raw: raw.update(qk_norm=True, qkv_bias=True)
    )  # HydraHead's keys, which say nothing in a Llama's
    shape = read_config(tmp_path).shape
    assert (shape.head_dim, shape.num_kv_groups, shape.norm_epsilon) == (8, 6, 1e-6)
    assert not shape.qk_norm and not shape.qkv_bias and not shape.tied_embeddings


AS_PEOPLE_HAVE_THEM = {
    "no rope_theta, as Llama 2": ("llama", {"rope_parameters": None}, lambda c: c.pop("rope_parameters")),
    "rope_theta beside it": (
        "qwen3",
        {},
        lambda c: c.update(rope_theta=c.pop("rope_parameters")["rope_theta"], rope_scaling=None),
    ),
    "kv heads null": ("llama", {"num_key_value_heads": 6}, lambda c: c.update(num_key_value_heads=None)),
    "kv heads null in Qwen": ("qwen2", {"num_key_value_heads": 6}, lambda c: c.update(num_key_value_heads=None)),
    "native length missing": ("qwen3", {"max_position_embeddings": 32768}, lambda c: c.pop("max_position_embeddings")),
    "norm epsilon missing": ("qwen2", {}, lambda c: c.pop("rms_norm_eps")),
    "yarn without a native length": (
        "qwen3",
        {"rope_parameters": {"rope_theta": 5000.0, "rope_type": "yarn", "factor": 4.0}},
        lambda c: c["rope_parameters"].pop("original_max_position_embeddings"),
    ),
    "windows on no layer": (
        "qwen2",
        {},
        lambda c: c.update(use_sliding_window=True, max_window_layers=3, layer_types=None, sliding_window=8),
    ),
    "windows without a size": (
        "qwen3",
        {},
        lambda c: c.update(use_sliding_window=True, max_window_layers=0, sliding_window=None),
    ),
    "windows that layer_types rule out": (
        "qwen3",
        {},
        lambda c: c.update(use_sliding_window=True, max_window_layers=0, sliding_window=8),
    ),
    "layer_types null": ("qwen3", {}, lambda c: c.update(layer_types=None)),
    "silu by its other name": ("llama", {}, lambda c: c.update(hidden_act="swish")),
    "keys that mean nothing here": (
        "llama",
        {},
        lambda c: c.update(pretraining_tp=1, torch_dtype="float32", x={"y": [None]}, id2label=[]),
    ),
}


@pytest.mark.parametrize(("family", "changes", "edit"), AS_PEOPLE_HAVE_THEM.values(), ids=list(AS_PEOPLE_HAVE_THEM))
def test_configs_as_people_have_them(tmp_path, family, changes, edit):
    settings = {key: value for key, value in changes.items() if value is not None}
    truth = tiny_model(
        family, tmp_path / "hf", **({"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}} | settings)
    )
    edit_config(tmp_path / "hf", edit)
    card = import_hf(tmp_path / "hf", tmp_path / "out")
    tokens_bs = random_tokens(length=60)
    with torch.no_grad():
        expected, found = truth(tokens_bs).logits, logits_of(tmp_path / "out", tokens_bs)
    assert (found - expected).abs().max() < 1e-4
    assert card.shape.native_length == truth.config.max_position_embeddings
    export_hf(tmp_path / "out", tmp_path / "back")
    assert (tmp_path / "back" / "config.json").read_text() == json.dumps(
        json.loads((tmp_path / "hf" / "config.json").read_text()), indent=2
    ) + "\n"


def test_a_tied_model_may_store_its_output_layer_alone_and_buffers_are_no_weights(tmp_path):
    truth = tiny_qwen3(tmp_path / "plain", tie_word_embeddings=True)
    truth.save_pretrained(tmp_path / "hf")
    buffers = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.arange(8.0) for layer in range(3)}
    edit_tensors(tmp_path / "hf", lambda t: t.update(buffers | {HEAD: t.pop(EMBEDDING.hf)}))
    cards = [import_hf(tmp_path / name, tmp_path / f"{name}.out") for name in ("plain", "hf")]
    assert cards[0].fingerprint == cards[1].fingerprint
    tokens_bs = random_tokens(length=20)
    with torch.no_grad():
        assert (logits_of(tmp_path / "hf.out", tokens_bs) - truth(tokens_bs).logits).abs().max() < 1e-4
    edit_config(tmp_path / "hf", lambda c: c.update(tie_word_embeddings=False))
    with pytest.raises(HuggingFaceError, match=r"tensor model\.embed_tokens\.weight is missing"):
        import_hf(tmp_path / "hf", tmp_path / "untied")


def edit_config(hf_dir: Path, change: Callable[[dict], object]) -> None:
    raw = json.loads((hf_dir / "config.json").read_text())
    change(raw)
    (hf_dir / "config.json").write_text(json.dumps(raw))


def edit_tensors(hf_dir: Path, change: Callable[[dict], object]) -> None:
    tensors = load_file(hf_dir / "model.safetensors")
    change(tensors)
    save_file(tensors, hf_dir / "model.safetensors", metadata={"format": "pt"})


def cut_short(hf_dir: Path) -> None:
    data = (hf_dir / "model.safetensors").read_bytes()
    (hf_dir / "model.safetensors").write_bytes(data[: len(data) // 2])


def put(tensors: dict, name: str, value: float) -> None:
    tensors[name].view(-1)[-1] = value


K1, O2, HEAD = "model.layers.1.self_attn.k_proj.weight", "model.layers.2.self_attn.o_proj.weight", "lm_head.weight"
BAD_DIRECTORIES = {
    "no config": (lambda d: (d / "config.json").unlink(), ["config.json", "Hugging Face"]),
    "config not json": (lambda d: (d / "config.json").write_text("{"), ["config.json", "not JSON"]),
    "config not an object": (lambda d: (d / "config.json").write_text("[]"), ["config.json", "object"]),
    "other family": (
        lambda d: edit_config(d, lambda c: c.update(model_type="gpt2")),
        ["model_type", "'gpt2'", "qwen3", "hydra_head"],
    ),
    "moe": (lambda d: edit_config(d, lambda c: c.update(model_type="qwen3_moe")), ["'qwen3_moe'"]),
    "sliding window": (
        lambda d: edit_config(
            d, lambda c: c.update(use_sliding_window=True, max_window_layers=1, layer_types=None, sliding_window=8)
        ),
        ["layer_types", "'sliding_attention'", "use_sliding_window"],
    ),
    "sliding layer": (
        lambda d: edit_config(d, lambda c: c["layer_types"].__setitem__(1, "sliding_attention")),
        ["layer_types"],
    ),
    "rope scaling": (
        lambda d: edit_config(
            d, lambda c: c.update(rope_scaling={"type": "dynamic"}, rope_parameters={"rope_theta": 1e4})
        ),
        ["dynamic"],
    ),
    "rope type": (
        lambda d: edit_config(d, lambda c: c["rope_parameters"].update(rope_type="longrope")),
        ["rope_type", "longrope", "yarn"],
    ),
    "rope factor": (
        lambda d: edit_config(d, lambda c: c["rope_parameters"].update(rope_type="linear")),
        ["linear", "factor"],
    ),
    "partial rotary": (
        lambda d: edit_config(d, lambda c: c["rope_parameters"].update(partial_rotary_factor=0.5)),
        ["partial_rotary_factor 0.5"],
    ),
    "attention bias": (lambda d: edit_config(d, lambda c: c.update(attention_bias=True)), ["attention_bias"]),
    "activation": (lambda d: edit_config(d, lambda c: c.update(hidden_act="gelu")), ["hidden_act", "'gelu'"]),
    "quantised": (lambda d: edit_config(d, lambda c: c.update(quantization_config={})), ["quantization_config"]),
    "key missing": (
        lambda d: edit_config(d, lambda c: c.pop("hidden_size")),
        ["shape (61, 40)", "config.json lacks hidden_size"],
    ),
    "key not a number": (
        lambda d: edit_config(d, lambda c: c.update(num_hidden_layers="3")),
        ["num_hidden_layers", "'3'"],
    ),
    "groups": (lambda d: edit_config(d, lambda c: c.update(num_key_value_heads=4)), ["num_key_value_heads 4", "6"]),
    "odd head": (lambda d: edit_config(d, lambda c: c.update(head_dim=15)), ["head_dim", "15", "even"]),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), ["no weights"]),
    "cut short": (cut_short, ["model.safetensors", "cut short"]),
    "not safetensors": (
        lambda d: (d / "model.safetensors").write_bytes(b"x" * 100),
        ["model.safetensors", "not safetensors"],
    ),
    "missing tensor": (lambda d: edit_tensors(d, lambda t: t.pop(K1)), [K1, "missing"]),
    "missing output layer": (lambda d: edit_tensors(d, lambda t: t.pop(HEAD)), [HEAD, "missing"]),
    "extra tensor": (
        lambda d: edit_tensors(d, lambda t: t.update({"model.bias": torch.ones(3)})),
        ["model.bias", "not part"],
    ),
    "one layer more": (
        lambda d: edit_config(d, lambda c: c.update(num_hidden_layers=2, layer_types=None)),
        ["model.layers.2.", "not part"],
    ),
    "mis-shaped": (
        lambda d: edit_tensors(d, lambda t: t.update({O2: t[O2].T.contiguous()})),
        [O2, "(96, 40)", "(40, 96)"],
    ),
    "nan": (lambda d: edit_tensors(d, lambda t: put(t, O2, float("nan"))), [O2, "NaN"]),
    "infinity": (lambda d: edit_tensors(d, lambda t: put(t, O2, float("-inf"))), [O2, "infinity"]),
    "integers": (lambda d: edit_tensors(d, lambda t: t.update({O2: t[O2].to(torch.int8)})), [O2, "I8", "unquantised"]),
    "tied but different": (
        lambda d: edit_config(d, lambda c: c.update(tie_word_embeddings=True)),
        [HEAD, "tie_word_embeddings"],
    ),
}


@pytest.mark.parametrize(("spoil", "words"), BAD_DIRECTORIES.values(), ids=list(BAD_DIRECTORIES))
def test_unusable_directory_is_named_and_nothing_is_written(tmp_path, spoil, words):
    tiny_qwen3(tmp_path / "hf", tie_word_embeddings=False)
    spoil(tmp_path / "hf")
    with pytest.raises(HuggingFaceError) as caught:
        import_hf(tmp_path / "hf", tmp_path / "out")
    assert_one_line(str(caught.value), words)
    assert not (tmp_path / "out").exists()


def assert_one_line(message: str, words: list[str]) -> None:
    assert "\n" not in message
    assert all(word in message for word in words), message


def first_shard(hf_dir: Path) -> Path:
    return min(hf_dir.glob("model-*.safetensors"))


def misplace(hf_dir: Path) -> None:
    """The index names another existing shard for a tensor, and a tensor that no shard has."""
    index = json.loads((hf_dir / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.ghost"] = first_shard(hf_dir).name
    (hf_dir / "model.safetensors.index.json").write_text(json.dumps(index))


def double(hf_dir: Path) -> None:
    """One shard repeats the tensors of another."""
    first, second = sorted(hf_dir.glob("model-*.safetensors"))[:2]
    save_file({**load_file(first), **load_file(second)}, second, metadata={"format": "pt"})


BAD_SHARDS = {
    "shard missing": (lambda d: first_shard(d).unlink(), ["model-00001-of-", "missing"]),
    "shard cut short": (
        lambda d: first_shard(d).write_bytes(first_shard(d).read_bytes()[:-40]),
        ["model-00001-of-", "cut short"],
    ),
    "index without map": (lambda d: (d / "model.safetensors.index.json").write_text("{}"), ["weight_map"]),
    "index names a ghost": (misplace, ["model.ghost", "missing"]),
    "tensor twice": (double, ["another file"]),
}


@pytest.mark.parametrize(("spoil", "words"), BAD_SHARDS.values(), ids=list(BAD_SHARDS))
def test_unusable_shards(tmp_path, spoil, words):
    tiny_qwen3(tmp_path / "hf", "20KB")
    spoil(tmp_path / "hf")
    with pytest.raises(HuggingFaceError) as caught:
        import_hf(tmp_path / "hf", tmp_path / "out")
    assert_one_line(str(caught.value), words)
    assert not (tmp_path / "out").exists()


def test_target_that_holds_a_checkpoint_is_refused_before_any_work(tmp_path):
    (tmp_path / TRACKER).write_text("0")
    with pytest.raises(InputError, match="already holds a checkpoint"):
        import_hf(tmp_path / "nowhere", tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="not a writable folder"):
        import_hf(tmp_path / "nowhere", tmp_path / "file" / "out")


def test_import_that_dies_while_saving_leaves_nothing_and_can_be_repeated(tmp_path, monkeypatch):
    tiny_qwen3(tmp_path / "hf")

    def full_disk(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ModelCard, "save", full_disk)  # after the tensors, before the mark that makes them a checkpoint
        with pytest.raises(InputError, match="out: cannot be written, No space left on device; nothing is left of it"):
            import_hf(tmp_path / "hf", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "of a killed attempt").write_text("")
    import_hf(tmp_path / "hf", tmp_path / "out")
    load_model(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "out"]


def test_a_table_that_leaves_a_tensor_open_is_caught(tmp_path, monkeypatch):
    tiny_qwen3(tmp_path / "hf")
    rules = tensor_rules(read_config(tmp_path / "hf"))
    del rules["model.layers.0.mlp.up_proj.weight"]
    monkeypatch.setattr(hf_import, "tensor_rules", lambda *_: rules)
    monkeypatch.setattr(hf_import, "check_tensors", lambda *_: None)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.linear_fc1\.weight is not filled"):
        import_hf(tmp_path / "hf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_are_exactly_the_tensors_that_transformers_saves(tmp_path, family):
    tiny_model(family, tmp_path, tie_word_embeddings=False)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(tensor_rules(read_config(tmp_path)))


def run_command(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(COMMAND), *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False
    )


def test_command_refuses_in_one_line_with_status_2(tmp_path):
    tiny_qwen3(tmp_path / "hf")
    edit_tensors(tmp_path / "hf", lambda t: put(t, O2, float("nan")))  # found last: the model has been built by then
    done = run_command("import", "--hf", tmp_path / "hf", "--out", tmp_path / "out")
    assert done.returncode == 2
    assert [line for line in done.stderr.splitlines() if "tensor/s" not in line and line.strip()] == [
        f"convert: {tmp_path / 'hf'}: tensor {O2} holds NaN or infinity"
    ]
    assert not (tmp_path / "out").exists()
