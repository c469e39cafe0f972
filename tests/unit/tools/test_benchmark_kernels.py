# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Flash-linear-attention's kernels as we call them, compiled for GPUs on the CPU: real compilations, a few of them.

All of them take half an hour: ``python tools/benchmark.py kernels``; its table is in docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hydra_mcore.errors import InputError
from tests.support.paths import ROOT
from tools.benchmark import main
from tools.benchmarks import kernels
from tools.benchmarks.kernel_compiler import Compiled, Needs
from tools.benchmarks.kernels import Found, report

needs_fla = pytest.mark.skipif(
    importlib.util.find_spec("fla") is None and not kernels.BESIDE.is_dir(),
    reason="needs flash-linear-attention (make env puts it into .venv/kernels)",
)
CELL = re.compile(r"(\d+) / (\d+\.\d)( / \d+)?$")
FITS, SPILLS = Needs(4, 2, 168, 24_576, 0, 0), Needs(8, 2, 255, 40_960, 176, 0)
MISFITS = {
    "shared memory": Needs(4, 2, 100, 227 * 1024 + 1, 0, 0),
    "registers of a block": Needs(16, 2, 136, 0, 0, 0),
    "tensor memory": Needs(4, 2, 100, 0, 0, 513),
}
# Products that fit, that fit with one pipeline stage alone, and whose operands are larger than shared memory.
TOO_LARGE = """
import sys
import torch, triton
import triton.language as tl
from tools.benchmarks.kernel_compiler import Compiler

@triton.autotune([triton.Config({}, num_stages=n, num_warps=8) for n in (4, 1)], key=[])
@triton.jit
def product(x, SIZE: tl.constexpr, STEPS: tl.constexpr):
    rows, columns = tl.arange(0, SIZE), tl.arange(0, 256)
    total = tl.zeros((SIZE, SIZE), tl.float32)
    for step in range(STEPS):
        a = tl.load(x + step * 256 + rows[:, None] * 4096 + columns[None, :])
        total += tl.dot(a, tl.trans(a))
    tl.store(x + rows[:, None] * 4096 + rows[None, :], total)

compiler = Compiler(90)
for size in (16, 64, 256):
    x = torch.zeros(4096, 4096)
    compiler.compile(str(size), "float32", lambda: product[1,](x, size, 16))
for each in compiler.compiled:
    print(each.caller, each.chosen, each.needs.fits, each.needs.shared)
"""


def table_of(flags: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, Any]]:
    """The command's JSON: kernel -> column -> cell; every cell that says something has the form that notes name."""
    main(["kernels", *flags.split(), "--json", str(folder / "out.json")])
    (table,) = json.loads((folder / "out.json").read_text())["tables"]
    assert table["title"] in capsys.readouterr().out and "0 fit not" in table["notes"]
    rows = {row[0]: dict(zip(table["columns"][1:], row[1:], strict=True)) for row in table["rows"]}
    for row in rows.values():
        (cell,) = list(row.values())[1:]
        registers, shared, _ = CELL.match(cell).groups()
        assert 0 < int(registers) <= 255 and float(shared) <= 227
    return rows


@needs_fla
def test_convolution_and_norm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = table_of("--gpus sm_90 --calls conv norm --head-dims 64 --dtypes bf16", tmp_path, capsys)
    assert {name: row["called by"] for name, row in rows.items()} == {
        "causal_conv1d_fwd_kernel": "conv",
        "causal_conv1d_bwd_kernel": "conv",
        "l2norm_fwd_kernel": "norm",
        "l2norm_bwd_kernel": "norm",
    }


@needs_fla
@pytest.mark.slow
def test_recurrences(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = table_of("--gpus sm_100 --calls gdn kda lightning --head-dims 128 --dtypes bf16 --forward", tmp_path, capsys)
    callers = {name: row["called by"] for name, row in rows.items()}
    assert callers["chunk_gated_delta_rule_fwd_kernel_h_blockdim64"] == "gdn, kda"
    assert {"fused_recurrent_gated_delta_rule_fwd_kernel", "fused_recurrent_kda_fwd_kernel"} < callers.keys()
    assert callers["chunk_fwd_kernel_h"] == "lightning" and callers["chunk_cp_fwd_kernel_h"] == "gdn, kda"


@pytest.mark.slow
def test_a_kernel_that_does_not_fit_is_found(tmp_path: Path) -> None:
    """With a kernel in Triton's language, as the tuner and the GPU would meet it."""
    (tmp_path / "large.py").write_text(TOO_LARGE)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, str(tmp_path / "large.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    small, middle, large = ([line for line in lines if line[0] == size] for size in ("16", "64", "256"))
    tried, misfit, launched = ["False", "True"], ["False", "False"], ["True", "True"]
    assert [line[1:3] for line in small] == [tried, launched]  # fewer stages are not tried where the most fit
    assert [line[1:3] for line in middle] == [misfit, tried, launched]
    assert [line[1:3] for line in large] == [misfit, misfit, ["True", "False"]]
    assert int(middle[-1][3]) <= 227 * 1024 < int(large[-1][3])


@pytest.mark.parametrize("name", MISFITS)
def test_limits(name: str) -> None:
    assert FITS.fits and SPILLS.fits and (FITS.cost, SPILLS.cost) == (0, 176)
    assert not MISFITS[name].fits and MISFITS[name].cost == math.inf


def test_what_counts_is_what_would_be_launched() -> None:
    compiled = [
        Compiled("a", "gdn", "64, bf16", chosen, f"{chosen}", needs)
        for chosen, needs in ((False, MISFITS["shared memory"]), (True, FITS))
    ]
    compiled.append(Compiled("a", "kda", "128, bf16", True, "c", SPILLS))
    found = report([Found("sm_90", compiled, [])], "some versions")
    assert found.rows == [["a", "gdn, kda", "168 / 24.0", "255 / 40.0 / 176"]] and not found.failure
    assert "some versions. 3 binaries, of which 1 were only tried and 1 fit not." in found.notes
    compiled.append(Compiled("b", "kda", "128, bf16", True, "d", MISFITS["shared memory"]))
    found = report([Found("sm_90", compiled, []), Found("sm_100", [], ["sm_100: gdn, ...: no"])], "")
    assert found.rows[1][:3] == ["b", "kda", "-"]
    assert found.failure == "sm_90: b fits not; sm_100: gdn, ...: no" and found.more[0].rows == []


def test_without_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(kernels, "BESIDE", tmp_path)
    monkeypatch.setitem(sys.modules, "fla", None)
    before = list(sys.path), dict(os.environ)
    with pytest.raises(InputError, match="no flash-linear-attention: make env"):
        kernels.run(argparse.Namespace(gpus=["sm_90"]))
    assert before == (sys.path, dict(os.environ))
