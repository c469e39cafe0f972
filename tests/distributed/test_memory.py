# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The memory formula against whole stages that run: weights, gradients, optimizer, teacher, activations and loss of
every rank.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from hydra_mcore.config import ModelCard, ModelShape
from hydra_mcore.costs.activations import Run
from hydra_mcore.costs.training_memory import rank_memory
from hydra_mcore.heads import HeadMap, HeadsByKind
from hydra_mcore.train.arguments import model_flags, recipe_flags
from tests.support.launch import run_ranks
from tests.support.stages import make_run
from tools.tracked_memory import tracked_peak

SHAPE = ModelShape(
    num_layers=4, hidden_size=96, num_heads=8, num_kv_groups=4, head_dim=16, ffn_hidden_size=160, vocab_size=512,
    native_length=256
)  # fmt: skip
# One FA head or two of different groups; ranks of TP 2 hold different numbers.
HEAD_MAP = HeadMap(
    8,
    4,
    (
        HeadsByKind(fa=[2], gdn=[0, 1], kda=[3, 4], lightning=[5, 6, 7]),
        HeadsByKind(fa=[0, 5], kda=[1, 2, 3, 4, 6, 7]),
        HeadsByKind(fa=[2], lightning=[0, 1, 3, 4, 5, 6, 7]),
        HeadsByKind(fa=[0, 5], gdn=[1, 2, 3, 4, 6, 7]),
    ),
)
FLAGS = [
    "--tokenizer-type", "NullTokenizer", "--split", "100,0,0", "--seq-length", "256", "--micro-batch-size", "1",
    "--global-batch-size", "4",
    "--train-iters", "3", "--lr-warmup-iters", "1", "--save-interval", "1000", "--no-save-rng",
]  # fmt: skip
TP, PP = ["--tensor-model-parallel-size", "2"], ["--pipeline-model-parallel-size", "2"]
CORE = ["--recompute-granularity", "selective", "--recompute-modules", "core_attn"]
FULL = ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"]
CASES = [
    ("align", 1, []),
    ("align", 2, [*TP, "--sequence-parallel", "--bf16"]),
    ("align", 2, [*PP, "--bf16"]),
    ("align", 1, [*CORE, "--bf16"]),
    ("distill", 2, []),
    ("distill", 2, [*TP, "--bf16"]),
    ("distill", 1, [*CORE, "--bf16"]),
    ("extend", 2, PP),
    ("extend", 1, [*CORE, "mlp"]),
    ("extend", 1, [*FULL, "--bf16"]),
    ("extend", 2, [*TP, "--sequence-parallel", *FULL]),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("memory"), HEAD_MAP, shape=SHAPE)


@pytest.mark.parametrize(
    ("stage", "ranks", "flags"), CASES, ids=lambda x: " ".join(x) if isinstance(x, list) else str(x)
)
def test_a_stage_needs_what_is_said(run: Path, tmp_path: Path, stage: str, ranks: int, flags: list[str]) -> None:
    argv = [
        "--stage",
        stage,
        "--run-dir",
        str(tmp_path),
        "--teacher",
        str(run / "teacher"),
        "--start-from",
        str(run / "student"),
    ]
    argv += ["--data-path", str(run / "data"), "--data-cache-path", str(run / "cache"), *FLAGS, *flags]
    card = ModelCard.load(run / "student")
    parser, given, _ = recipe_flags(argv, with_gpu=False)
    known, _ = model_flags(parser, given, argv, card, ranks)
    planned = Run.from_flags(known, ranks, fused=False)
    for rank, measured in enumerate(run_ranks(_train, ranks, argv, timeout=140)):
        pp_rank = rank // (ranks // planned.pp_size)
        expected = rank_memory(card, planned, pp_rank, rank % planned.tp_size)
        standing = expected.weights + expected.gradients + expected.optimizer + expected.teacher
        assert measured[0] == pytest.approx(standing, rel=0.1)
        assert measured[1] == pytest.approx(expected.total, rel=0.1)


def _train(rank: int, argv: list[str]) -> tuple[int, int]:
    """Bytes of all tensors before the second step, and at the fullest moment from then on."""
    from megatron.training import training

    from hydra_mcore.train.__main__ import main

    found: list[tuple[int, int]] = []
    stock = training.train_step
    with tracked_peak() as memory:

        def measured_step(*args: object, **keywords: object) -> object:
            standing = memory.peak_bytes = memory.live_bytes
            result = stock(*args, **keywords)
            found.append((standing, memory.peak_bytes))
            return result

        training.train_step = measured_step
        main(argv)
    return found[1][0], max(peak for _, peak in found[1:])
