# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The proof that compat/ suffices: stock Megatron trains, saves and resumes exactly on machines without a GPU."""

from pathlib import Path
from typing import Any

import pytest

from tests.support import engine
from tests.support.launch import run_ranks

STEPS, SAVED_AT = 5, 2


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return engine.write_dataset(tmp_path_factory.mktemp("data") / "counting")


def _train_the_head_only(chunks: list[Any]) -> list[Any]:
    """Leave the first pipeline stage, which is rank 0, without any trainable parameter."""
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            parameter.requires_grad_(name.startswith(("output_layer", "decoder.final_layernorm")))
    return chunks


CASES = {
    "dp2": ([], None),
    "dp2-reshardable": (["--dist-ckpt-optim-fully-reshardable"], None),
    "tp2": (["--tensor-model-parallel-size", "2"], None),
    "pp2-rank-0-frozen": (
        ["--pipeline-model-parallel-size", "2", "--untie-embeddings-and-output-weights",
         "--dist-ckpt-optim-fully-reshardable"],
        _train_the_head_only,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_equals_an_uninterrupted_one(case: str, data: Path, tmp_path: Path) -> None:
    flags, hook = CASES[case]

    def worker(_rank: int, *more: str) -> list[float]:
        common = ["--data-path", str(data), "--data-cache-path", str(tmp_path / "cache"), "--train-iters", str(STEPS)]
        return engine.train([*common, *flags, *more], hook)

    checkpoints = ["--save", str(tmp_path / "ckpt"), "--save-interval", str(SAVED_AT)]
    whole = run_ranks(worker, 2, *checkpoints)
    resumed = run_ranks(worker, 2, "--load", str(tmp_path / "ckpt"), "--ckpt-step", str(SAVED_AT))

    has_loss = [rank for rank in range(2) if whole[rank]]
    assert has_loss == ([1] if "pp2" in case else [0, 1])
    for rank in has_loss:
        per_step = len(whole[rank]) // STEPS
        assert len(whole[rank]) == STEPS * per_step > 0
        assert resumed[rank] == whole[rank][SAVED_AT * per_step :]
        assert whole[rank][-1] < whole[rank][0]
