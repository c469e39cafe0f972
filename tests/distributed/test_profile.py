# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""--profile on whole stages: what is slow stands in its own part and pass, the parts add up, training is the same."""

import argparse
import functools
import gzip
import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hydra_mcore.train.profile_table import PARTS, PASSES
from tests.support.launch import model_parallel, run_ranks
from tests.support.stages import FLAGS, logged, make_run

FORWARD, BACKWARD = 0.004, 0.008  # seconds that a planted operation sleeps
STEPS = ("--train-iters", "3", "--lr-warmup-iters", "1", "--profile-step-start", "1", "--profile-step-end", "2")
STEPS += ("--global-batch-size", "4")
MICRO_BATCHES = 2  # of a step, 2 rows each


class Slow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        time.sleep(FORWARD)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        time.sleep(BACKWARD)
        return gradient


def slowed(call: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The function, its result through a slow operation."""

    @functools.wraps(call)
    def slow(*args: Any, **keywords: Any) -> Any:
        result = call(*args, **keywords)
        return (Slow.apply(result[0]), *result[1:]) if isinstance(result, tuple) else Slow.apply(result)

    return slow


def plant(*places: tuple[Any, str]) -> None:
    for owner, name in places:
        setattr(owner, name, slowed(getattr(owner, name)))


def train(rank: int, argv: list[str]) -> None:
    """A stage with a slow short convolution, delta rule and align loss; the second rank is behind at every MLP."""
    from megatron.core.transformer.mlp import MLP

    from hydra_mcore.model import gdn_heads
    from hydra_mcore.train import align
    from hydra_mcore.train.__main__ import main

    plant(
        (gdn_heads.ShortConv, "forward"),
        (gdn_heads, "gated_delta_rule"),
        (align, "align_loss"),
        *[(MLP, "forward")] * 3 * rank,
    )
    align.GradientAtOnce.forward = staticmethod(slowed(align.GradientAtOnce.forward))
    main(argv)


def run(folder: Path, stage: str, ranks: int, name: str, *flags: str) -> Path:
    """Train a stage; returns its folder."""
    argv = ["--stage", stage, "--run-dir", str(folder / name), "--teacher", str(folder / "teacher")]
    argv += ["--start-from", str(folder / "student"), "--data-path", str(folder / "data")]
    run_ranks(train, ranks, [*argv, "--data-cache-path", str(folder / "cache"), *FLAGS, *STEPS, *flags], timeout=140)
    return folder / name / stage


def parts(stage: Path, rank: int = 0) -> dict[str, dict[str, float]]:
    """Seconds a step by part and pass, once they are seen to add up to the steps' time."""
    table = json.loads((stage / "profile" / f"parts-rank{rank}.json").read_text())
    assert (table["device"], table["steps"]) == ("cpu", 1) and list(table["parts"]) == list(PARTS)
    assert all(list(passes) == list(PASSES) for passes in table["parts"].values())
    assert sum(sum(passes.values()) for passes in table["parts"].values()) == pytest.approx(
        table["wall_seconds"], rel=1e-6
    )
    return table["parts"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("profile"))


def test_align_is_profiled_and_trains_alike(folder: Path) -> None:
    """Its gradients are taken in the middle of the teacher's forward pass."""
    plain, profiled = run(folder, "align", 1, "plain"), run(folder, "align", 1, "profiled", "--profile")
    assert not (plain / "profile").exists()
    names = ("align loss", "align loss/layer 02", "grad-norm")
    expected, found = (logged(stage / "tensorboard") for stage in (plain, profiled))
    assert all(found[name] == expected[name] and len(found[name]) == 3 for name in names)
    seconds = parts(profiled)
    for part, layers in {"conv": 3, "GDN delta rule": 3, "loss": 4}.items():
        assert seconds[part]["forward"] >= layers * MICRO_BATCHES * FORWARD
        assert seconds[part]["backward"] >= layers * MICRO_BATCHES * BACKWARD
        assert seconds[part]["teacher"] == seconds[part]["recomputed"] == 0
    assert seconds["rest of the model"]["forward"] >= 4 * MICRO_BATCHES * FORWARD, "the student's, inside the teacher"
    assert seconds["MLP"]["teacher"] > 0 == seconds["MLP"]["forward"] == seconds["MLP"]["backward"]
    for part in ("projections", "fusion", "FA attention", "FA rest", "GDN rest"):
        assert seconds[part]["forward"] > 0 < seconds[part]["backward"], part
    events = json.loads(gzip.decompress((profiled / "profile" / "trace-rank0.json.gz").read_bytes()))["traceEvents"]
    names = {event["name"] for event in events if event.get("cat") == "user_annotation"}
    assert {
        "step: 2",
        "part: conv",
        "part: GDN delta rule",
        "teacher: MLP",
        "part: optimizer",
        "backward pass",
    } <= names
    assert not {"step: 1", "step: 3"} & names
    assert (
        (profiled / "profile" / "parts-rank0.md")
        .read_text()
        .startswith("Milliseconds of CPU time a step, over 1 steps of")
    )


@pytest.mark.slow
def test_distill_on_two_ranks_with_recompute(folder: Path) -> None:
    """The teacher's time is told apart, ranks wait for each other, the delta rule runs again in backward."""
    layout = ("--tensor-model-parallel-size", "2", "--sequence-parallel", "--recompute-granularity", "selective")
    stage = run(folder, "distill", 2, "two", "--profile", "--profile-ranks", "0", "1", *layout)
    for rank in range(2):
        seconds = parts(stage, rank)
        for of_pass in ("teacher", "forward", "backward"):
            assert seconds["communication"][of_pass] > 0 < seconds["MLP"][of_pass]
        rule, calls = seconds["GDN delta rule"], 3 * MICRO_BATCHES
        assert min(rule["forward"], rule["recomputed"]) >= calls * FORWARD and rule["backward"] >= calls * BACKWARD
        assert seconds["conv"]["recomputed"] == 0 < calls * FORWARD <= seconds["conv"]["forward"]
        assert rule["teacher"] == rule["outside"] == 0 < seconds["loss"]["forward"]
    waits, calls = parts(stage)["communication"], 4 * MICRO_BATCHES
    assert min(waits["teacher"], waits["forward"]) >= calls * FORWARD and waits["backward"] >= calls * BACKWARD, (
        "a third of it"
    )


def test_one_call_of_a_layer(folder: Path) -> None:
    run_ranks(_profile_layer, 1, folder / "student")


def _profile_layer(rank: int, checkpoint: Path) -> None:
    from hydra_mcore.model.build import load_model
    from hydra_mcore.model.hydra_attention import HydraAttention
    from hydra_mcore.train.profile import profiled

    with model_parallel():
        _, model = load_model(checkpoint)
        layer = model.decoder.layers[1].self_attention
        layer.fusion.forward = slowed(layer.fusion.forward)
        stock = layer.fusion.forward
        x_sbm = torch.randn(24, 1, 32, requires_grad=True)
        rotary = torch.zeros(24, 1, 1, 8)
        table = profiled(lambda: layer(x_sbm, rotary_pos_emb=rotary)[0].sum().backward(), [layer])
    assert isinstance(layer, HydraAttention) and layer.fusion.forward is stock and "forward" not in vars(layer)
    assert table.total == pytest.approx(table.wall_seconds) and table.steps == 1
    assert table.of("fusion", "forward") >= FORWARD and table.of("fusion", "backward") >= BACKWARD
    assert table.of("projections", "backward") > 0 == table.of("projections", "teacher", "recomputed", "outside")


def test_a_window_that_cannot_be_is_refused(folder: Path) -> None:
    from hydra_mcore.config import ConfigError
    from hydra_mcore.train.arguments import resolve

    argv = [
        "--stage",
        "extend",
        "--run-dir",
        str(folder / "no"),
        "--start-from",
        str(folder / "student"),
        *FLAGS,
        *STEPS,
    ]
    assert resolve([*argv, "--profile"]).options.stage == "extend"
    with pytest.raises(ConfigError, match="profile-step-start 1 to profile-step-end 4 is no window of the 3 steps"):
        resolve([*argv, "--profile", "--profile-step-end", "4"])


@pytest.fixture
def steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    """Flags that ask for steps 2 and 3; a training loop whose steps return their number and fail at the third."""
    from megatron.training import training

    def train_step(*_: Any, iteration: int) -> int:
        assert iteration != 2
        return iteration

    monkeypatch.setattr(training, "train_step", train_step)
    return argparse.Namespace(
        profile=True, profile_ranks=[0], rank=0, profile_step_start=1, profile_step_end=3, save=tmp_path, iteration=0
    )  # fmt: skip


def test_a_run_that_starts_behind_the_window_says_so(
    steps: argparse.Namespace, capsys: pytest.CaptureFixture[str]
) -> None:
    from megatron.training import training

    from hydra_mcore.train.profile import profiled_steps

    steps.iteration = 5
    with profiled_steps(steps, None):
        assert not steps.profile, "Megatron's own profiler would start"
        assert [training.train_step(None, None, [], None, iteration=iteration) for iteration in (5, 6)] == [5, 6]
    assert capsys.readouterr().out == " nothing is profiled: step 2 was before this start of the run\n"
    assert not list(steps.save.iterdir())


def test_an_error_leaves_no_range_and_no_half_profile(steps: argparse.Namespace) -> None:
    from megatron.training import training

    from hydra_mcore.train.profile import profiled_steps

    stock, wait = training.train_step, torch.distributed.Work.wait
    step, optimizer = SimpleNamespace(fetch=print, teachers={}), SimpleNamespace(step=print)
    with pytest.raises(AssertionError), profiled_steps(steps, step):
        for iteration in range(3):
            assert training.train_step(None, None, [], optimizer, iteration=iteration) == iteration
            assert (optimizer.step is print) == (iteration == 0)
    assert (
        training.train_step is stock and torch.distributed.Work.wait is wait and optimizer.step is step.fetch is print
    )
    assert not list(steps.save.iterdir())


def test_under_nsys_the_flag_is_megatrons(steps: argparse.Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.training import training

    from hydra_mcore.train.profile import profiled_steps

    monkeypatch.setenv("NSYS_PROFILING_SESSION_ID", "1")
    stock = training.train_step
    with profiled_steps(steps, None):
        assert steps.profile and training.train_step is stock
