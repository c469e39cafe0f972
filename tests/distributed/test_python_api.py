# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The Python API: its example runs, its names are few and quick, and its defaults are those of the commands."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import hydra_mcore
from hydra_mcore.api import _words, train_stage
from hydra_mcore.errors import InputError
from hydra_mcore.evaluation.session import EvaluationSettings
from hydra_mcore.selection.head_choice import ChoiceSettings
from hydra_mcore.selection.head_scoring import ScoringSettings
from tests.distributed.test_commands import run_dir  # noqa: F401  a tiny recipe with its data
from tests.support.commands import printed
from tests.support.paths import ROOT, TINY_TEACHER
from tools import evaluate, select_heads

RUN = """
import sys
from pathlib import Path
from examples.python_api import transfer
transfer(*map(Path, sys.argv[1:]), length=128)
"""


@pytest.mark.slow
def test_the_example_runs_from_a_model_to_its_export(run_dir: Path) -> None:  # noqa: F811
    said = printed("-c", RUN, TINY_TEACHER, run_dir / "recipe.yaml", run_dir / "corpus.txt", run_dir, timeout=580)
    assert "8 heads keep full attention" in said
    models = json.loads((run_dir / "evaluation" / "results.json").read_text())["models"]
    assert len(models) == 2
    card = (run_dir / "hf" / "README.md").read_text()
    assert "![accuracy against length](accuracy.png)" in card and (run_dir / "hf" / "accuracy.png").exists()
    assert json.loads((run_dir / "hf" / "config.json").read_text())["max_position_embeddings"] == 512
    assert (run_dir / "heads" / "scores.json").exists()


def test_ten_names_and_a_version_without_heavy_imports() -> None:
    assert len(set(hydra_mcore.__all__) - {"__version__"}) <= 10
    code = "import sys, hydra_mcore; dir(hydra_mcore); print({'torch', 'megatron', 'numpy'} & set(sys.modules))"
    assert printed("-c", code) == "set()\n"
    for name in hydra_mcore.__all__:
        assert getattr(hydra_mcore, name)
    with pytest.raises(AttributeError, match="no attribute 'imprt_model'; it has __version__, import_model,"):
        _ = hydra_mcore.imprt_model


@pytest.mark.parametrize(
    ("settings", "parser", "argv"),
    [
        (EvaluationSettings, evaluate.parser, ["--models", "m", "--lengths", "8", "--out", "o"]),
        (ScoringSettings, select_heads.parser, ["--teacher", "t", "--out", "o"]),
        (ChoiceSettings, select_heads.parser, ["--teacher", "t", "--out", "o"]),
    ],
)
def test_defaults_are_those_of_the_commands(settings: type, parser: Any, argv: list[str]) -> None:
    flags = vars(parser().parse_args(argv))
    for field in dataclasses.fields(settings):
        if field.default is not dataclasses.MISSING:
            default = list(field.default) if isinstance(field.default, tuple) else field.default
            found = flags[field.name] if field.name != "ratio" else flags["ratio"] or "3:1"
            assert found == default, field.name
        assert field.name in flags


def test_flags_of_a_stage_as_words() -> None:
    flags = {
        "train_iters": 3,
        "packed_documents": True,
        "fp8": None,
        "sequence_parallel": False,
        "data_path": ["1", "a"],
    }
    assert list(_words(flags)) == ["--train-iters", "3", "--packed-documents", "--data-path", "1", "a"]
    with pytest.raises(InputError, match="stage 'algin': choose one of align, distill, extend"):
        train_stage("algin", "recipe.yaml")
    with pytest.raises(InputError, match="stage align ended with exit status 2; its own message stands above"):
        train_stage("align", "no_such_recipe.yaml")


def test_the_console_command_runs_every_tool(tmp_path: Path) -> None:
    text = printed("-m", "hydra_mcore", "--help")
    assert printed("-m", "hydra_mcore", "--version") == f"{hydra_mcore.__version__}\n"
    names = re.findall(r"(?m)^(\w+)  +\w", text.split("\n\n")[1])
    assert {"convert", "train", "evaluate"} < set(names)
    for name in names:
        assert name == "train" or (ROOT / "tools" / f"{name}.py").exists()
    assert "--hf NAME" in printed("-m", "hydra_mcore", "convert", "import", "--help")
    assert "--run-dir" in printed("-m", "hydra_mcore", "train", "--help")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    call = [sys.executable, "-m", "hydra_mcore", "convrt"]
    done = subprocess.run(call, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("hydra-mcore: no command 'convrt'; choose from convert, ")
