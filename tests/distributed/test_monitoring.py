# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""What is watched while training is the same on every layout, changes nothing, and stops all ranks together."""

import contextlib
import io
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from hydra_mcore.config import HydraOptions, ModelCard
from hydra_mcore.costs.flops import step_flops
from hydra_mcore.kinds import KINDS
from tests.support.launch import model_parallel, run_ranks
from tests.support.stages import FLAGS, HEAD_MAP, SHAPE, logged, make_run, run_stage, write_data

LAYOUTS = {
    "tp2-pp2-queries": (4, "--tensor-model-parallel-size", "2", "--sequence-parallel",
        "--pipeline-model-parallel-size", "2",
                        "--fa-balance", "queries", "--micro-batch-size", "1"),
    "cp2-dp2-recompute": (4, "--context-parallel-size", "2", "--recompute-granularity", "full", "--recompute-method",
        "uniform",
                          "--recompute-num-layers", "1", "--micro-batch-size", "1", "--overlap-grad-reduce",
                          "--overlap-param-gather"),
    "tp2-heads": (2, "--tensor-model-parallel-size", "2"),
    "pp2-virtual": (2, "--pipeline-model-parallel-size", "2", "--num-layers-per-virtual-pipeline-stage", "1"),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("monitoring"))


def heads(stage: Path) -> dict[str, dict[str, list]]:
    return {path.stem: json.loads(path.read_text()) for path in sorted((stage / "heads").glob("*.json"))}


def cases(layouts: dict[str, tuple], slow: set[str]) -> list:
    return [pytest.param(name, marks=[pytest.mark.slow] if name in slow else []) for name in layouts]


@pytest.mark.parametrize("name", cases(LAYOUTS, slow={"tp2-heads", "pp2-virtual"}))
def test_statistics_of_every_head_on_every_layout(folder: Path, name: str) -> None:
    steps = ("--train-iters", "2", "--lr-warmup-iters", "1", "--head-statistics-interval", "2")
    stage = "align" if name == "tp2-pp2-queries" else "distill"
    if not (folder / f"one-{stage}").exists():
        run_stage(folder, stage, 1, *steps, run=f"one-{stage}")
    ranks, *flags = LAYOUTS[name]
    run_stage(folder, stage, ranks, *steps, *flags, run=name)
    expected, found = heads(folder / f"one-{stage}" / stage), heads(folder / name / stage)
    assert list(expected) == list(found) == ["step_0000001", "step_0000002"]
    for step, by_name in expected.items():
        assert list(by_name) == ["gate", "scale", "rms", "half-life", "write gate"]
        for statistic, values in by_name.items():
            there, here = (np.array(v, dtype=float) for v in (values, found[step][statistic]))
            np.testing.assert_allclose(here, there, rtol=2e-5, err_msg=f"{step} {statistic}")
    gated = ~np.isnan(np.array(expected["step_0000001"]["gate"], dtype=float))
    kinds = [name for name, kind in KINDS.items() if kind.gate(HydraOptions()) != "none"]
    assert gated.sum() == sum(len(HEAD_MAP.heads_of(name)) for name in kinds)
    assert (folder / name / stage / "heads" / "step_0000002.png").is_file()


