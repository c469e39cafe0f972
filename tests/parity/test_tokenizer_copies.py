# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""A checkpoint's tokenizer, and an export's, give the ids of the directory they came from, whatever class that
directory names.
"""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from hydra_mcore.config import HydraOptions
from hydra_mcore.convert.hf_export import export_hf
from hydra_mcore.convert.hf_import import import_hf
from hydra_mcore.convert.inherit import hybridize
from hydra_mcore.convert.tokenizer_files import NOT_OURS, TEXT, TOKENIZER_FILES, difference
from hydra_mcore.corpus.tokenize import fingerprint, load_encoder
from hydra_mcore.errors import InputError
from hydra_mcore.heads import HeadMap
from hydra_mcore.model.runtime import process_groups
from hydra_mcore.tokenizer import open_tokenizer
from tests.support.small_tokenizers import small_tokenizer
from tests.support.tiny_hf import tiny_model

SOME_HEADS = HeadMap.from_fa([(0, 1), (0, 5), (2, 3)], 3, 6, 2)


@pytest.fixture(scope="module", autouse=True)
def one_process():
    with process_groups():
        yield


def source(tmp_path: Path, family: str, kind: str, **settings: object) -> Path:
    """A model directory with a small tokenizer; ``settings`` of tokenizer_config.json, None for no such key."""
    tiny_model(family, tmp_path / "hf", vocab_size=1200)
    small_tokenizer(kind).save_pretrained(tmp_path / "hf")
    edit(tmp_path / "hf" / "tokenizer_config.json", **settings)
    return tmp_path / "hf"


def edit(path: Path, **changes: object) -> None:
    raw = (json.loads(path.read_text()) if path.exists() else {}) | changes
    path.write_text(json.dumps({key: value for key, value in raw.items() if value is not None}))


def ids(folder: Path, **options: object) -> list[int]:
    return AutoTokenizer.from_pretrained(folder, **options)(TEXT)["input_ids"]


CASES = {
    "qwen2 that says Llama": ("qwen2", "gpt2", {"tokenizer_class": "LlamaTokenizerFast"}),
    "qwen2 that says nothing": ("qwen2", "gpt2", {"tokenizer_class": None}),
    "qwen2 that says fast": ("qwen2", "gpt2", {}),
    "qwen3 that says nothing": ("qwen3", "gpt2", {"tokenizer_class": None}),
    "qwen3 that says Qwen2": ("qwen3", "qwen", {"tokenizer_class": "Qwen2Tokenizer"}),
    "llama that says nothing": ("llama", "llama", {"tokenizer_class": None}),
    "llama that says Llama": (
        "llama",
        "llama",
        {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True},
    ),
    "llama of old": (
        "llama",
        "llama",
        {"tokenizer_class": "LlamaTokenizerFast", "legacy": True, "add_prefix_space": None},
    ),
}


QUICK = ("qwen2 that says Llama", "llama of old")


@pytest.mark.parametrize(
    ("family", "kind", "settings"),
    [pytest.param(*case, id=name, marks=() if name in QUICK else pytest.mark.slow) for name, case in CASES.items()],
)
def test_ids_are_those_of_the_source(tmp_path, family, kind, settings):
    hf = source(tmp_path, family, kind, **settings)
    import_hf(hf, tmp_path / "teacher")
    export_hf(tmp_path / "teacher", tmp_path / "back")
    hybridize(tmp_path / "teacher", SOME_HEADS, HydraOptions(), tmp_path / "student")
    export_hf(tmp_path / "student", tmp_path / "hydra")
    import_hf(tmp_path / "hydra", tmp_path / "again")
    truth = ids(hf)
    for name in ("teacher/tokenizer", "back", "student/tokenizer", "hydra", "again/tokenizer"):
        assert ids(tmp_path / name, trust_remote_code=False) == truth, name
    assert ids(tmp_path / "hydra", trust_remote_code=True) == truth
    assert fingerprint(load_encoder(tmp_path / "teacher", "e").serialised) == fingerprint(
        load_encoder(hf, "e").serialised
    )


def test_files_of_every_kind_travel(tmp_path):
    """No settings, vocabulary in two files, templates in files, added tokens."""
    hf = source(tmp_path, "qwen2", "qwen")
    tokenizer = json.loads((hf / "tokenizer.json").read_text())
    (hf / "vocab.json").write_text(json.dumps(tokenizer["model"]["vocab"]))
    (hf / "merges.txt").write_text(
        "#version: 0.2\n" + "\n".join(" ".join(pair) for pair in tokenizer["model"]["merges"])
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (hf / name).unlink()
    (hf / "added_tokens.json").write_text(json.dumps({"<|mine|>": 1100}))
    (hf / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (hf / "additional_chat_templates").mkdir()
    (hf / "additional_chat_templates" / "tools.jinja").write_text("tools")
    import_hf(hf, tmp_path / "teacher")
    export_hf(tmp_path / "teacher", tmp_path / "back")
    tokenizers = [open_tokenizer(folder) for folder in (hf, tmp_path / "teacher" / "tokenizer", tmp_path / "back")]
    assert set(tokenizers[0].chat_template) == {"default", "tools"}
    assert not difference(*tokenizers[:2]) and not difference(tokenizers[0], tokenizers[2])


def test_a_copy_with_other_ids_is_refused_and_nothing_is_written(tmp_path, monkeypatch):
    hf = source(tmp_path, "qwen2", "qwen")
    edit(hf / "tokenizer_config.json", chat_template=None)
    monkeypatch.setattr("hydra_mcore.convert.tokenizer_files.CHOICE", ())
    edit(hf / "tokenizer_config.json", tokenizer_class=None)
    small_tokenizer("gpt2").save_pretrained(tmp_path / "other")
    (hf / "tokenizer.json").write_text((tmp_path / "other" / "tokenizer.json").read_text())
    with pytest.raises(
        InputError,
        match=r"hf: its tokenizer and the checkpoint's copy tokenizer/ differ: Qwen2Tokenizer makes \d+ tokens",
    ):
        import_hf(hf, tmp_path / "out")
    assert not (tmp_path / "out").exists()


BROKEN = {
    "cut short": ("tokenizer.json", '{"version": "1.0", "mod'),
    "of another kind": ("tokenizer.json", "[]"),
    "without a model": ("tokenizer.json", '{"version": "1.0"}'),
    "settings of another kind": ("tokenizer_config.json", "[1]"),
    "settings nested deeply": ("tokenizer_config.json", "[" * 100_000),
    "class of another kind": ("tokenizer_config.json", '{"tokenizer_class": [3]}'),
    "tokens of another kind": ("tokenizer_config.json", '{"added_tokens_decoder": {"x": 3}}'),
    "generation cut short": ("generation_config.json", '{"eos'),
    "generation of another kind": ("generation_config.json", "[]"),
    "generation that cannot be": ("generation_config.json", '{"max_new_tokens": -1}'),
    "generation of nothing": ("generation_config.json", '{"watermarking_config": 3}'),
}


@pytest.mark.parametrize(("name", "text"), BROKEN.values(), ids=list(BROKEN))
def test_broken_files_are_refused_in_one_line(tmp_path, name, text):
    hf = source(tmp_path, "qwen2", "gpt2")
    (hf / name).write_text(text)
    with pytest.raises(InputError, match=r"hf\b") as caught:
        import_hf(hf, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_student_loses_the_generation_settings_that_its_cache_cannot_do(tmp_path):
    hf = source(tmp_path, "qwen2", "gpt2")
    settings = {
        "cache_implementation": "static",
        "prompt_lookup_num_tokens": 3,
        "temperature": 0.7,
        "do_sample": True,
        "eos_token_id": [5, 6],
    }
    (hf / "generation_config.json").write_text(json.dumps(settings))
    import_hf(hf, tmp_path / "teacher")
    export_hf(tmp_path / "teacher", tmp_path / "back")
    hybridize(tmp_path / "teacher", SOME_HEADS, HydraOptions(), tmp_path / "student")
    export_hf(tmp_path / "student", tmp_path / "hydra")
    assert json.loads((tmp_path / "back" / "generation_config.json").read_text()) == settings
    kept = {key: value for key, value in settings.items() if key not in NOT_OURS}
    assert json.loads((tmp_path / "hydra" / "generation_config.json").read_text()) == kept != settings
    assert "generation_config.json" in TOKENIZER_FILES
