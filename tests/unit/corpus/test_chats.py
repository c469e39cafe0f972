# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Chats are text once they are written in the tokenizer's template, as docs/data.md does it; else they are refused."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hydra_mcore.corpus.sources import FileSource
from tests.support.paths import ROOT, TINY_TEACHER

TEMPLATE = "{% for turn in messages %}<{{ turn.role }}>{{ turn.content }}\n{% endfor %}"
CHAT = [{"role": "user", "content": "Where is the key?"}, {"role": "assistant", "content": "In the river."}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": CHAT}) + "\n")
    return tmp_path


def test_the_documented_lines_write_chats_as_text(folder: Path) -> None:
    shutil.copytree(TINY_TEACHER, folder / "models" / "Qwen3-1.7B")
    (folder / "models" / "Qwen3-1.7B" / "chat_template.jinja").write_text(TEMPLATE)
    (code,) = re.findall(r"```python\n(import json, sys\n.*?)```", (ROOT / "docs" / "data.md").read_text(), re.DOTALL)
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    (folder / "text.jsonl").write_text(done.stdout)
    ((document, _),) = FileSource([str(folder / "text.jsonl")], "text").documents(None)
    assert document.text.strip() == "<user>Where is the key?\n<assistant>In the river." and not document.fault


def test_messages_are_no_text(folder: Path) -> None:
    ((document, _),) = FileSource([str(folder / "chats.jsonl")], "messages").documents(None)
    assert document.fault == "a list under 'messages'; write chats as text first (docs/data.md)"
