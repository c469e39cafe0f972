# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""What a start keeps of its settings and says of changed ones; how many samples are asked for; what the console
averages.
"""

import argparse
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hydra_mcore.compat.optimizer import _groups_of_now
from hydra_mcore.config import ConfigError
from hydra_mcore.errors import InputError
from hydra_mcore.train import training_log
from hydra_mcore.train.resume import (
    SETTINGS,
    changes,
    check_settings_of_resume,
    note_settings,
    samples_of_now,
    settings_of,
)


def given(**flags: object) -> dict[str, object]:
    base = {
        "lr": 1e-3,
        "train_iters": 6,
        "start_from": "a",
        "no_save_optim": False,
        "data_path": ["1", "x"],
        "params_dtype": torch.float32,
    }
    return settings_of(argparse.Namespace(**base | {"rank": 3, "config": ["r.yaml"], "exit_interval": 2} | flags))


def test_changed_settings_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    note_settings(tmp_path, given(), resume=False)
    note_settings(tmp_path, given(rank=0, exit_interval=None), resume=True)
    assert capsys.readouterr().out == ""
    note_settings(tmp_path, given(lr=5e-4, data_path=["1", "y" * 99], train_iters=None), resume=True)
    said = f"data-path 1 x -> 1 {'y' * 55}..., lr 0.001 -> 0.0005, train-iters 6 -> unset"
    assert capsys.readouterr().out == f"{tmp_path}: settings changed since its last start: {said}\n"
    note_settings(tmp_path, given(lr=5e-4, data_path=["1", "y" * 99], train_iters=None, start_from="b"), resume=True)
    assert "start-from has no effect any more" in capsys.readouterr().out


@pytest.mark.parametrize("text", [None, "", "{", "[]", "7", "null", "\xff", '{"unknown": 1}'])
def test_settings_that_cannot_be_read_are_none(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / SETTINGS).write_bytes(text.encode("latin-1"))
    assert changes(tmp_path, given()) == ""
    check_settings_of_resume(tmp_path, given(), load_optimizer=True)
    note_settings(tmp_path, given(), resume=True)
    assert changes(tmp_path, given(lr=1)) == "lr 0.001 -> 1"


def test_an_optimizer_that_was_not_saved(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="add no-load-optim"):
        check_settings_of_resume(tmp_path, given(no_save_optim=True), load_optimizer=True)
    note_settings(tmp_path, given(no_save_optim=True), resume=False)
    with pytest.raises(ConfigError, match="add no-load-optim"):
        check_settings_of_resume(tmp_path, given(), load_optimizer=True)
    check_settings_of_resume(tmp_path, given(), load_optimizer=False)


@pytest.mark.parametrize("batch", [2, 8, 32])
def test_samples_reach_to_the_last_step(batch: int) -> None:
    """Three steps of eight rows are behind, three of the batch of now are to come; an evaluation of two batches after
    each.
    """
    args = argparse.Namespace(
        iteration=3, train_iters=6, global_batch_size=batch, rampup_batch_size=None, consumed_train_samples=24
    )
    args.eval_interval, args.eval_iters, args.eval_global_batch_size, args.consumed_valid_samples = 1, 2, batch, 48
    asked = samples_of_now([6 * batch, 7 * 2 * batch, 0], args)
    assert asked[0] == 24 + 3 * batch and asked[1] >= 48 + 4 * 2 * batch and asked[2] == 0
    if (
        batch == 8
    ):  # nothing has changed: what Megatron asks for, so that a resumed run reads what an uninterrupted one reads
        assert asked == [48, 112, 0]


def test_evaluations_from_a_later_step_on_find_their_samples() -> None:
    """Evaluations are due after steps 2 and 4 and at the end; Megatron counts one of them as before the start."""
    args = argparse.Namespace(iteration=0, train_iters=4, global_batch_size=8, rampup_batch_size=None)
    args.consumed_train_samples = args.consumed_valid_samples = 0
    args.eval_interval, args.eval_iters, args.eval_global_batch_size = 2, 1, 4
    assert samples_of_now([32, 2 * 4, 0], args) == [32, 3 * 4, 0]


def test_groups_keep_their_state_and_take_the_settings_of_now() -> None:
    kind = {"wd_mult": 1.0, "lr_mult": 1.0, "is_expert_parallel": False, "is_decoupled_lr": False}
    saved = {
        **kind,
        "params": [0],
        "step": 7,
        "lr": 3e-4,
        "max_lr": 1e-3,
        "min_lr": 1e-5,
        "betas": (0.9, 0.95),
        "eps": 1e-8,
    }
    other = saved | {"wd_mult": 0.0, "step": 9}
    now = {**kind, "params": ["p"], "lr": 0.0, "max_lr": 5e-4, "min_lr": 0.0, "betas": (0.5, 0.95), "eps": 1e-6}
    found = _groups_of_now([other, saved], [now, now | {"wd_mult": 0.0}])
    assert [group["step"] for group in found] == [7, 9] and all(group["lr"] == 3e-4 for group in found)
    assert all(
        (group["max_lr"], group["min_lr"], group["betas"], group["eps"]) == (5e-4, 0.0, (0.5, 0.95), 1e-6)
        for group in found
    )
    with pytest.raises(InputError, match="other groups of parameters"):
        _groups_of_now([saved], [now | {"is_decoupled_lr": True}])


@pytest.mark.parametrize(
    "losses",
    [[1.0, 2.0, 3.0], [math.nan, 2.0, 4.0], [2.0, math.nan, 4.0], [2.0, 4.0, math.nan], [math.nan, math.nan, 5.0]],
)
def test_the_mean_of_an_interval_leaves_out_steps_without_a_loss(
    losses: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_log, "is_last_rank", lambda: False)
    log = training_log.TrainingLog(None, SimpleNamespace(log_interval=3), None, SimpleNamespace(waited=0.0), None)
    for _ in range(2):  # a second interval begins as the first did
        totals: dict = {"advanced iterations": 0}
        for step, loss in enumerate(losses, 1):
            values = {"extend loss": torch.tensor(loss)}
            log.leave_out_empty(values, totals, step)
            assert ("extend loss" in values) == (not math.isnan(loss))
            totals["advanced iterations"] += 1  # from here on as Megatron does
            for name, value in values.items():
                totals[name] = totals.get(name, torch.zeros(1)) + value
        counted = [loss for loss in losses if not math.isnan(loss)]
        assert float(totals["extend loss"]) / 3 == pytest.approx(sum(counted) / len(counted))
