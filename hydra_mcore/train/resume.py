# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Going on in a stage's folder: one run at a time, and with other settings where they were changed on purpose.

What stands on the command line holds, also where the checkpoint was written with something else; what differs from the
last start is said in one line. docs/checkpoints.md has the table of what may change.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from megatron.training import training

from hydra_mcore.commands import sole_writer
from hydra_mcore.config import ConfigError
from hydra_mcore.errors import InputError, first_line
from hydra_mcore.files import disk_problem, disk_refusal, read_json, write_json

SETTINGS = "settings.json"
WAIT_S = 60.0  # for a job that SLURM has asked to end: KillWait's default is half of it
# Of a place or a process, or of what one start is to do: not of the run.
_OF_ONE_START = frozenset(
    "config dry_run exit_duration_in_mins exit_interval load local_rank no_load_optim no_load_rng profile rank run_dir"
    " save tensorboard_dir tokenizer_model world_size".split()
)


@contextlib.contextmanager
def alone_in(save: Path, args: argparse.Namespace) -> Iterator[torch.distributed.Store]:
    """While open, no other run writes to ``save``: the first rank holds its lock, the others wait for its word.

    Yields:
        The store that the ranks meet in.

    Raises:
        InputError: on all ranks, another run holds the folder and has not ended after ``WAIT_S``, or it cannot be
            written.
    """
    with contextlib.ExitStack() as stack:
        if "RANK" not in os.environ:
            stack.enter_context(sole_writer(save, WAIT_S))
            yield torch.distributed.HashStore()
            return
        timeout = datetime.timedelta(minutes=args.distributed_timeout_minutes)
        store = next(torch.distributed.rendezvous("env://", timeout=timeout))[0]
        store.set_timeout(timeout)
        if args.rank == 0:
            store.set("refusal", _refusal(stack, save))
        if refusal := store.get("refusal").decode():
            raise InputError(refusal)
        yield store


def _refusal(stack: contextlib.ExitStack, save: Path) -> str:
    """Why this run cannot have the folder; empty when it has."""
    try:
        stack.enter_context(sole_writer(save, WAIT_S))
    except InputError as error:
        return str(error)
    except OSError as error:
        if (refusal := disk_refusal(error)) is None:
            raise
        return disk_problem(refusal)
    return ""


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """All flags as they were given, as JSON holds them; before Megatron's validation derives others."""
    kept = {name: value for name, value in vars(args).items() if name not in _OF_ONE_START}
    return {
        name: value if isinstance(value, int | float | str | list | None) else str(value)
        for name, value in sorted(kept.items())
    }


def check_settings_of_resume(save: Path, now: Mapping[str, Any], load_optimizer: bool) -> None:
    """Raise ConfigError for what a checkpoint of ``save`` cannot go on with."""
    if load_optimizer and (now["no_save_optim"] or _last_settings(save).get("no_save_optim")):
        raise ConfigError(
            f"{save}: with no-save-optim nothing is loaded of the optimizer, now or from a checkpoint that was saved"
            " so; leave it out, or add no-load-optim to begin with fresh moments"
        )


def changes(save: Path, now: Mapping[str, Any]) -> str:
    """What differs from the last start in this folder, as "lr 0.001 -> 0.0005, ..."; empty where nothing does."""
    before = _last_settings(save)
    changed = [name for name in now if name in before and before[name] != now[name]]
    return ", ".join(f"{name.replace('_', '-')} {_shown(before[name])} -> {_shown(now[name])}" for name in changed)


def note_settings(save: Path, now: dict[str, Any], resume: bool) -> None:
    """On the first rank, at the start: say what was changed since the last one, and keep the settings for the next."""
    if resume and (changed := changes(save, now)):
        print(f"{save}: settings changed since its last start: {changed}", flush=True)
        if "start-from " in changed:
            print(f"{save}: start-from has no effect any more, the stage goes on from its own checkpoint", flush=True)
    write_json(save / SETTINGS, now)


@contextlib.contextmanager
def schedule_of_now(save: Path, args: argparse.Namespace) -> Iterator[None]:
    """While open, a checkpoint is loaded under the schedules of the command line instead of failing where they differ.

    Megatron counts a schedule in samples. All flags of ours count steps, so the place within the schedule is the step's
    also where the batch size has changed. With --use-checkpoint-opt-param-scheduler, schedule and place are the
    checkpoint's.

    Raises:
        ConfigError: Megatron cannot go on with these settings.
    """
    stock = training.load_checkpoint

    def load_checkpoint(model: Any, optimizer: Any, scheduler: Any, *rest: Any, **keywords: Any) -> tuple[int, int]:
        scheduler.override_opt_param_scheduler = not scheduler.use_checkpoint_opt_param_scheduler
        try:
            iteration, flops = stock(model, optimizer, scheduler, *rest, **keywords)
        except AssertionError as error:
            raise ConfigError(
                f"{save}: Megatron cannot go on with these settings ({first_line(error)}); set that flag as it was"
            ) from None
        if scheduler.use_checkpoint_opt_param_scheduler:
            for group in optimizer.param_groups:
                group["max_lr"], group["min_lr"] = scheduler.max_lr, scheduler.min_lr
        elif args.rampup_batch_size is None:
            scheduler.num_steps = iteration * args.global_batch_size
        scheduler.step(0)
        return iteration, flops

    training.load_checkpoint = load_checkpoint
    try:
        yield
    finally:
        training.load_checkpoint = stock


def samples_of_now(num_samples: list[int], args: argparse.Namespace) -> list[int]:
    """Samples of training and validation that Megatron asks for, at least those behind and those to come.

    Megatron multiplies all steps with the batch size of now, which is too little after steps of larger batches, and
    forgets the evaluation at start-eval-at-iter where one is due at that very step.
    """
    train, valid, *rest = num_samples
    behind = args.iteration
    if args.rampup_batch_size is None:
        train = args.consumed_train_samples + (args.train_iters - behind) * args.global_batch_size
    if args.eval_interval:
        evaluations = args.train_iters // args.eval_interval - behind // args.eval_interval + 1
        valid = max(valid, args.consumed_valid_samples + evaluations * args.eval_iters * args.eval_global_batch_size)
    return [train, valid, *rest]


def _last_settings(save: Path) -> dict[str, Any]:
    """The settings of the last start; empty if the file is missing, damaged or of an earlier version."""
    with contextlib.suppress(InputError):
        found = read_json(save / SETTINGS)
        return found if isinstance(found, dict) else {}
    return {}


def _shown(value: Any) -> str:
    text = "unset" if value is None else " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
