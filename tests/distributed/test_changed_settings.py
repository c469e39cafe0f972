# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""A stage goes on with other settings: what the command line says takes effect and is said, or one line refuses it."""

import contextlib
import io
import shutil
from pathlib import Path

import pytest

from hydra_mcore.model.checkpoints import TRACKER
from hydra_mcore.train.resume import SETTINGS
from tests.support.launch import run_ranks
from tests.support.stages import FLAGS, logged, make_run

pytestmark = pytest.mark.slow  # tests/unit/train/test_resume_settings.py has the quick part
STOP, STEPS = 3, 6
SCHEDULE = (
    "--train-iters",
    str(STEPS),
    "--save-interval",
    str(STOP),
    "--micro-batch-size",
    "1",
    "--lr-decay-style",
    "cosine",
)
SCHEDULE += ("--lr", "1e-3", "--min-lr", "1e-5")
LR, LOSS, NORM = "learning-rate", "extend loss", "grad-norm"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run stopped in its middle, and the same run not stopped."""
    folder = make_run(tmp_path_factory.mktemp("settings"))
    assert train(folder, "stopped", "--exit-interval", str(STOP))[0] == train(folder, "whole")[0] == 0
    return folder


def train(folder: Path, run: str, *flags: str, ranks: int = 1) -> tuple[int, str]:
    """Exit status and output of the first rank."""
    argv = ["--stage", "extend", "--run-dir", str(folder / run), "--start-from", str(folder / "student")]
    argv += ["--data-path", str(folder / "data"), "--data-cache-path", str(folder / "cache"), *FLAGS, *SCHEDULE, *flags]
    return run_ranks(_train, ranks, argv, timeout=240)[0]


def _train(rank: int, argv: list[str]) -> tuple[int, str]:
    from hydra_mcore.train.__main__ import main

    output, code = io.StringIO(), 0
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            main(argv)
        except SystemExit as stop:
            code = stop.code
    return code, output.getvalue()


def values(folder: Path, run: str) -> dict[str, dict[int, float]]:
    return logged(folder / run / "extend" / "tensorboard")


def resumed(
    folder: Path, *flags: str, start: str = "stopped", ranks: int = 1
) -> tuple[int, str, dict[str, dict[int, float]]]:
    run = "-".join(flag.strip("-").replace("/", "") for flag in flags) or "unchanged"
    shutil.copytree(folder / start, folder / run)
    code, output = train(folder, run, *flags, ranks=ranks)
    return code, output, values(folder, run)


def changed(output: str) -> str:
    """The line that says what is different now."""
    (line,) = (line for line in output.splitlines() if "settings changed since its last start: " in line)
    return line.partition("last start: ")[2]


def uninterrupted_rates(folder: Path, *flags: str) -> dict[int, float]:
    run = "-".join(("rates", *flags))
    train(folder, run, *flags)
    return values(folder, run)[LR]


def test_another_rate_and_other_moments_take_effect(folder: Path) -> None:
    code, output, found = resumed(folder, "--lr", "5e-4", "--adam-beta1", "0.5")
    assert code == 0 and changed(output) == "adam-beta1 0.9 -> 0.5, lr 0.001 -> 0.0005"
    for step in range(STOP + 1, STEPS + 1):
        scaled = 1e-5 + (values(folder, "whole")[LR][step] - 1e-5) * (5e-4 - 1e-5) / (1e-3 - 1e-5)
        assert found[LR][step] == pytest.approx(scaled, rel=1e-5)
    whole = values(folder, "whole")
    assert found[NORM][STOP + 1] == whole[NORM][STOP + 1] and found[NORM][STOP + 2] != whole[NORM][STOP + 2]


@pytest.mark.parametrize("batch", ["4", "16", "2"])
def test_another_batch_size_keeps_the_place_in_the_schedule(folder: Path, batch: str) -> None:
    code, output, found = resumed(folder, "--global-batch-size", batch)
    assert code == 0 and changed(output) == f"global-batch-size 8 -> {batch}"
    assert found["batch-size"] == dict.fromkeys(range(1, STOP + 1), 8) | dict.fromkeys(
        range(STOP + 1, STEPS + 1), int(batch)
    )
    assert found[LR] == values(folder, "whole")[LR]


def test_more_steps_continue_a_finished_stage(folder: Path) -> None:
    code, output, found = resumed(folder, "--train-iters", "8", start="whole")
    assert code == 0 and changed(output) == "train-iters 6 -> 8"
    assert sorted(found[LOSS]) == list(range(1, 9))
    rates = uninterrupted_rates(folder, "--train-iters", "8")
    assert [found[LR][step] for step in (7, 8)] == [rates[step] for step in (7, 8)]
    assert "is finished" in train(folder, "whole", "--train-iters", "4")[1]


def test_nothing_changed_is_nothing_said(folder: Path) -> None:
    code, output, found = resumed(folder)
    assert code == 0 and "settings changed" not in output and found[NORM] == values(folder, "whole")[NORM]
    (folder / "unchanged" / "extend" / SETTINGS).unlink()  # of an earlier version
    assert train(folder, "unchanged", "--train-iters", "7")[0] == 0


RATES = [
    ("--train-iters", "8"),
    ("--lr", "2e-3"),
    ("--min-lr", "1e-4"),
    ("--lr-decay-style", "linear"),
    ("--lr-decay-style", "constant"),
    ("--lr-decay-iters", "5"),
    ("--lr-warmup-iters", "4"),
    ("--lr-warmup-init", "1e-4", "--lr-warmup-iters", "5"),
]


@pytest.mark.parametrize("flags", RATES, ids=" ".join)
def test_schedules_are_those_of_a_run_that_always_had_them(folder: Path, flags: tuple[str, ...]) -> None:
    code, output, found = resumed(folder, *flags)
    assert code == 0 and all(flag.removeprefix("--") in changed(output) for flag in flags[::2])
    rates = uninterrupted_rates(folder, *flags)
    assert {step: found[LR][step] for step in rates if step > STOP} == {
        step: rate for step, rate in rates.items() if step > STOP
    }


def test_the_checkpoints_schedule_can_be_kept(folder: Path) -> None:
    code, _, found = resumed(
        folder, "--use-checkpoint-opt-param-scheduler", "--lr", "5e-4", "--lr-decay-style", "linear"
    )
    assert code == 0 and found[LR] == values(folder, "whole")[LR]


# Flags by the first step at which they tell: the loss of the next step, the one after it (through the parameters),
# never.
EFFECTS = [
    (("--weight-decay", "0.1"), 2),
    (("--start-weight-decay", "0", "--end-weight-decay", "0.5", "--weight-decay-incr-style", "linear"), 2),
    (("--adam-beta2", "0.5"), 2),
    (("--adam-eps", "1e-4"), 2),
    (("--clip-grad", "0.01"), 2),
    (("--seq-length", "16"), 1),
    (("--seq-length", "128"), 1),
    (("--seed", "77"), 1),
    (("--split", "90,10,0"), 1),
    (("--packed-documents",), 1),
    (("--eod-mask-loss",), 1),
    (("--bf16",), 1),
    (("--micro-batch-size", "2"), None),
    (("--fa-balance", "queries"), None),
    (("--num-workers", "1"), None),
    (("--save-interval", "2"), None),
    (("--keep-last", "1"), None),
    (("--recompute-activations",), None),
    (("--overlap-grad-reduce",), None),
    (("--ckpt-fully-parallel-save",), None),
    (("--eval-interval", "2"), None),
    (("--log-interval", "2"), None),
    (("--start-from", "STUDENT"), None),
]


@pytest.mark.parametrize(
    ("flags", "after"), EFFECTS, ids=lambda value: " ".join(value) if isinstance(value, tuple) else ""
)
def test_what_else_may_change(folder: Path, flags: tuple[str, ...], after: int | None) -> None:
    if "STUDENT" in flags:
        shutil.copytree(folder / "student", folder / "moved", dirs_exist_ok=True)
        flags = ("--start-from", str(folder / "moved"))
    code, output, found = resumed(folder, *flags)
    whole = values(folder, "whole")
    assert (
        code == 0
        and flags[0].removeprefix("--") in changed(output)
        and sorted(found[LOSS]) == list(range(1, STEPS + 1))
    )
    assert ("start-from has no effect any more" in output) == (flags[0] == "--start-from")
    near = {step: value == pytest.approx(whole[LOSS][step], rel=1e-6) for step, value in found[LOSS].items()}
    assert [step for step in near if not near[step]][:1] == ([STOP + after] if after else [])


def test_a_smaller_batch_goes_on_with_validation_too(folder: Path) -> None:
    flags = ("--split", "80,20,0", "--eval-iters", "2", "--eval-interval", "1")
    assert train(folder, "validated", *flags, "--exit-interval", str(STOP))[0] == 0
    code, output = train(folder, "validated", *flags, "--global-batch-size", "2")
    assert code == 0 and "validation loss at iteration 6" in output


REFUSED = [
    (("--no-save-optim",), "leave it out, or add no-load-optim"),
    (("--data-parallel-random-init",), "data_parallel_random_init value from checkpoint (False)"),
]


@pytest.mark.parametrize(("flags", "said"), REFUSED)
def test_what_may_not_change_is_one_line(folder: Path, flags: tuple[str, ...], said: str) -> None:
    code, output, _ = resumed(folder, *flags)
    lines = [line for line in output.splitlines() if line.startswith("train: ")]
    assert code == 2 and len(lines) == 1 and said in lines[0], output[-3000:]
    run = folder / "-".join(flag.strip("-") for flag in flags) / "extend"
    assert (run / TRACKER).read_text() == str(STOP)
    assert train(folder, run.parent.name)[0] == 0  # as it was, it goes on


def test_a_checkpoint_without_the_optimizer(folder: Path) -> None:
    train(folder, "bare", "--no-save-optim", "--exit-interval", str(STOP))
    code, output = train(folder, "bare")
    assert code == 2 and "add no-load-optim to begin with fresh moments" in output
    code, output = train(folder, "bare", "--no-load-optim")
    assert code == 0 and values(folder, "bare")[LR] == values(folder, "whole")[LR]


def test_all_at_once_on_another_layout(folder: Path) -> None:
    flags = ("--lr", "5e-4", "--global-batch-size", "4", "--train-iters", "9", "--tensor-model-parallel-size", "2")
    code, output, found = resumed(folder, *flags, ranks=4)
    assert code == 0 and sorted(found[LOSS]) == list(range(1, 10))
    assert {"lr 0.001 -> 0.0005", "train-iters 6 -> 9", "tensor-model-parallel-size 1 -> 2"} < set(
        changed(output).split(", ")
    )
