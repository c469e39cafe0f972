# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The lines on the console: each the mean of its own interval, also after a resume; steps in which no token counts are
left out.
"""

import contextlib
import io
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.launch import run_ranks
from tests.support.stages import FLAGS, SHAPE, gradients, logged, make_run

pytestmark = pytest.mark.slow  # tests/unit/train/test_resume_settings.py has the quick part
LINE = re.compile(r" iteration +(\d+)/.* extend loss: (\S+) ")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_run(tmp_path_factory.mktemp("console"))
    write_gaps(folder / "gaps", SHAPE.vocab_size)
    return folder


def write_gaps(prefix: Path, vocab_size: int) -> None:
    """Documents of a row each: three of four hold nothing but ends of document, which --eod-mask-loss leaves out of the
    loss.
    """
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder, random = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16), np.random.default_rng(1)
    for number in range(64):
        tokens = random.integers(vocab_size - 1, size=32) if number % 4 == 0 else np.full(32, vocab_size - 1)
        builder.add_document(torch.from_numpy(tokens), [len(tokens)])
    builder.finalize(f"{prefix}.idx")


def said(folder: Path, run: str, *flags: str, stage: str = "extend", ranks: int = 1, data: str = "data") -> str:
    """What the last rank prints."""
    argv = [
        "--stage",
        stage,
        "--run-dir",
        str(folder / run),
        "--start-from",
        str(folder / "student"),
        "--teacher",
        str(folder / "teacher"),
    ]
    argv += [
        "--data-path",
        str(folder / data),
        "--data-cache-path",
        str(folder / "cache"),
        *FLAGS,
        "--micro-batch-size",
        "1",
    ]
    return run_ranks(_said, ranks, [*argv, *flags], timeout=240)[-1]


def _said(rank: int, argv: list[str]) -> str:
    from hydra_mcore.train.__main__ import main

    with contextlib.redirect_stdout(io.StringIO()) as output, contextlib.suppress(SystemExit):
        main(argv)
    return output.getvalue()


@pytest.mark.parametrize("interval", [1, 2, 3])
def test_each_line_is_the_mean_of_its_own_interval(folder: Path, interval: int) -> None:
    flags, run = ("--train-iters", "6", "--log-interval", str(interval), "--save-interval", "3"), f"every-{interval}"
    output = said(folder, run, *flags, "--exit-interval", "3") + said(folder, run, *flags)
    losses = logged(folder / run / "extend" / "tensorboard")["extend loss"]
    begun = {1, 4}
    lines = {int(step): float(value) for step, value in LINE.findall(output)}
    assert lines.keys() == begun | {step for step in range(1, 7) if step % interval == 0}
    for step, value in lines.items():
        start = max(first for first in begun if first <= step)
        since = range(start if step in begun else max(start, step - interval + 1), step + 1)
        assert value == pytest.approx(np.mean([losses[each] for each in since]), rel=1e-5), step


@pytest.mark.parametrize(
    ("stage", "ranks", "flags"),
    [
        ("extend", 1, ()),
        ("distill", 4, ("--context-parallel-size", "2")),
        ("distill", 2, ("--calculate-per-token-loss",)),
        ("extend", 4, ("--context-parallel-size", "2", "--calculate-per-token-loss")),
        ("distill", 4, ("--pipeline-model-parallel-size", "2", "--context-parallel-size", "2")),
        ("align", 2, ("--context-parallel-size", "2")),
    ],
)
def test_steps_in_which_no_token_counts(folder: Path, stage: str, ranks: int, flags: tuple[str, ...]) -> None:
    run, length = (
        f"gaps-{stage}-{ranks}-{len(flags)}",
        ("--seq-length", "32", "--train-iters", "8", "--log-interval", "4"),
    )
    output = said(
        folder, run, *flags, *length, "--global-batch-size", "2", "--eod-mask-loss", "--save-interval", "1",
        "--keep-last", "8",
        stage=stage, ranks=ranks, data="gaps",
    )  # fmt: skip
    found = logged(folder / run / stage / "tensorboard")
    assert all(math.isfinite(value) for values in found.values() for value in values.values())
    assert ": nan" not in output.lower()
    empty = {int(step) for step in re.findall(r" step (\d+): no token counts in it", output)}
    norms = found["grad-norm"]
    assert norms.keys() == set(range(1, 9)) and found[f"{stage} loss"].keys() == norms.keys() - empty
    if stage == "align":  # every token has an attention output to fit
        assert not empty
        return
    assert 0 < len(empty) < 8 and {step for step, norm in norms.items() if norm == 0} == empty
    assert all(
        bool(torch.isfinite(moment).all()) for moment in gradients(folder / run / stage / "iter_0000008").values()
    )
    last = [float(value) for value in re.findall(rf" iteration +8/.* {stage} loss: (\S+) ", output)]
    counted = [found[f"{stage} loss"][step] for step in range(5, 9) if step not in empty]
    assert last == ([pytest.approx(np.mean(counted), rel=1e-5)] if counted else [0])
