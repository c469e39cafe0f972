# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""A dry run on one process says what the real job would be refused for, before student, teacher and data are there."""

import contextlib
import io
import shutil
from pathlib import Path

import pytest

from hydra_mcore.errors import InputError
from tests.support.launch import run_ranks
from tests.support.paths import TINY_TEACHER
from tests.support.stages import write_data

RECIPE = """
run-dir: {0}/run
teacher: {0}/run/teacher
data-path: {0}/data
split: 100,0,0
seq-length: 64
micro-batch-size: 2
global-batch-size: 32
train-iters: 100
lr: 1.0e-3
prepare: {{out: {0}/data}}
select: {{ratio: "7:1"}}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe with nothing but a config.json beside it."""
    shutil.copy(TINY_TEACHER / "config.json", tmp_path)
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(tmp_path))
    return tmp_path / "recipe.yaml"


def dry_run(recipe: Path, *flags: str, stage: str = "distill") -> str:
    """What it prints, or the line of its refusal."""
    return run_ranks(_dry_run, 1, ["--stage", stage, "--config", str(recipe), "--dry-run", *flags])[0]


def _dry_run(rank: int, argv: list[str]) -> str:
    from hydra_mcore.train.run import run_stage

    with contextlib.redirect_stdout(io.StringIO()) as said:
        try:
            run_stage(argv)
        except InputError as error:
            return str(error)
    return said.getvalue()


def test_a_job_is_checked_before_anything_of_it_is_there(recipe: Path, tmp_path: Path) -> None:
    layout = ("--tensor-model-parallel-size", "2", "--context-parallel-size", "2")
    said = dry_run(recipe, "--world-size", "16", *layout)
    assert "4 FA heads of 4 layers x 8; shape of " in said and "heads not selected yet: assumed 7:1" in said
    assert said.count("is not there yet") == 2 and "(the section prepare is to write it: not checked)" in said
    assert "16 = tensor 2 x pipeline 1 x context 2 x data 4" in said
    assert "32 rows of 64 tokens a step, 4 micro-batches of 2 on each" in said and "are 204,800 tokens" in said
    assert "kl-temperature 1.0" in said and "lr 0.001" in said
    assert (
        "overlap-grad-reduce" not in said and len(said.splitlines()) < 40
    )  # what is Megatron's default is in the file
    everything = tmp_path / "run" / "distill.dry_run.txt"
    assert said.endswith(f"all arguments: {everything}\n")
    table = [line.replace(".", "").split() for line in everything.read_text().splitlines()]
    assert ["overlap_grad_reduce", "False"] in table and ["world_size", "16"] in table
    assert [path.name for path in (tmp_path / "run").iterdir()] == [everything.name]


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (("--world-size", "6", "--tensor-model-parallel-size", "4"), "does not divide 6 ranks"),
        (("--world-size", "3", "--tensor-model-parallel-size", "3"), "tensor parallel size 3 does not divide 8 query"),
        (("--world-size", "64"), "global_batch_size (32) must be divisible by"),
        (("--world-size", "-1"), "world_size is -1"),
        (("--data-path", "nowhere"), "no nowhere.idx and .bin"),
    ],
)
def test_what_the_job_would_be_refused_for(recipe: Path, flags: tuple[str, ...], line: str) -> None:
    said = dry_run(recipe, *flags)
    assert line in said and len(said.splitlines()) == 1


def test_data_that_are_there_are_checked(recipe: Path, tmp_path: Path) -> None:
    write_data(tmp_path / "data", 64)
    assert f"  data     {tmp_path / 'data'}\n" in dry_run(recipe)
    assert "one sequence needs" in dry_run(recipe, "--seq-length", "16384")


def test_without_any_model_it_says_what_to_do(recipe: Path) -> None:
    recipe.with_name("config.json").unlink()
    assert dry_run(recipe).startswith("no model is there: ")


def test_a_training_takes_its_ranks_from_its_launcher(recipe: Path) -> None:
    assert (
        "leave it out" in run_ranks(_dry_run, 1, ["--stage", "align", "--config", str(recipe), "--world-size", "2"])[0]
    )
