# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""docs/troubleshooting.md quotes lines that commands really print, and README names every page."""

import re

import pytest

from tests.support.paths import ROOT

PLACES = [path for top in ("hydra_mcore", "tools", "slurm") for path in (ROOT / top).rglob("*.[ps][yh]")]
# parts of a string that Python joins, as one line
CODE = re.sub(r'"\s*\n\s*f?"', "", "\n".join(path.read_text() for path in PLACES))
ROWS = [line.split(" | ")[0] for line in (ROOT / "docs" / "troubleshooting.md").read_text().splitlines()]
LINES = [quoted[1] for row in ROWS if (quoted := re.fullmatch(r"\| `(.+)`", row))]


def test_lines_are_found() -> None:
    assert len(LINES) > 30


@pytest.mark.parametrize("line", LINES)
def test_every_quoted_line_is_in_the_code(line: str) -> None:
    """What stands for names and numbers, as ``...``, is one expression of an f-string."""
    pattern = r"\{[^\n]*?\}".join(re.escape(part) for part in line.split("..."))
    assert re.search(pattern, CODE), line


def test_readme_names_every_page() -> None:
    readme = (ROOT / "README.md").read_text()
    pages = sorted(path.name for path in (ROOT / "docs").glob("*.md"))
    assert [page for page in pages if f"(docs/{page})" not in readme] == []
    assert "(CONTRIBUTING.md)" in readme and "(CITATION.cff)" in readme
