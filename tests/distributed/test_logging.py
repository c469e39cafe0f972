# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""What a run logs: one W&B run over requeues, with every panel; never a reason to stop or wait.

And that it runs in bf16.
"""

import contextlib
import dataclasses
import importlib.util
import io
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

from hydra_mcore.config import HydraOptions, ModelCard
from hydra_mcore.heads import HeadMap
from tests.support.launch import RankError, model_parallel, run_ranks
from tests.support.offline_wandb import read_runs
from tests.support.stages import FLAGS, SHAPE, logged, make_run, run_stage, write_data

WANDB = ("--wandb-project", "hydra")
BY_HEAD = ("fa gate", "fa scale", "gdn scale", "fa rms", "gdn rms", "gdn write gate", "gdn half-life")
SPEED = ("speed/tokens per second", "speed/TFLOPs per second and GPU", "memory/host peak GiB")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("logging"))


@pytest.fixture(scope="module")
def hybrid(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny example's teacher beside a student with a tokenizer, so that needles can be asked for."""
    folder = tmp_path_factory.mktemp("hybrid")
    shutil.copytree(tiny_teacher, folder / "teacher")
    run_ranks(_write_student, 1, folder)
    shutil.copytree(tiny_teacher / "tokenizer", folder / "student" / "tokenizer")
    write_data(folder / "data", ModelCard.load(tiny_teacher).shape.vocab_size)
    return folder


def _write_student(rank: int, folder: Path) -> None:
    from hydra_mcore.model.build import build_model
    from hydra_mcore.model.checkpoints import save_weights

    teacher = ModelCard.load(folder / "teacher")
    shape = teacher.shape
    head_map = HeadMap.from_fa([(0, 1), (1, 0)], shape.num_layers, shape.num_heads, shape.num_kv_groups)
    card = dataclasses.replace(teacher, head_map=head_map, options=HydraOptions(), stage="student")
    with model_parallel():
        save_weights([build_model(card, "align")], card, folder / "student")


def test_one_run_over_three_requeues_and_a_kill(hybrid: Path) -> None:
    """Two requeues at a step, one after a kill that forgets a step which is then done again."""
    flags = (
        *WANDB,
        "--train-iters",
        "8",
        "--exit-interval",
        "2",
        "--save-interval",
        "2",
        "--head-statistics-interval",
        "4",
    )
    flags += ("--needle-interval", "4", "--needle-length", "64", "--needle-prompts", "4")
    run_stage(hybrid, "distill", 1, *flags, run="requeued")
    with pytest.raises(RankError, match="SIGKILL"):
        argv = ["--stage", "distill", "--run-dir", str(hybrid / "requeued"), "--teacher", str(hybrid / "teacher")]
        argv += [
            "--start-from",
            str(hybrid / "student"),
            "--data-path",
            str(hybrid / "data"),
            "--data-cache-path",
            str(hybrid / "cache"),
        ]
        run_ranks(_killed_after_step_3, 1, [*argv, *FLAGS, *flags])
    for _ in range(3):  # to step 4, 6, 8
        found = run_stage(hybrid, "distill", 1, *flags, run="requeued")
    parts = read_runs(hybrid / "requeued" / "distill" / "wandb")
    assert len(parts) == 5
    parts = [part for part in parts if part.run.run_id]  # what W&B had not written yet died with the killed job
    assert len(parts) >= 4 and len({part.run.run_id for part in parts}) == 1
    assert {(part.run.run_group, part.run.display_name, part.run.job_type) for part in parts} == {
        ("requeued", "requeued distill", "distill")
    }
    assert sum(artifact.type == "setup" for part in parts for artifact in part.artifacts) == 1
    steps = [[step for step in part.history if "distill loss" in part.history[step]] for part in parts]
    assert [steps[0], *steps[-3:]] == [[1, 2], [3, 4], [5, 6], [7, 8]] and steps[1:-3] in ([], [[]], [[3]])
    joined: dict[int, dict] = {}
    for part in parts:
        for step, values in part.history.items():
            joined[step] = joined.get(step, {}) | values
    panels = {name for values in joined.values() for name in values}
    by_layer = [f"{name}/{where}" for name in BY_HEAD for where in ("layer 01", "all")]
    assert panels >= {
        "kl",
        "ce",
        "distill loss",
        "learning-rate",
        "grad-norm",
        "head map",
        "heads",
        "heads table",
        *SPEED,
        *by_layer,
    }
    assert panels >= {"needles/needle single-key", "needles/needle multi-key", "gdn to fa rms/layer 00"}
    assert [step for step, values in sorted(joined.items()) if "heads" in values] == [1, 4, 8]
    for name in ("kl", "distill loss", *SPEED):
        assert sorted(found[name]) == list(range(1, 9))
        assert {step: joined[step][name] for step in range(1, 9)} == pytest.approx(found[name], rel=1e-6)
    _tensorboard_forgets_what_was_done_again(hybrid / "requeued" / "distill" / "tensorboard")


