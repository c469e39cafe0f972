# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The way from import to report and export, each command with flags, on the tiny teacher with a few steps a stage."""

import re
from pathlib import Path

import pytest

from hydra_mcore.config import ModelCard
from tests.support.commands import printed
from tests.support.paths import ROOT, TINY_TEACHER


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("commands")
    (folder / "corpus.txt").write_text("\n".join((ROOT / "hydra_mcore" / "heads.py").read_text() for _ in range(4)))
    _write_data(folder)
    (folder / "recipe.yaml").write_text(
        f"run-dir: {folder}\nteacher: {folder / 'teacher'}\ndata-path: {folder / 'data'}\ndata-cache-path:"
        f" {folder / 'cache'}\nsplit: 100,0,0\nseq-length: 64\nglobal-batch-size: 4\nlr-warmup-iters: 1\ntrain-iters:"
        " 3\nlog-interval: 1\nextend: {seq-length: 128, wandb-project: hydra, wandb-exp-name: commands}\n"
    )
    return folder


def _write_data(folder: Path) -> None:
    import numpy as np
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
    from transformers import AutoTokenizer

    builder = IndexedDatasetBuilder(str(folder / "data.bin"), dtype=np.uint16)
    ids = AutoTokenizer.from_pretrained(TINY_TEACHER).encode((folder / "corpus.txt").read_text())
    builder.add_document(torch.tensor(ids), [len(ids)])
    builder.finalize(str(folder / "data.idx"))


def test_commands_from_import_to_report(run_dir: Path) -> None:
    teacher, heads, student = run_dir / "teacher", run_dir / "heads", run_dir / "student"
    text = str(run_dir / "corpus.txt")
    printed("tools/convert.py", "import", "--hf", str(TINY_TEACHER), "--out", str(teacher))
    select = ("tools/select_heads.py", "--teacher", str(teacher), "--ratio", "3:1", "--pairs", "2", "--length", "128")
    assert "rounds of senders" in printed(*select, "--out", str(heads), "--dry-run")
    printed(*select, "--out", str(heads))
    assert (heads / "figures" / "heads.png").stat().st_size > 10_000
    hybridize = ("tools/convert.py", "hybridize", "--teacher", str(teacher), "--head-map", str(heads / "head_map.json"))
    printed(*hybridize, "--text", text, "--out", str(student))
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    for stage, launcher in (("align", torchrun), ("distill", ()), ("extend", ())):
        train = ("-m", "hydra_mcore.train", "--stage", stage, "--config", str(run_dir / "recipe.yaml"))
        if stage == "align":
            assert f"save     {run_dir / stage}" in printed(*train, "--dry-run")
            assert not (run_dir / stage).exists()
        printed(*launcher, *train)
        card = ModelCard.load(run_dir / stage)
        assert (card.stage, card.head_map.num_fa) == (stage, 8)
    models = (f"teacher={teacher}", f"student={run_dir / 'extend'}")
    options = ("--yarn", "teacher=2", "--lengths", "128", "256", "--prompts", "2", "--text", text)
    table = printed("tools/evaluate.py", "--models", *models, *options, "--out", str(run_dir / "out"))
    assert re.search(r"\| teacher \| 32 of 32 \|.*\n\| teacher \+ YaRN x2 \|.*\n\| student \| 8 of 32 \|", table)
    export = ("tools/convert.py", "export", "--checkpoint", str(run_dir / "extend"), "--out", str(run_dir / "hf"))
    printed(*export, "--evaluation", str(run_dir / "out" / "report.md"))
    assert "| align | 768 | 64 |" in (run_dir / "hf" / "README.md").read_text()
    snippets = [
        re.search(r"```python\n(.*?)```", document.read_text(), re.DOTALL)[1].replace(path, str(run_dir / "hf"))
        + "\nprint(type(model).__name__, len(tokenizer))\n"
        for document, path in ((run_dir / "hf" / "README.md", "PATH"), (ROOT / "docs" / "conversion.md", "runs/a/hf"))
    ]
    said = printed("-c", "".join(snippets))
    assert said.endswith("HydraHeadForCausalLM 1024\n") and "Do you wish" not in said
    assert said.count("HydraHeadForCausalLM 1024\n") == 2


@pytest.mark.slow
def test_benchmarks_print_tables() -> None:
    assert "| 2 | 32768 |" in printed(
        "tools/benchmark.py", "communication", "--fa-heads", "2", "--cp", "2", "4", "--lengths", "32768"
    )
    assert "| 3:1, random scores, global | 4 |" in printed(
        "tools/benchmark.py", "balance", "--tp", "4", "--length", "256"
    )
    assert "all by queries" in printed("tools/benchmark.py", "balance", "--measure", "--length", "16", "--repeats", "1")
    assert "| end-to-end backpropagation" in printed("tools/benchmark.py", "memory", "--lengths", "512", "1024")
    assert "| first step done |" in printed("tools/benchmark.py", "start-up", "--repeats", "1")
    assert "| distill | 32 |" in printed(
        "tools/benchmark.py", "step", "--lengths", "32", "--layers", "1", "--vocabulary", "64"
    )
    small = (
        "--hidden",
        "32",
        "--head-dim",
        "8",
        "--ffn",
        "48",
        "--vocabulary",
        "64",
        "--length",
        "32",
        "--answer",
        "4",
    )
    heads = ("--naive-heads", "12", "--naive-senders", "5")
    table = printed("tools/benchmark.py", "selection", "--models", "3x4", *small, *heads).splitlines()
    receivers, attribution, senders = (line.split(" | ") for line in table if line.startswith("| 3 x 4 |"))
    assert [row[1] for row in (receivers, attribution, senders)] == ["receivers", "attribution", "senders of 1"]
    assert all(float(row[-1].rstrip(" |")) < 1e-4 for row in (receivers, senders))  # both ways give the same scores
