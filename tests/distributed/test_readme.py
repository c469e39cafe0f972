# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The README's "Use it on a model of yours", pasted from an empty folder: bash runs its lines as they stand.

What differs is in ``OTHERS``: the model, the text and the sizes are tiny, and torchrun starts two ranks and not one for
each GPU. The two lines that clone and install are left out; the folder holds links to this checkout instead.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hydra_mcore.config import ModelCard
from tests.support.paths import ROOT, TINY_TEACHER

SECTION = re.search(r"(?ms)^## Use it on a model of yours\n(.*?)^## ", (ROOT / "README.md").read_text())[1]
ENVIRONMENT = "git clone <this repository> hydra_mcore && cd hydra_mcore\nmake env && source .venv/bin/activate\n"
OTHERS = {
    r"(doctor.py .*)": r"\1 --limit 200",  # a machine that runs tests is slow
    r"MODEL=\S+": f"MODEL={TINY_TEACHER}",
    r"  dataset: .*\n  dataset-config: .*# +(input: )/data/texts .*\n": r"  \1texts\n",  # what the comment says
    r"(tokens:) 1.3e9": r"\1 1e5",
    r"(held-out:) 1000": r"\1 10",
    r"(align|distill)(: \{seq-length: )2048, train-iters: \d+": r"\1\g<2>64, train-iters: 3",
    r"(extend: \{seq-length: )16384, train-iters: \d+": r"\g<1>128, train-iters: 3",
    r"(run-dir: .*\n)": r"\1global-batch-size: 8\nlr-warmup-iters: 1\n",
    r"(  ratio: .*\n)": r"\1  pairs: 2\n  length: 128\n",
    r"(lengths:) \[.*\]\n": r"\1 [128, 1024]\n  prompts: 2\n",
    r"--nproc-per-node gpu": "--nproc-per-node 2",
}


def script() -> str:
    """The section's lines for bash, with what ``OTHERS`` says; every one of its patterns is there."""
    text = "".join(re.findall(r"(?ms)^```bash\n(.*?)^```$", SECTION))
    assert text.startswith(ENVIRONMENT)
    text = text.removeprefix(ENVIRONMENT)
    for pattern, other in OTHERS.items():
        text, found = re.subn(pattern, other, text)
        assert found, pattern
    return text


@pytest.mark.slow
@pytest.mark.timeout(1500)  # a dozen commands, each of which imports torch
def test_the_readme_can_be_pasted_line_by_line(tmp_path: Path) -> None:
    for name in ("tools", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "texts").mkdir()
    for page in (ROOT / "docs").glob("*.md"):
        (tmp_path / "texts" / f"{page.stem}.txt").write_text(page.read_text())
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-exc", script()],
        cwd=tmp_path,
        env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=1450,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert " 0 failed" in done.stdout
    run_dir = tmp_path / "runs" / "a"
    assert [ModelCard.load(run_dir / stage).stage for stage in ("align", "distill", "extend")] == [
        *("align", "distill", "extend"),
    ]
    assert "| student | 8 of 32 |" in (run_dir / "evaluation" / "report.md").read_text()
    assert "| distill | 1,536 | 64 |" in (run_dir / "hf" / "README.md").read_text()