def _killed_after_step_3(rank: int, argv: list[str]) -> None:
    from megatron.training import training
    from megatron.training.global_vars import get_tensorboard_writer

    from hydra_mcore.train.__main__ import main

    stock = training.checkpoint_and_decide_exit

    def kill(model, optimizer, scheduler, iteration, *rest):
        if iteration == 3:
            if (writer := get_tensorboard_writer()) is not None:
                writer.flush()
            time.sleep(0.5)
            os.kill(os.getpid(), signal.SIGKILL)
        return stock(model, optimizer, scheduler, iteration, *rest)

    training.checkpoint_and_decide_exit = kill
    main(argv)


def _tensorboard_forgets_what_was_done_again(folder: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0}).Reload()
    assert [event.step for event in events.Scalars("kl")] == list(range(1, 9))
    assert [event.step for event in events.Images("heads")] == [1, 4, 8]


def test_align_logs_every_layer(folder: Path) -> None:
    found = run_stage(
        folder, "align", 2, *WANDB, "--wandb-exp-name", "mine", run="wandb"
    )  # the last rank logs, not the first
    layers = [f"align loss/layer {layer:02d}" for layer in range(SHAPE.num_layers)]
    assert found["align loss"][1] == pytest.approx(sum(found[layer][1] for layer in layers), rel=1e-6)
    (part,) = read_runs(folder / "wandb" / "align" / "wandb")
    assert part.run.display_name == "mine" and part.history[1].keys() >= {"align loss", *layers}
    files = {entry.path for entry in part.artifacts[0].manifest.contents}
    assert files >= {"head_map.json", "head_map.png", "model.json", "flags.json"}


def test_statistics_are_those_of_all_ranks(folder: Path) -> None:
    flags = ("--exit-interval", "1", "--head-statistics-interval", "1")
    one = run_stage(folder, "distill", 1, *flags, run="stats-1")
    two = run_stage(folder, "distill", 2, *flags, "--tensor-model-parallel-size", "2", run="stats-2")
    for name in (*(f"{name}/all" for name in BY_HEAD), "kl", "ce"):
        assert two[name][1] == pytest.approx(one[name][1], rel=1e-5), name


def argv_of(folder: Path, run: str, *flags: str) -> list[str]:
    argv = ["--stage", "extend", "--run-dir", str(folder / run), "--start-from", str(folder / "student")]
    return [*argv, "--data-path", str(folder / "data"), *FLAGS, "--train-iters", "4", *WANDB, *flags]


def losses(folder: Path, run: str) -> dict[int, float]:
    return logged(folder / run / "extend" / "tensorboard")["extend loss"]


@pytest.mark.parametrize("key", [None, "0" * 40], ids=["no key", "no network"])
def test_nothing_asks_or_waits_without_key_or_network(folder: Path, key: str | None) -> None:
    """A terminal to ask on, a home that cannot be written, a server that is not there."""
    run = f"offline-{key is None}"
    start = time.monotonic()
    (output,) = run_ranks(_on_a_terminal, 1, argv_of(folder, run), key, timeout=100)
    assert len(losses(folder, run)) == 4 and time.monotonic() - start < 90
    (line,) = (line for line in output.splitlines() if line.startswith("W&B: "))
    assert line.startswith("W&B: logging offline (") and "wandb sync" in line
    assert any(4 in part.history for part in read_runs(folder / run / "extend" / "wandb"))


