# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Importing and exporting hold a shard in memory, never the model: measured on a random one of 2.2 GB."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hydra_mcore.config import ModelShape, teacher_card
from hydra_mcore.convert.families import SHAPE_KEYS
from hydra_mcore.convert.tensor_table import tensor_rules
from tests.support.paths import ROOT

COMMAND = ROOT / "tools" / "convert.py"
SHAPE = ModelShape(
    num_layers=20,
    hidden_size=2048,
    num_heads=16,
    num_kv_groups=8,
    head_dim=128,
    ffn_hidden_size=6144,
    vocab_size=32000,
    native_length=4096,
    tied_embeddings=False,
)


def write_model(hf_dir: Path, layers_per_shard: int) -> None:
    """A random bf16 model, file by file."""
    hf_dir.mkdir()
    rules = tensor_rules(teacher_card(SHAPE, ""))
    weight_map = {}
    for name in rules:
        layer = name.split(".")[2] if ".layers." in name else "0"
        weight_map[name] = f"model-{int(layer) // layers_per_shard:05d}.safetensors"
    for file_name in sorted(set(weight_map.values())):
        names = [name for name in rules if weight_map[name] == file_name]
        save_file({name: torch.randn(rules[name].shape, dtype=torch.bfloat16) for name in names}, hf_dir / file_name)
    (hf_dir / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config = {key: getattr(SHAPE, field) for field, key in SHAPE_KEYS.items()}
    (hf_dir / "config.json").write_text(
        json.dumps({"model_type": "qwen3", "head_dim": 128, "rope_theta": 1e6, **config})
    )


def peak_bytes(*arguments: object) -> int:
    """Peak resident memory of one run of the command, pages of mapped files included."""
    process = subprocess.Popen([sys.executable, str(COMMAND), *map(str, arguments)])
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return usage.ru_maxrss * 1024


@pytest.mark.slow
def test_peak_memory_stays_near_one_shard(tmp_path):
    write_model(tmp_path / "hf", layers_per_shard=4)
    sizes = [path.stat().st_size for path in (tmp_path / "hf").glob("*.safetensors")]
    assert 2e9 < sum(sizes) < 3e9
    bar = 1.5 * max(sizes) + 1e9
    importing = peak_bytes("import", "--hf", tmp_path / "hf", "--out", tmp_path / "checkpoint")
    exporting = peak_bytes(
        "export",
        "--checkpoint",
        tmp_path / "checkpoint",
        "--out",
        tmp_path / "back",
        "--max-shard-size",
        max(sizes) / 1e9,
    )
    largest = max(path.stat().st_size for path in (tmp_path / "back").glob("*.safetensors"))
    print(f"\nmodel {sum(sizes) / 1e9:.2f} GB, largest shard {max(sizes) / 1e9:.2f} GB in, {largest / 1e9:.2f} GB out")
    print(f"peak: import {importing / 1e9:.2f} GB, export {exporting / 1e9:.2f} GB; bar {bar / 1e9:.2f} GB")
    assert max(importing, exporting) < bar
    total = Counter(json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())["weight_map"].values())
    assert len(total) > 3, "an export in one file would prove nothing"
