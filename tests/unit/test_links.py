# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""What pages point at is there: their links, and the files of the repository that they name."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.support.paths import ROOT

TRACKED = set(subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split())
PAGES = sorted(path for path in TRACKED if path.endswith(".md"))
FOLDERS = {str(parent) for path in TRACKED for parent in Path(path).parents}
NAMED = re.compile(r"`((?:examples|docs|tools|tests|slurm|serving|hydra_mcore)/[\w./-]*\.(?:yaml|py|sh|md|csv|png))`")

pytestmark = pytest.mark.skipif(not TRACKED, reason="no git repository: which files belong to it is not known")


@pytest.mark.parametrize("page", PAGES)
def test_links_and_named_files_are_there(page: str) -> None:
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.DOTALL)
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    found = [(ROOT / page).parent.joinpath(link).resolve().relative_to(ROOT).as_posix() for link in links if link]
    # a changelog also names what was removed; NAME stands for any
    named = [] if page == "CHANGELOG.md" else [path for path in NAMED.findall(text) if "NAME" not in path]
    missing = [path for path in (*found, *named) if path not in TRACKED | FOLDERS]
    assert not missing


@pytest.mark.parametrize("page", PAGES)
def test_links_to_headings_are_there(page: str) -> None:
    for target, heading in re.findall(r"\]\(([^)\s#:]*)#([^)\s]+)\)", (ROOT / page).read_text()):
        headings = re.findall(
            r"^#+ +(.+)$", ((ROOT / page).parent / target if target else ROOT / page).read_text(), re.M
        )
        anchors = {re.sub(r"[^\w -]", "", re.sub(r"[`*]", "", line).lower()).replace(" ", "-") for line in headings}
        assert heading in anchors, (target, heading, sorted(anchors))
