# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The verification's command line: what cannot be used is one line, and help is quick."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hydra_mcore.config import HydraOptions, ModelCard
from hydra_mcore.convert.inherit import hybridize
from hydra_mcore.evaluation.verification import NAMES
from hydra_mcore.heads import HeadMap
from hydra_mcore.model.runtime import process_groups
from tests.support.paths import ROOT
from tools.verify import main


@pytest.fixture(scope="module")
def folders(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A teacher with a tokenizer, a student without one."""
    root, shape = tmp_path_factory.mktemp("command"), ModelCard.load(tiny_teacher).shape
    head_map = HeadMap.from_fa([(0, 1)], shape.num_layers, shape.num_heads, shape.num_kv_groups)
    with process_groups():
        hybridize(tiny_teacher, head_map, HydraOptions(), root / "student")
    shutil.rmtree(root / "student" / "tokenizer")
    return {"teacher": tiny_teacher, "student": root / "student"}


def refusal(capsys: pytest.CaptureFixture, *argv: str | Path) -> str:
    """The one line on stderr of a verification that must end with exit status 2."""
    with pytest.raises(SystemExit) as stop:
        main([str(item) for item in argv])
    out, said = capsys.readouterr()
    assert stop.value.code == 2 and not out and len(said.splitlines()) == 1 and said.startswith("verify: "), out + said
    return said


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("nothing",), "checkpoint nothing: No such file or directory; correct the path, or make it first"),
        (
            ("{student}", "--teacher", "{student}"),
            "a student checkpoint, not a teacher's; give the folder that import wrote",
        ),
        (("{student}", "--teacher", "nothing"), "teacher nothing: No such file"),
        (("{teacher}", "--teacher", "{teacher}"), "is a teacher itself, so it has no other; leave --teacher out"),
        (("{teacher}", "--hf", "{teacher}"), "/config.json: no such file; give a Hugging Face model directory"),
        (("{teacher}", "--hf", "nothing"), "model nothing: neither a folder nor in the cache, and the hub"),
        (("{student}", "--export", "{student}"), "config.json: no such file; give a Hugging Face model directory"),
        (
            ("{teacher}", "--only", "export", "layout"),
            "--only layout: no such check; choose from source, all-fa, layouts",
        ),
        (("{teacher}", "--length", "8"), "sequences of 8 tokens tell little; take at least 24"),
        (("{teacher}", "--length", "-1"), "give numbers above 0"),
        (("{teacher}", "--sequences", "0"), "give numbers above 0"),
        (
            ("{teacher}", "--text", "{teacher}/model.json", "--sequences", "90"),
            "give at least 46080, or lower --length or --sequences",
        ),
        (("{teacher}", "--text", "nothing.txt"), "nothing.txt: No such file or directory"),
        (("{student}", "--text", "{teacher}/model.json"), "no tokenizer beside the checkpoint"),
        (("{teacher}", "--json", "nothing/found.json"), "--json nothing/found.json: No such file or directory"),
    ],
)
def test_bad_input_is_one_line(
    folders: dict[str, Path], capsys: pytest.CaptureFixture, argv: tuple[str, ...], said: str
) -> None:
    assert said in refusal(capsys, *(item.format(**folders) for item in argv))


def test_a_checkpoint_that_is_cut_short_is_one_line(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    shutil.copytree(folders["student"], tmp_path / "student")
    (tmp_path / "student" / "latest_checkpointed_iteration.txt").unlink()
    assert "no complete checkpoint" in refusal(capsys, tmp_path / "student")


def test_help_names_every_check_without_loading_torch() -> None:
    code = (
        "import sys; from tools.verify import parser; print(parser().format_help()); sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    described = [line.split()[0] for line in done.stdout.splitlines() if line.startswith(NAMES)]
    assert described == list(NAMES)
