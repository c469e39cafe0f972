# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Code that a folder brings along is never run: not asked for, not answered for, not switched on from outside."""

import ast
import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from hydra_mcore.convert.hf_code import AUTO_MAP, CODE_FILES, check_model_code, copy_model_code
from hydra_mcore.corpus.tokenize import load_encoder
from hydra_mcore.errors import InputError
from hydra_mcore.tokenizer import load_tokenizer, open_tokenizer
from tests.support.paths import ROOT, TINY_TEACHER

FILES = sorted(path for top in ("hydra_mcore", "tools", "examples") for path in (ROOT / top).rglob("*.py"))
LOADERS = {"from_pretrained", "from_config", "pipeline"}
# Calls of other kinds: of this package's own classes, of classes that read no code, of one that checks the code it
# runs.
SAFE = {
    ("hydra_mcore/evaluation/hugging_face.py", "model_class().config_class.from_pretrained(folder)"),
    ("hydra_mcore/convert/tokenizer_files.py", "GenerationConfig.from_pretrained(hf_dir, local_files_only=True)"),
    ("examples/tiny/teacher_training.py", "PreTrainedTokenizerFast.from_pretrained(folder)"),
    ("hydra_mcore/convert/hf_config.py", "hydra_family.from_config(raw | given, shape)"),
    (
        "hydra_mcore/evaluation/subject.py",
        (
            "AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=run_its_code,"
            " local_files_only=True)"
        ),
    ),
}


def test_every_place_that_loads_refuses_foreign_code() -> None:
    found, refused = set(), 0
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                not isinstance(node, ast.Call)
                or getattr(node.func, "attr", getattr(node.func, "id", "")) not in LOADERS
            ):
                continue
            options = ast.unparse(node)
            if "trust_remote_code=False" in options or "**options" in options:
                refused += 1
            else:
                found.add((str(path.relative_to(ROOT)), options))
    assert found == SAFE and refused >= 4
    assert not [path for path in FILES if "trust_remote_code=True" in path.read_text() and path.name != "model_card.py"]


PLANTED = {
    "in tokenizer_config.json": {
        "tokenizer_config.json": {"auto_map": {"AutoTokenizer": [None, "evil.Evil"]}, "tokenizer_class": "Evil"}
    },
    "as a list, as of old": {"tokenizer_config.json": {"auto_map": [None, "evil.Evil"]}},
    "in config.json": {
        "config.json": {
            "auto_map": {"AutoConfig": "evil.Evil", "AutoTokenizer": [None, "evil.Evil"]},
            "model_type": "evil",
        }
    },
    "in both": {
        "tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, "tokenizer_class": "Evil"},
        "config.json": {"auto_map": {"AutoConfig": "evil.Evil"}, "model_type": "evil"},
    },
}


def plant(folder: Path, where: dict[str, dict]) -> Path:
    """A folder with a tokenizer whose code leaves a mark; returns the mark."""
    folder.mkdir(parents=True)
    mark = folder / "mark"
    (folder / "tokenizer.json").write_bytes((TINY_TEACHER / "tokenizer.json").read_bytes())
    for name in ("tokenizer_config.json", "config.json"):
        (folder / name).write_text(json.dumps({**json.loads((TINY_TEACHER / name).read_text()), **where.get(name, {})}))
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass Evil:\n    model_type = 'evil'\n")
    return mark


@pytest.mark.parametrize("where", PLANTED.values(), ids=list(PLANTED))
@pytest.mark.parametrize("switched_on", [False, True])
def test_a_planted_tokenizer_is_refused_in_one_line_or_read_without_its_code(tmp_path, monkeypatch, where, switched_on):
    if switched_on:
        for name in (
            "TRUST_REMOTE_CODE",
            "HF_TRUST_REMOTE_CODE",
            "HF_DATASETS_TRUST_REMOTE_CODE",
            "TRANSFORMERS_TRUST_REMOTE_CODE",
        ):
            monkeypatch.setenv(name, "1")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on standard input"))
    mark = plant(tmp_path / "a" / "tokenizer", where)
    for load in (open_tokenizer, load_encoder):
        try:
            load(tmp_path / "a" / "tokenizer")
            assert "tokenizer_config.json" not in where
        except InputError as error:
            assert "needs code of its own, which is never run" in str(error) and "\n" not in str(error)
    if "tokenizer_config.json" in where:
        with pytest.raises(InputError, match="needs code of its own"):
            load_tokenizer(tmp_path / "a")
    assert not mark.exists()


@pytest.mark.slow
@pytest.mark.parametrize("stdin", ["terminal", "closed", "yes"])
def test_commands_do_not_ask(tmp_path, stdin):
    mark = plant(tmp_path / "tokenizer", PLANTED["in both"])
    (tmp_path / "text.txt").write_text("some text")
    command = [sys.executable, str(ROOT / "tools" / "prepare_data.py"), "--input", str(tmp_path / "text.txt")]
    command += ["--tokenizer", str(tmp_path / "tokenizer"), "--out", str(tmp_path / "out")]
    ours, theirs = pty.openpty()
    os.write(ours, b"y\n" * 9)
    given = {"terminal": {"stdin": theirs}, "closed": {"stdin": subprocess.DEVNULL}, "yes": {"input": "y\n" * 9}}[stdin]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, cwd=ROOT, **given)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "needs code of its own" in done.stderr, done.stderr
    assert not mark.exists()


def test_an_export_runs_only_with_our_code_to_the_byte(tmp_path):
    copy_model_code(tmp_path)
    check_model_code(tmp_path, AUTO_MAP)
    for name in CODE_FILES:
        path = tmp_path / Path(name).name
        ours = path.read_bytes()
        path.write_bytes(ours + b"\nimport os\n")
        with pytest.raises(InputError, match=f"{path.name}: not the code of this package"):
            check_model_code(tmp_path, AUTO_MAP)
        path.write_bytes(ours)
    for auto_map in (None, [], {**AUTO_MAP, "AutoModelForCausalLM": "someone/else--modeling.Evil"}):
        with pytest.raises(InputError, match="names other code"):
            check_model_code(tmp_path, auto_map)
