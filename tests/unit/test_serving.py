# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""What can be said of serving/ without vLLM: it runs the files that every export has, and Python 3.11 can read them."""

import ast
from pathlib import Path

import pytest

from hydra_mcore.convert.hf_code import CODE_FILES
from tests.support.paths import ROOT

PACKAGE = ROOT / "serving" / "vllm_hydra_head"
FILES = sorted(path for path in (ROOT / "serving").rglob("*.py") if "references" not in path.parts)


def test_the_export_s_code_is_the_project_s_own() -> None:
    linked = {path.name: path.resolve() for path in (PACKAGE / "export").glob("*.py") if path.is_symlink()}
    assert linked == {Path(name).name: ROOT / "hydra_mcore" / name for name in CODE_FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_short_and_read_by_python_3_11(path: Path) -> None:
    text = path.read_text()
    functions = [
        node for node in ast.walk(ast.parse(text, feature_version=(3, 11))) if isinstance(node, ast.FunctionDef)
    ]
    assert len(text.splitlines()) < 400
    assert not [function.name for function in functions if function.end_lineno - function.lineno >= 60]
