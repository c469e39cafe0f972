# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""What describes a W&B run (flags, card, head map) stands in every place that it is logged to, however its starts
differ.
"""

import argparse
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from hydra_mcore.config import HydraOptions, StageOptions, teacher_card
from hydra_mcore.train import wandb_run
from hydra_mcore.train.arguments import ResolvedStage
from tests.support.launch import run_ranks
from tests.support.offline_wandb import OfflineRun, read_runs
from tests.support.stages import HEAD_MAP, SHAPE


def resolved(folder: Path) -> ResolvedStage:
    card = replace(teacher_card(SHAPE, fingerprint="f" * 64), head_map=HEAD_MAP, options=HydraOptions(), stage="align")
    options = StageOptions(stage="align", run_dir=str(folder))
    return ResolvedStage(options, card, folder / "student", folder / "align", False, False, ["--lr", "1"], "", [])


def start(folder: Path, mode: str, project: str = "hydra") -> list[OfflineRun]:
    """One start of a stage, as far as W&B sees it; returns all offline files so far."""
    run_ranks(_start, 1, folder, mode, project)
    return read_runs(folder / "align" / "wandb")


def _start(rank: int, folder: Path, mode: str, project: str) -> None:
    os.environ["WANDB_MODE"] = mode
    args = argparse.Namespace(
        wandb_project=project,
        wandb_entity="",
        wandb_exp_name="",
        wandb_save_dir="",
        exit_signal_handler=False,
        rank=0,
        world_size=1,
    )
    with wandb_run.logged_to_wandb(resolved(folder)):
        wandb_run.global_vars._set_wandb_writer(args)


def described(runs: list[OfflineRun]) -> list[int]:
    return [sum(artifact.type == "setup" for artifact in run.artifacts) for run in runs]


@pytest.mark.parametrize("first", ["disabled", pytest.param("dryrun", marks=pytest.mark.slow)])
def test_a_run_that_was_logged_nowhere_is_described_later(tmp_path: Path, first: str) -> None:
    before = described(start(tmp_path, first))
    assert before == ([] if first == "disabled" else [1])
    runs = start(tmp_path, "offline")
    assert described(runs) == [1] if first == "disabled" else described(runs) == [1, 0]
    assert {entry.path for entry in runs[0].artifacts[0].manifest.contents} >= {
        "head_map.json",
        "head_map.png",
        "model.json",
        "flags.json",
    }
    if first != "disabled":
        assert described(start(tmp_path, "offline")) == [*described(runs), 0]


@pytest.mark.slow
def test_another_project_and_a_deleted_folder(tmp_path: Path) -> None:
    start(tmp_path, "offline")
    runs = start(tmp_path, "offline", "other")
    assert described(runs) == [1, 1] and [run.run.project for run in runs] == ["hydra", "other"]
    assert len({run.run.run_id for run in runs}) == 1
    assert described(start(tmp_path, "offline")) == [1, 1, 0]  # back in the first one
    shutil.rmtree(tmp_path / "align" / "wandb")
    (new,) = start(tmp_path, "offline")
    assert described([new]) == [1] and new.run.run_id != runs[0].run.run_id


def test_offline_first_then_online(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An online run cannot be had here: what W&B says of one stands in for it."""
    logged: list[str] = []
    (tmp_path / "align" / "wandb").mkdir(parents=True)
    for offline, entity in ((True, None), (True, None), (False, "me"), (False, "me"), (False, "us"), (True, None)):
        run = SimpleNamespace(
            disabled=False,
            offline=offline,
            entity=entity,
            project="hydra",
            id="1",
            starting_step=0,
            log=lambda *_, **__: None,
        )
        run.log_artifact = lambda artifact, where=entity: logged.append(where)
        wandb_run.WandbRun(run, tmp_path / "align" / "wandb").describe(resolved(tmp_path))
    assert logged == [None, "me", "us"]


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ('{"id": "abc", "described": true}', True),  # of an earlier version
        ('{"id": "abc", "described": ["offline/hydra"]}', True),
        ('{"id": "abc"}', True),
        *(
            (text, False)
            for text in ("", "{", "[]", "null", "7", '{"described": []}', '{"id": 7}', '{"id": null}', "\xff", '"abc"')
        ),
    ],
)
def test_a_damaged_record_begins_a_new_run(tmp_path: Path, text: str, kept: bool) -> None:
    (tmp_path / "run.json").write_bytes(text.encode("latin-1"))
    record = wandb_run._run_record(tmp_path / "run.json")
    assert (record is not None) == kept
    if record:
        assert record.id == "abc" and isinstance(record.described, tuple)
