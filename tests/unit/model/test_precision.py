# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Which precision "auto" stands for, on processors that this machine may not have."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hydra_mcore.model.precision import DTYPES, chosen_dtype
from hydra_mcore.train.arguments import recipe_flags


@pytest.fixture(params=["avx512_bf16", "amx_bf16", None])
def fast(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """A CPU with one of the features, or with none of them."""
    features = {"avx2": True, "avx512_bf16": False, "amx_bf16": False} | {request.param: True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return request.param is not None


def test_auto_is_bf16_where_the_processor_has_it(fast: bool) -> None:
    assert chosen_dtype("auto") == ("bf16" if fast else "float32")
    assert [DTYPES[chosen_dtype(name)] for name in ("bf16", "float32")] == [torch.bfloat16, torch.float32]


@pytest.mark.parametrize(("words", "bf16"), [([], False), (["--dtype", "auto"], True), (["--bf16"], True)])
def test_training_follows_it_when_asked(fast: bool, words: list[str], bf16: bool) -> None:
    parser, recipe, _ = recipe_flags(["--stage", "align", *words], with_gpu=False)
    found = parser.parse_args([*recipe.to_flags(parser), *words]).bf16
    assert found == (bf16 and (fast or "--bf16" in words))


def test_a_recipe_may_refuse(fast: bool, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("dtype: auto\nbf16: false\n")
    words = ["--stage", "align", "--config", str(tmp_path / "r.yaml")]
    parser, recipe, _ = recipe_flags(words, with_gpu=False)
    assert not parser.parse_args([*recipe.to_flags(parser), *words]).bf16
