# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""tools/benchmark.py imitation: its readings are what their columns say, and it runs on a teacher."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hydra_mcore.model.imitation import Memory, Task, delta_rule
from tools.benchmark import main
from tools.benchmarks import imitation
from tools.benchmarks.imitation import kernel_delta_rule, left, mixed_with_last, softmax

ROWS, LENGTH, HEAD, WIDTH = 8, 90, 6, 9
MEMORY = Memory(8.0, 0.5, 8.0)
same = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-11)


@pytest.fixture
def x_bsm() -> Tensor:
    return torch.randn(ROWS, LENGTH, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def qkv(x_bsm: Tensor) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [x_bsm @ torch.randn(WIDTH, HEAD, dtype=torch.float64, generator=generator) for _ in range(3)]


def found(x_bsm: Tensor, qkv: list[Tensor], out_bsd: Tensor) -> dict[str, float]:
    q, k, v = qkv
    return left(Task(F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, out_bsd), q @ k.mT, x_bsm)


def test_the_plain_kernel_is_the_delta_rule(qkv: list[Tensor]) -> None:
    q, k, v = qkv[0], F.normalize(qkv[1], dim=-1), qkv[2]
    same(kernel_delta_rule(MEMORY, q @ k.mT, k @ k.mT, v), delta_rule(MEMORY, q, k, v))


def test_squared_products_are_the_delta_rule_of_all_pairs_of_channels(qkv: list[Tensor]) -> None:
    q, k = (F.normalize(t, dim=-1) for t in qkv[:2])
    pairs_q, pairs_k = (torch.einsum("bsd,bse->bsde", t, t).flatten(2) for t in (q, k))
    kernel = kernel_delta_rule(MEMORY, (q @ k.mT).square(), (k @ k.mT).square(), qkv[2])
    same(kernel, delta_rule(MEMORY, pairs_q, pairs_k, qkv[2]))


def test_weights_of_a_window_and_sinks() -> None:
    weights_bss = softmax(torch.zeros(1, 6, 6, dtype=torch.float64), window=2, sinks=1)
    third = 1 / 3
    same(weights_bss[0, 4], torch.tensor([third, 0, 0, third, third, 0], dtype=torch.float64))
    same(weights_bss[0, 1], torch.tensor([0.5, 0.5, 0, 0, 0, 0], dtype=torch.float64))


def test_mixed_with_the_token_before() -> None:
    x = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    same(mixed_with_last(x, 1.0), torch.tensor([[[1.0, 0.0], [0.5**0.5, 0.5**0.5]]]))


def test_each_way_finds_the_head_that_is_its_own(
    x_bsm: Tensor, qkv: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A head that a way reads exactly is left by it alone."""
    monkeypatch.setattr(imitation, "WINDOW", 8)
    monkeypatch.setattr(imitation, "SINKS", 2)
    q, k, v = qkv
    logits_bss = q @ k.mT / HEAD**0.5
    heads = {
        "window": softmax(logits_bss, 8) @ v,
        "and sinks": softmax(logits_bss, 8, 2) @ v,
        "no sum": torch.exp(logits_bss).tril() @ v,
    }
    for way, out_bsd in heads.items():
        of_ways = found(x_bsm, qkv, out_bsd)
        assert of_ways[way] < 1e-9 < 0.02 < of_ways["values"]
        assert all(of_ways[other] > 1e-3 for other in of_ways if other not in (way, "and GDN"))


def test_a_head_over_squared_products(x_bsm: Tensor, qkv: list[Tensor]) -> None:
    """Nearly: its memory is the one that serves plain products best."""
    q, k = (F.normalize(t, dim=-1) for t in qkv[:2])
    squared_bsd = kernel_delta_rule(MEMORY, (q @ k.mT).square(), (k @ k.mT).square(), qkv[2])
    of_ways = found(x_bsm, qkv, squared_bsd)
    assert of_ways["(q k)^2"] == min(of_ways.values()) and of_ways["values"] > 0.1


def test_a_linear_head_needs_nothing_else(x_bsm: Tensor, qkv: list[Tensor]) -> None:
    q, k, v = qkv
    of_ways = found(x_bsm, qkv, delta_rule(MEMORY, F.normalize(q, dim=-1), F.normalize(k, dim=-1), v))
    assert of_ways["inherited values"] < 1e-9 and of_ways["values of 4"] < 1e-9 and of_ways["and GDN"] < 0.01
    assert of_ways["window"] > 0.02 < of_ways["no sum"]


def command(tiny_teacher: Path, tmp_path: Path, layers: str) -> list[str]:
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 200)
    given = ["imitation", "--teacher", str(tiny_teacher), "--text", str(tmp_path / "text.txt")]
    return [*given, "--length", "64", "--layers", layers, "--json", str(tmp_path / "found.json")]


def test_on_a_teacher(tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(command(tiny_teacher, tmp_path, "1"))
    (table,) = json.loads((tmp_path / "found.json").read_text())["tables"]
    assert [row[0] for row in table["rows"]][:2] == ["layer 1", "mean"]
    of_ways = dict(zip(table["columns"][1:], map(float, table["rows"][0][1:]), strict=True))
    assert all(0 <= share < 1.5 for share in of_ways.values())
    assert of_ways["and sinks"] < 0.005  # rows are as long as the window
    assert of_ways["values"] < of_ways["inherited values"]
    assert "| layer 1 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--layers", "7"], "--layers 7: the model has layers 0 to"),
        (["--length", "513"], "rows have 512 tokens at most"),
    ],
)
def test_bad_input_is_one_line(
    flags: list[str], message: str, tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*command(tiny_teacher, tmp_path, "1"), *flags])
    assert stop.value.code == 2 and message in capsys.readouterr().err