def _on_a_terminal(rank: int, argv: list[str], key: str | None) -> str:
    from hydra_mcore.train import wandb_run
    from hydra_mcore.train.__main__ import main

    wandb_run.INIT_SECONDS = 2
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        del os.environ[name]
    os.environ |= {"HOME": "/nowhere", "WANDB_BASE_URL": "http://127.0.0.1:9"} | ({"WANDB_API_KEY": key} if key else {})
    _, terminal = os.openpty()
    os.dup2(terminal, 0)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        main(argv)
    return stderr.getvalue()


def test_a_log_that_fails_is_told_once(folder: Path) -> None:
    (output,) = run_ranks(_with_a_broken_client, 1, argv_of(folder, "broken"))
    assert len(losses(folder, "broken")) == 4
    (line,) = (line for line in output.splitlines() if line.startswith("W&B: "))
    assert line.endswith("failed, training goes on (the service died)")


def _with_a_broken_client(rank: int, argv: list[str]) -> str:
    import wandb

    from hydra_mcore.train.__main__ import main

    def fail(*args: object, **keywords: object) -> None:
        raise RuntimeError("the service died")

    wandb.Run.log = fail
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        main(argv)
    return stderr.getvalue()


def test_alerts_reach_the_run(folder: Path) -> None:
    """A learning rate that ends in a loss that is not finite."""
    flags = ("--lr", "1e37", "--min-lr", "1e37", "--head-statistics-interval", "0")
    assert run_ranks(_exit_status, 1, argv_of(folder, "alerts", *flags)) == [2]
    (part,) = read_runs(folder / "alerts" / "extend" / "wandb")
    (alert,) = part.alerts
    assert alert.title == "training stopped" and "is not finite" in alert.text


def _exit_status(rank: int, argv: list[str]) -> int | str | None:
    from hydra_mcore.train.__main__ import main

    try:
        main(argv)
    except SystemExit as stop:
        return stop.code
    return 0


def test_training_goes_on_without_wandb(folder: Path) -> None:
    run_ranks(_train_without_wandb, 1, argv_of(folder, "bare"))
    assert len(losses(folder, "bare")) == 4


def _train_without_wandb(rank: int, argv: list[str]) -> None:
    from hydra_mcore.train.__main__ import main

    find, importlib.util.find_spec = (
        importlib.util.find_spec,
        lambda name, *a: None if name == "wandb" else find(name, *a),
    )
    sys.modules["wandb"] = None  # importing it fails, as where it is not installed
    main(argv)


PIPELINED = ("--pipeline-model-parallel-size", "2", "--context-parallel-size", "2", "--micro-batch-size", "1")


@pytest.mark.parametrize(
    "stage", ["distill", *(pytest.param(stage, marks=pytest.mark.slow) for stage in ("align", "extend"))]
)
@pytest.mark.slow
def test_bf16_is_near_float32(folder: Path, stage: str) -> None:
    exact = run_stage(folder, stage, 1, "--micro-batch-size", "1", "--train-iters", "4", run=f"{stage}-fp32")
    sharded = run_stage(
        folder,
        stage,
        2,
        "--tensor-model-parallel-size",
        "2",
        "--sequence-parallel",
        "--bf16",
        "--train-iters",
        "4",
        run=f"{stage}-bf16",
    )
    pipelined = run_stage(folder, stage, 4, *PIPELINED, "--bf16", "--train-iters", "4", run=f"{stage}-bf16-pipelined")
    for step, value in exact[f"{stage} loss"].items():
        for found in (sharded, pipelined):
            assert found[f"{stage} loss"][step] == pytest.approx(value, rel=0.02), step
