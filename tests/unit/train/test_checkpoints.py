# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Which checkpoint of a folder counts, which are kept, what two runs differ in; no training."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from hydra_mcore.config import ConfigError, HydraOptions, ModelCard, StageOptions, teacher_card
from hydra_mcore.heads import HeadMap
from hydra_mcore.model.checkpoints import TRACKER, iterations, latest_iteration, write_tracker
from hydra_mcore.train import checkpoint_care
from hydra_mcore.train.checkpoint_care import difference, note_versions, prune, resumable, tidy
from tests.support.stages import SHAPE


def checkpoint(save: Path, step: int) -> Path:
    """A complete checkpoint of one tensor; the tracker is left as it is."""
    folder = save / f"iter_{step:07d}"
    dcp.save({"w": torch.full((64,), float(step))}, storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
    (folder / "metadata.json").write_text("{}")
    return folder


def cut_short(folder: Path) -> None:
    victim = next(folder.glob("*.distcp"))
    victim.write_bytes(victim.read_bytes()[:-8])


@pytest.fixture
def save(tmp_path: Path) -> Path:
    """Checkpoints of steps 2, 4 and 6, the tracker at 6."""
    for step in (2, 4, 6):
        checkpoint(tmp_path, step)
    write_tracker(tmp_path, 6)
    return tmp_path


def steps(save: Path) -> list[int]:
    return list(iterations(save))


@pytest.mark.parametrize(
    ("damage", "chosen", "left"),
    [
        (lambda save: None, 6, [2, 4, 6]),
        (lambda save: (save / TRACKER).write_text(""), 6, [2, 4, 6]),
        (lambda save: (save / TRACKER).unlink(), 6, [2, 4, 6]),
        (lambda save: (save / "iter_0000008").mkdir(), 6, [2, 4, 6]),
        (
            lambda save: checkpoint(save, 8),
            6,
            [2, 4, 6, 8],
        ),  # its save was killed just before the tracker: it does not count
        (lambda save: write_tracker(save, 4), 4, [2, 4, 6]),  # somebody stepped back
        (lambda save: cut_short(save / "iter_0000006"), 4, [2, 4]),
        (lambda save: shutil.rmtree(save / "iter_0000006"), 4, [2, 4]),
        (lambda save: ((save / TRACKER).unlink(), cut_short(save / "iter_0000004")), 6, [2, 6]),
        (lambda save: (save / "iter_0000002").rename(save / "removing_iter_0000002"), 6, [4, 6]),
    ],
    ids=[
        "whole",
        "empty-tracker",
        "no-tracker",
        "half-saved",
        "untracked",
        "stepped-back",
        "cut",
        "removed",
        "two",
        "half-removed",
    ],
)
def test_a_stage_goes_on_from_what_counts(save: Path, damage, chosen: int, left: list[int]) -> None:
    damage(save)
    folder = save / f"iter_{chosen:07d}"
    assert resumable(save) == folder
    tidy(save)
    assert steps(save) == left and not list(save.glob("removing_*"))
    assert latest_iteration(save) == resumable(save) == folder  # Megatron and every command read the tracker


def test_falling_back_is_said_in_one_line(save: Path, capsys: pytest.CaptureFixture) -> None:
    tidy(save)
    assert capsys.readouterr().out == ""
    cut_short(save / "iter_0000006")
    tidy(save)
    lines = capsys.readouterr().out.splitlines()
    assert "cut short" in lines[0] and "going on from iter_0000004" in lines[0]
    assert len(lines) == 2 and "iter_0000006: removed" in lines[1]


def test_nothing_complete_yet(tmp_path: Path) -> None:
    assert resumable(tmp_path) is None
    (tmp_path / "iter_0000002").mkdir()
    (tmp_path / TRACKER).write_text("")
    assert resumable(tmp_path) is None
    tidy(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_only_checkpoint_is_damaged(tmp_path: Path) -> None:
    cut_short(checkpoint(tmp_path, 2))
    write_tracker(tmp_path, 2)
    with pytest.raises(ConfigError, match="cut short"):
        resumable(tmp_path)


@pytest.mark.parametrize(
    ("last", "every", "left"),
    [
        (1, 0, [6, 8]),
        (2, 0, [4, 6, 8]),
        (9, 0, [2, 4, 6, 8]),
        (1, 4, [4, 6, 8]),
        (1, 2, [2, 4, 6, 8]),
        (1, 100, [6, 8]),
    ],
)
def test_what_is_kept(save: Path, last: int, every: int, left: list[int]) -> None:
    (save / "iter_0000008").mkdir()  # being written: it neither counts nor goes
    prune(save, last, every)
    assert steps(save) == left


def test_a_removal_killed_midway_leaves_nothing_that_looks_like_a_checkpoint(
    save: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(folder: Path) -> None:
        next(folder.glob("*.distcp")).unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_care.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            prune(save, 1, 0)
    assert steps(save) == [4, 6] and (save / "removing_iter_0000002").is_dir()
    tidy(save)
    assert steps(save) == [4, 6] and not (save / "removing_iter_0000002").exists()


@pytest.mark.parametrize("wrong", [{"keep_last": 0}, {"keep_every": -1}])
def test_the_last_checkpoint_is_always_kept(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="keep at least the last checkpoint"):
        StageOptions(**wrong)


CARD = dataclasses.replace(teacher_card(SHAPE, "a" * 64), stage="align")


def with_heads(fa: list[tuple[int, int]]) -> ModelCard:
    return dataclasses.replace(
        CARD, head_map=HeadMap.from_fa(fa, SHAPE.num_layers, SHAPE.num_heads, SHAPE.num_kv_groups)
    )


@pytest.mark.parametrize(
    ("there", "here", "said"),
    [
        (CARD, CARD, ""),
        (with_heads([(3, 1), (3, 5)]), with_heads([(3, 1), (3, 6)]), "layer 3: FA heads 1, 5 there, 1, 6 here"),
        (with_heads([(0, 2)]), with_heads([]), "layer 0: FA heads 2 there, none here"),
        (
            CARD,
            dataclasses.replace(CARD, options=HydraOptions(fa_gate="headwise")),
            "fa_position is 'rope' there, 'nope' here",
        ),
        (
            CARD,
            dataclasses.replace(CARD, shape=dataclasses.replace(SHAPE, num_layers=3)),
            "num_layers is 4 there, 3 here",
        ),
        (
            CARD,
            dataclasses.replace(CARD, fingerprint="b" * 64),
            "the teacher's weights are aaaaaaaaaaaa there, bbbbbbbbbbbb here",
        ),
        (CARD, dataclasses.replace(CARD, stage="distill"), "stage align there, distill here"),
        (CARD, dataclasses.replace(CARD, stages=[{"stage": "align"}]), ""),  # another schedule is still this run
    ],
)
def test_what_differs_is_named(there: ModelCard, here: ModelCard, said: str) -> None:
    assert difference(there, here) == said
    assert bool(said) == (there != here)


def test_a_change_of_versions_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    note_versions(tmp_path)
    note_versions(tmp_path)
    assert capsys.readouterr().out == ""
    found = json.loads((tmp_path / "versions.json").read_text())
    assert (
        set(found) == {"hydra_mcore", "megatron-core", "torch"}
        and found["torch"] == torch.__version__.partition("+")[0]
    )
    (tmp_path / "versions.json").write_text(json.dumps(found | {"torch": "1.0"}))
    note_versions(tmp_path)
    assert f"torch was 1.0 so far and is {found['torch']} now" in capsys.readouterr().out
    note_versions(tmp_path)
    assert capsys.readouterr().out == ""


def test_saves_are_asynchronous_on_a_gpu_unless_the_recipe_says_no(tmp_path: Path) -> None:
    from hydra_mcore.train.arguments import recipe_flags

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("async-save: false\n")
    argv = ["--stage", "align", "--run-dir", "runs/a", "--teacher", "runs/a/teacher"]
    for with_gpu, config, expected in ((True, [], True), (False, [], False), (True, ["--config", str(recipe)], False)):
        parser, found, _ = recipe_flags([*argv, *config], with_gpu)
        assert parser.parse_args(found.to_flags(parser)).async_save == expected
