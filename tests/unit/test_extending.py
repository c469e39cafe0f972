# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""docs/extending.md names files that exist, and names that stand in the files of the same paragraph."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SECTIONS = dict(
    section.split("\n", 1) for section in (ROOT / "docs" / "extending.md").read_text().split("\n## ") if "\n" in section
)
KINDS_OF_EXTENSION = ("A family of teachers", "A kind of heads", "A loss", "A selection strategy", "A needle task")
PATH = re.compile(r"(?:[\w.]+/)*[\w.]+(?:/|\.py|\.md|\.json|\.yaml)|\w+(?:/\w+)+")
NO_PATH = ("config.json",)  # of a Hugging Face model
NO_SYMBOL = ("config.json", "model_type", "import")  # a file of another, a key of it, a command


def in_backticks(text: str) -> list[str]:
    """The first word of each: what follows is a command's."""
    return [found.split()[0] for found in re.findall(r"`([^`]+)`", text)]


def paths(text: str) -> list[Path]:
    return [ROOT / word for word in in_backticks(text) if PATH.fullmatch(word) and word not in NO_PATH]


def symbols(text: str) -> list[str]:
    return [word for word in in_backticks(text) if re.fullmatch(r"\w+(\.\w+)?", word) and word not in NO_SYMBOL]


def test_what_counts_as_a_path() -> None:
    assert [path.name for path in paths("`tests/toy_kind`, `hydra_mcore/ops/`, `tools/convert.py hybridize`")] == [
        *("toy_kind", "ops", "convert.py"),
    ]
    assert not paths("`HeadKind`, `cache.states`, `config.json`") and symbols(
        "`HeadKind`, `cache.states`, `a/b.py`"
    ) == [
        *("HeadKind", "cache.states"),
    ]


def test_every_extension_point_is_there() -> None:
    assert tuple(SECTIONS)[1:] == KINDS_OF_EXTENSION


@pytest.mark.parametrize("section", SECTIONS)
def test_every_named_file_exists(section: str) -> None:
    assert [str(path) for path in paths(SECTIONS[section]) if not path.exists()] == []


@pytest.mark.parametrize("section", KINDS_OF_EXTENSION)
def test_every_recipe_names_tests_that_prove_it(section: str) -> None:
    assert [path for path in paths(SECTIONS[section]) if path.name.startswith("test_")]


@pytest.mark.parametrize("section", KINDS_OF_EXTENSION)
def test_every_name_stands_in_a_file_of_its_step(section: str) -> None:
    """A step is a numbered item or a paragraph; a folder stands for the files in it."""
    for step in re.split(r"\n(?=\d\. |\n)", SECTIONS[section]):
        files = [file for path in paths(step) for file in (path.glob("*.py") if path.is_dir() else [path])]
        code = "\n".join(file.read_text() for file in files)
        for name in symbols(step):
            assert re.search(rf"\b{re.escape(name)}\b", code), f"{section}: {name} is in no file of\n{step}"