@pytest.fixture(scope="module")
def needle_run(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``student``: the tiny example's teacher, which finds needles, with so much noise that it misses some; and
    data.
    """
    folder = tmp_path_factory.mktemp("needles")
    run_ranks(_with_noise, 1, tiny_teacher, folder / "student")
    shutil.copytree(tiny_teacher / "tokenizer", folder / "student" / "tokenizer")
    write_data(folder / "data", ModelCard.load(tiny_teacher).shape.vocab_size)
    return folder


def _with_noise(rank: int, teacher: Path, student: Path) -> None:
    from hydra_mcore.model.build import load_model
    from hydra_mcore.model.checkpoints import save_weights

    with model_parallel():
        card, model = load_model(teacher)
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(NOISE * torch.randn(parameter.shape, generator=generator))
        save_weights([model], card, student)


NOISE = 0.07
NEEDLES = (
    "--needle-interval",
    "1",
    "--needle-length",
    "127",  # divides by no layout
    "--needle-prompts",
    "12",
    "--train-iters",
    "2",
    "--lr-warmup-iters",
    "1",
    "--micro-batch-size",
    "1",
)
ON_LAYOUTS = {
    "one": (1,),
    "tp2-cp2": (4, "--tensor-model-parallel-size", "2", "--sequence-parallel", "--context-parallel-size", "2"),
    "pp2-dp2": (4, "--pipeline-model-parallel-size", "2", "--overlap-grad-reduce", "--overlap-param-gather"),
    "virtual": (2, "--pipeline-model-parallel-size", "2", "--num-layers-per-virtual-pipeline-stage", "1"),
}


@pytest.mark.parametrize("name", cases(ON_LAYOUTS, slow={"one"}))
def test_needle_accuracy_is_that_of_evaluation(needle_run: Path, name: str) -> None:
    ranks, *flags = ON_LAYOUTS[name]
    (expected,) = run_ranks(_evaluated, 1, needle_run / "student")
    assert all(0 < accuracy < 1 for accuracy in expected.values()), "a test that a constant would pass"
    frozen = ("--lr", "0", "--min-lr", "0", "--clip-grad", "0")
    found = run_stage(
        needle_run, "extend", ranks, *NEEDLES, *frozen, *flags, run=name, start_from=needle_run / "student"
    )
    for panel, accuracy in expected.items():
        assert found[f"needles/{panel}"] == pytest.approx({1: accuracy, 2: accuracy}, abs=1e-6)


def _evaluated(rank: int, checkpoint: Path) -> dict[str, float]:
    """The same prompts by evaluation, on one process."""
    from argparse import Namespace

    from hydra_mcore.evaluation.loading import describe, open_model
    from hydra_mcore.evaluation.scoring import score_prompts
    from hydra_mcore.train.needle_panels import make_panels

    facts = describe(checkpoint)
    panels = make_panels(
        Namespace(needle_interval=1, needle_length=127, needle_prompts=12), checkpoint, facts.vocab_size
    )
    with model_parallel():
        model = open_model(facts, torch.float32)
        scores = {
            panel: score_prompts(model, asked.prompts, panels.tokenizer, by_generation=False)
            for panel, asked in panels.sets.items()
        }
        return {panel: np.mean([score for batch in batches for score in batch]) for panel, batches in scores.items()}


def test_the_probe_changes_nothing(needle_run: Path) -> None:
    flags = (
        "--train-iters",
        "4",
        "--micro-batch-size",
        "1",
        "--lr-warmup-iters",
        "1",
        "--lr",
        "1e-3",
        "--hidden-dropout",
        "0.1",
    )
    flags += ("--tensor-model-parallel-size", "2")
    without = run_stage(
        needle_run,
        "extend",
        2,
        *flags,
        "--head-statistics-interval",
        "0",
        run="without",
        start_from=needle_run / "student",
    )
    probed = run_stage(
        needle_run,
        "extend",
        2,
        *NEEDLES,
        *flags,
        "--head-statistics-interval",
        "1",
        run="probed",
        start_from=needle_run / "student",
    )
    assert set(probed["needles/needle single-key"]) == {1, 2, 3, 4} and not any("needle" in name for name in without)
    for name in ("extend loss", "grad-norm"):
        assert probed[name] == without[name]
        assert len(set(probed[name].values())) == 4


def test_speed_counts_our_own_operations(folder: Path) -> None:
    """In the panels, in the line of the console, and in Megatron's own panel and file."""
    argv = ["--stage", "distill", "--run-dir", str(folder / "speed"), "--teacher", str(folder / "teacher")]
    argv += ["--start-from", str(folder / "student"), "--data-path", str(folder / "data"), *FLAGS, "--train-iters", "3"]
    argv += ["--log-throughput", "--log-timers-to-tensorboard", "--log-progress", "--save-interval", "3"]
    output = run_ranks(_said, 2, argv, timeout=140)[-1]
    found = logged(folder / "speed" / "distill" / "tensorboard")
    lines = re.findall(r" iteration +(\d+)/.* tokens per second: ([\d.]+) \|$", output, re.MULTILINE)
    assert [int(step) for step, _ in lines] == [1, 2, 3]
    for step, tokens in lines:
        assert float(tokens) == pytest.approx(found["speed/tokens per second"][int(step)], rel=1e-3)
    card = ModelCard.load(folder / "speed" / "distill")
    flops = step_flops(card, "distill", 32, 8)
    for step, seconds in found["speed/seconds per step"].items():
        assert found["speed/tokens per second"][step] == pytest.approx(32 * 8 / seconds, rel=1e-5)
        assert found["speed/TFLOPs per second and GPU"][step] == pytest.approx(flops / seconds / 2 / 1e12, rel=1e-5)
        assert found["throughput"][step] * found["iteration-time"][step] == pytest.approx(flops / 2 / 1e12, rel=1e-5)
        assert 0 < found["speed/seconds per step waiting for data"][step] < seconds
        assert 0.1 < found["memory/host peak GiB"][step] < 10
    progress = (folder / "speed" / "distill" / "progress.txt").read_text()
    assert f"Floating-point operations: {3 * flops:.2e}\t" in progress


def _said(rank: int, argv: list[str]) -> str:
    from hydra_mcore.train.__main__ import main

    with contextlib.redirect_stdout(io.StringIO()) as output:
        main(argv)
    return output.getvalue()


BAD = ("--save-interval", "1", "--train-iters", "4", "--head-statistics-interval", "0")


@pytest.mark.parametrize(
    ("stage", "what"), [("distill", "the distill loss"), ("align", "the align loss of layer 2"), ("extend", "gradient")]
)
def test_all_ranks_stop_when_one_meets_a_bad_value(folder: Path, stage: str, what: str) -> None:
    """With data parallelism one rank sees it; the first says it, and none is left waiting."""
    run = folder / f"bad-{stage}"
    argv = [
        "--stage",
        stage,
        "--run-dir",
        str(run),
        "--teacher",
        str(folder / "teacher"),
        "--start-from",
        str(folder / "student"),
    ]
    argv += ["--data-path", str(folder / "data"), *FLAGS, *BAD]
    outcomes = run_ranks(_bad_on_the_last, 2, argv, stage)
    assert [status for status, _ in outcomes] == [2, 2]
    lines = [[line for line in text.splitlines() if line.startswith("train: ")] for _, text in outcomes]
    assert lines[1] == [] and len(lines[0]) == 1
    assert lines[0][0].startswith("train: step 3: ") and what in lines[0][0] and "is not finite" in lines[0][0]
    assert (run / stage / "latest_checkpointed_iteration.txt").read_text() == "2"


def _bad_on_the_last(rank: int, argv: list[str], stage: str) -> tuple[int, str]:
    from hydra_mcore.train import step
    from hydra_mcore.train.__main__ import main

    calls = []

    def spoil(stock):
        def spoilt(*args, **keywords):
            result = stock(*args, **keywords)
            calls.append(stage)
            if rank == 0 or len(calls) <= 4:  # two micro-batches a step
                return result
            if stage == "align":
                return result[0], torch.where(torch.arange(SHAPE.num_layers) == 2, math.nan, result[1])
            if stage == "distill":
                return result._replace(loss=result.loss * math.nan)
            result.loss.register_hook(lambda gradient: gradient * math.inf)
            return result

        return spoilt

    name = "align_forward" if stage == "align" else "token_loss"
    setattr(step, name, spoil(getattr(step, name)))
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        try:
            main(argv)
        except SystemExit as stop:
            return stop.code, stderr.getvalue()
    return 0, stderr.getvalue()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--needle-length", "8"), "needle prompts of 8 tokens"),
        (("--needle-prompts", "0"), "needle_prompts is 0"),
        (("--data-timeout", "0"), "data_timeout 0.0"),
        (("--head-statistics-interval", "-1"), "head_statistics_interval is -1"),
    ],
)
def test_settings_that_cannot_be(needle_run: Path, flags: tuple[str, ...], message: str) -> None:
    argv = ["--stage", "extend", "--run-dir", str(needle_run / "refused"), "--start-from", str(needle_run / "student")]
    argv += ["--data-path", str(needle_run / "data"), *FLAGS, "--needle-interval", "1", *flags]
    outcomes = run_ranks(_refused, 1, argv)
    assert outcomes[0][0] == 2 and outcomes[0][1].startswith("train: ") and message in outcomes[0][1]


def test_a_checkpoint_without_tokenizer(folder: Path) -> None:
    argv = ["--stage", "extend", "--run-dir", str(folder / "refused"), "--start-from", str(folder / "student")]
    outcomes = run_ranks(_refused, 1, [*argv, "--data-path", str(folder / "data"), *FLAGS, "--needle-interval", "1"])
    assert outcomes[0][0] == 2 and "no tokenizer beside the checkpoint" in outcomes[0][1]


def _refused(rank: int, argv: list[str]) -> tuple[int, str]:
    from hydra_mcore.train.__main__ import main

    with contextlib.redirect_stderr(io.StringIO()) as stderr, pytest.raises(SystemExit) as stop:
        main(argv)
    return stop.value.code, "\n".join(line for line in stderr.getvalue().splitlines() if line.startswith("train: "))
