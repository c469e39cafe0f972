# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The Weights & Biases run of a stage: one run however often the job is requeued, and never a reason to stop or to
wait.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import re
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from megatron.training import global_vars, wandb_utils

from hydra_mcore.errors import InputError, first_line
from hydra_mcore.files import from_fields, read_json, write_json
from hydra_mcore.selection.figures import heat_map
from hydra_mcore.train.arguments import ResolvedStage

FOLDER, RUN_FILE = "wandb", "run.json"
INIT_SECONDS, FINISH_SECONDS = 30, 60  # what a network that does not answer may cost at the start and at the end


def _harmless(method: Callable[..., Any]) -> Callable[..., Any]:
    """Whatever W&B raises becomes one line, once a run: what is logged is worth less than what is trained."""

    @functools.wraps(method)
    def call(self: WandbRun, *args: Any, **keywords: Any) -> Any:
        try:
            return method(self, *args, **keywords)
        except Exception as error:
            if not self.complained:
                print(f"W&B: {method.__name__} failed, training goes on ({first_line(error)})", file=sys.stderr)
            self.complained = True

    return call


class WandbRun:
    """What Megatron's loop and ours use of W&B, every call harmless; stands where Megatron expects the wandb module."""

    def __init__(self, run: Any, folder: Path) -> None:
        self.run, self.folder, self.complained = run, folder, False
        self.first_step = run.starting_step  # of a run that is resumed online: W&B would warn of every value before it
        self.config = SimpleNamespace(update=self._update_config)

    @_harmless
    def _update_config(self, values: Mapping[str, Any]) -> None:
        self.run.config.update(values, allow_val_change=True)  # a requeued job may run elsewhere

    @_harmless
    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Values of a training step (1-based); steps that W&B already has are dropped: training repeats them
        exactly.
        """
        if step >= self.first_step:
            self.run.log(dict(values), step=step)

    @_harmless
    def log_figure(
        self, name: str, picture: Path, step: int, columns: Sequence[str] = (), rows: Sequence[Sequence[Any]] = ()
    ) -> None:
        """A picture and, where there are rows, the table of its numbers."""
        import wandb

        values: dict[str, Any] = {name: wandb.Image(str(picture))}
        if rows:
            values[f"{name} table"] = wandb.Table(columns=list(columns), data=[list(row) for row in rows])
        if step >= self.first_step:
            self.run.log(values, step=step)

    @_harmless
    def alert(self, title: str, text: str) -> None:
        """A message by e-mail or chat, as the user has set it up in W&B."""
        self.run.alert(title=title, text=text, level="WARN")

    @_harmless
    def describe(self, resolved: ResolvedStage) -> None:
        """Log what the run is made of, once for each place that it is logged to: flags, model card, head map and its
        picture.
        """
        import wandb

        record = _run_record(self.folder / RUN_FILE) or _RunRecord(self.run.id)
        if self.run.disabled or (place := self._place()) in record.described:
            return
        setup = self.folder / "setup"
        resolved.card.save(setup)
        resolved.card.head_map.save(setup / "head_map.json")
        write_json(setup / "flags.json", resolved.flags)
        heat_map(
            setup / "head_map.png",
            resolved.card.head_map,
            None,
            f"{resolved.save.parent.name}, {resolved.options.stage}",
        )
        artifact = wandb.Artifact(f"setup-{self.run.id}", type="setup")
        artifact.add_dir(str(setup))
        self.run.log_artifact(artifact)
        self.log_figure("head map", setup / "head_map.png", step=0)
        write_json(self.folder / RUN_FILE, asdict(replace(record, described=(*record.described, place))))

    def _place(self) -> str:
        """Where the run is logged to: a project of W&B, or offline files for one, which may never be synced."""
        return f"{'offline' if self.run.offline else self.run.entity}/{self.run.project}"

    @_harmless
    def finish(self, exit_code: int = 0) -> None:
        """Close the run, within ``FINISH_SECONDS``; what was not uploaded stays on disk for ``wandb sync``."""
        self.run.finish(exit_code=exit_code)


def send_alert(title: str, text: str) -> None:
    """Send a message through W&B where this rank logs to it."""
    if (run := global_vars.get_wandb_writer()) is not None:
        run.alert(title, text)


@contextlib.contextmanager
def logged_to_wandb(resolved: ResolvedStage) -> Iterator[None]:
    """While open, Megatron's W&B writer is a ``WandbRun``, on the last rank and where a project is set.

    Megatron's own wandb.init asks for a key on the terminal, raises where the network is away, and makes a new run
    every time.
    """
    stock = global_vars._set_wandb_writer, wandb_utils.on_save_checkpoint_success
    global_vars._set_wandb_writer = functools.partial(_set_writer, resolved)
    wandb_utils.on_save_checkpoint_success = _no_artifact
    try:
        yield
    except BaseException as error:
        _finish(error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1)
        raise
    finally:
        global_vars._set_wandb_writer, wandb_utils.on_save_checkpoint_success = stock
    _finish(0)


def _set_writer(resolved: ResolvedStage, args: argparse.Namespace) -> None:
    if args.wandb_project and args.rank == args.world_size - 1:
        try:
            global_vars._GLOBAL_WANDB_WRITER = run = _start(resolved, args)
        except Exception as error:
            print(f"W&B: no run ({first_line(error)}); logging to the console and TensorBoard only", file=sys.stderr)
        else:
            run.describe(resolved)


def _finish(exit_code: int) -> None:
    if (run := global_vars.get_wandb_writer()) is not None:
        run.finish(exit_code)


def _start(resolved: ResolvedStage, args: argparse.Namespace) -> WandbRun:
    """Open the run that stands in the stage's folder, or a new one; offline where W&B cannot be reached."""
    folder = resolved.save / FOLDER
    # Beside the run, so that whoever syncs it finds all of it, and a home folder that is read-only does no harm.
    for name in ("DATA", "CACHE"):
        os.environ.setdefault(f"WANDB_{name}_DIR", str(folder.resolve() / name.lower()))
    import wandb

    record = _run_record(folder / RUN_FILE)
    if record is None:
        record = _RunRecord(os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4))
        write_json(folder / RUN_FILE, asdict(record))
    card = resolved.card
    about = {"fingerprint": card.fingerprint, "fa_heads": card.head_map.num_fa, "selection": card.head_map.strategy}
    settings = {
        "id": record.id,
        "resume": "allow",
        "project": args.wandb_project,
        "entity": args.wandb_entity or None,
        "name": args.wandb_exp_name or f"{resolved.save.parent.resolve().name} {resolved.options.stage}",
        "group": os.environ.get("WANDB_RUN_GROUP") or resolved.save.parent.resolve().name,
        "job_type": resolved.options.stage,
        "dir": args.wandb_save_dir or str(folder),
        "config": vars(args) | about,
        "allow_val_change": True,
        "settings": wandb.Settings(init_timeout=INIT_SECONDS, finish_timeout=FINISH_SECONDS),
    }
    Path(settings["dir"]).mkdir(parents=True, exist_ok=True)
    with _nobody_to_ask():
        try:
            return WandbRun(wandb.init(**settings), folder)
        except Exception as error:  # no key, no network, no such entity: a list of W&B's errors would never be complete
            later = f"send it later with: wandb sync {settings['dir']}"
            print(f"W&B: logging offline ({first_line(error)}); {later}", file=sys.stderr)
        wandb.teardown()  # of what the attempt has left, or its run id counts as in use
        return WandbRun(wandb.init(**settings, mode="offline"), folder)


@dataclass(frozen=True)
class _RunRecord:
    """What a stage's folder knows of its run: its id at W&B, and the places that have its description."""

    id: str
    described: tuple[str, ...] | bool = ()

    def __post_init__(self) -> None:
        if isinstance(self.described, bool):  # of a version that did not note the place
            object.__setattr__(self, "described", ())
        if not re.fullmatch(r"[\w-]{1,128}", self.id, re.ASCII):
            raise ValueError("id is no name of a run")


def _run_record(path: Path) -> _RunRecord | None:
    """The run of a stage's folder; None, and a line, where the file is damaged: a new run begins."""
    if not path.exists():
        return None
    try:
        return from_fields(_RunRecord, read_json(path), str(path))
    except InputError as error:
        print(f"W&B: {error}; a new run begins", file=sys.stderr)
        return None


@contextlib.contextmanager
def _nobody_to_ask() -> Iterator[None]:
    """Without standard input W&B raises where it would prompt for a key and wait."""
    stdin = sys.stdin
    with open(os.devnull) as sys.stdin:
        try:
            yield
        finally:
            sys.stdin = stdin


def _no_artifact(*args: Any, **keywords: Any) -> None:
    """Megatron logs every checkpoint as an artifact that only names its path, unguarded, while it saves."""
