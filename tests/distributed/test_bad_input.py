# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""What training says to bad input: one line that names cause and fix, exit status 2, nothing lost."""

import dataclasses
import re
import shutil
from pathlib import Path

import pytest

from hydra_mcore.config import ModelCard
from hydra_mcore.errors import InputError
from hydra_mcore.heads import HeadMap
from hydra_mcore.model.checkpoints import TRACKER
from tests.support.commands import training_ended
from tests.support.launch import run_ranks
from tests.support.stages import FLAGS, SHAPE, make_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("bad"))


def arguments(folder: Path, *flags: str, stage: str = "extend", run: str = "run") -> list[str]:
    argv = ["--stage", stage, "--run-dir", str(folder / run), "--teacher", str(folder / "teacher"), *FLAGS]
    return [*argv, "--start-from", str(folder / "student"), "--data-path", str(folder / "data"), *flags]


def refusal(folder: Path, *flags: str, ranks: int = 1, **places: str) -> str:
    """The one line on stderr of a run that must end with exit status 2."""
    code, said = run_ranks(training_ended, ranks, arguments(folder, *flags, **places))[0]
    lines = [line for line in said.splitlines() if line.startswith("train: ")]
    assert code == 2 and len(lines) == 1 and "Traceback" not in said, said
    return lines[0]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--sequnce-parallel",), "unknown flag --sequnce-parallel; did you mean --sequence-parallel?"),
        (("--tensor-model-parallel-size", "3"), "tensor parallel size 3 does not divide 8 query heads"),
        (("--pipeline-model-parallel-size", "3"), "pipeline parallel size 3 does not divide 4 layers"),
        (("--tensor-model-parallel-size", "2"), "tensor 2 x pipeline 1 x context parallel 1 does not divide 1 ranks"),
        (("--context-parallel-size", "4"), "tensor 1 x pipeline 1 x context parallel 4 does not divide 1 ranks"),
        (("--packed-documents",), "packed documents are rows of their own: set micro-batch-size 1 instead of 2"),
        (("--reset-attention-mask",), "does not reach recurrent heads; use packed-documents"),
        (
            ("--recompute-granularity", "full"),
            "Megatron refuses these settings: Using recompute_granularity: full so recompute_method",
        ),
        (("--seq-length", "1000000"), "one sequence needs 1000001"),
        (("--data-path", "nowhere"), "no nowhere.idx and .bin"),
        (("--start-from", "nowhere"), "start from nowhere: No such file"),
        (("--train-iters", "2"), "lr-warmup-iters 2 must be fewer than the 2 steps"),
        (("--global-batch-size", "3"), "Megatron refuses these settings: eval_global_batch_size (3) must be divisible"),
        (("--min-lr", "1"), "Megatron refuses these settings: args.min_lr <= args.lr (min-lr 1.0, lr 1e-05)"),
        (("--fp16",), "fp16 is not supported"),
        (("--transformer-impl", "transformer_engine"), "needs Transformer Engine and a GPU; use local"),
        (("--fp8-format", "hybrid"), "fp8-format: the size of a head is 8, no multiple of 16; leave fp8-format out"),
        (("--teacher-fp8",), "teacher-fp8 says where FP8 is used; set fp8-format, or leave it out"),
        (("--lr", "fast"), "argument --lr: invalid float value: 'fast'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_flags(folder: Path, flags: tuple[str, ...], said: str) -> None:
    assert said in refusal(folder, *flags)
    assert not (folder / "run").exists()


def test_a_dry_run_stands_for_a_machine_with_transformer_engine(tmp_path: Path) -> None:
    folder, fp8 = make_run(tmp_path, shape=dataclasses.replace(SHAPE, head_dim=16)), ("--fp8-format", "hybrid")
    assert "fp8-format needs transformer-impl transformer_engine, not local" in refusal(folder, *fp8)
    assert run_ranks(training_ended, 1, arguments(folder, *fp8, "--dry-run")) == [(0, "")]


@pytest.mark.parametrize(
    ("ranks", "flags", "said"),
    [
        (
            2,
            ("--context-parallel-size", "2", "--seq-length", "31"),
            "context parallel size 2 does not divide a sequence of 31 tokens",
        ),
        (
            2,
            ("--context-parallel-size", "2", "--seq-length", "30"),
            "seq-length 30 must divide by twice the context parallel size 2",
        ),
        (
            2,
            ("--context-parallel-size", "2", "--seq-length", "4"),
            "2 tokens a context-parallel rank are fewer than the 3 that GDN heads look back",
        ),
        (
            4,
            ("--tensor-model-parallel-size", "4", "--sequence-parallel", "--seq-length", "30"),
            "30 tokens a rank do not divide by",
        ),
        (
            4,
            ("--pipeline-model-parallel-size", "4", "--num-layers-per-virtual-pipeline-stage", "3"),
            "Megatron refuses these settings",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_layouts_are_refused_before_data_is_read(folder: Path, ranks: int, flags: tuple[str, ...], said: str) -> None:
    code, lines = run_ranks(_refused_among, 1, ranks, folder, ("--data-path", "nowhere", *flags))[0]
    assert code == 2 and said in lines and "nowhere.idx" not in lines and "Traceback" not in lines, lines
    assert not (folder / "run").exists()


def _refused_among(rank: int, ranks: int, folder: Path, flags: tuple[str, ...]) -> tuple[int, str]:
    """What the first of several ranks says; it must be refused before it waits for the others."""
    import os

    os.environ["WORLD_SIZE"] = str(ranks)
    argv = [
        "--stage",
        "extend",
        "--run-dir",
        str(folder / "run"),
        "--start-from",
        str(folder / "student"),
        *FLAGS,
        *flags,
    ]
    return training_ended(rank, argv)


def test_align_has_no_per_token_loss(folder: Path) -> None:
    assert "the align loss is a mean over rows" in refusal(folder, "--calculate-per-token-loss", stage="align")


def test_unknown_recipe_key(folder: Path) -> None:
    recipe = folder / "recipe.yaml"
    recipe.write_text("sequence-lenght: 512\n")
    assert "unknown key 'sequence-lenght'; did you mean 'seq-length'?" in refusal(folder, "--config", str(recipe))


def test_align_needs_a_teacher_that_is_there(folder: Path) -> None:
    assert "teacher nowhere: No such file" in refusal(folder, "--teacher", "nowhere", stage="align")


def test_previous_stage_is_missing(folder: Path) -> None:
    line = refusal(folder, "--start-from", "", stage="distill")
    assert "stage distill starts from" in line and "run stage align first" in line


def test_output_folder_of_another_run(folder: Path) -> None:
    other = folder / "other" / "extend"
    card = ModelCard.load(folder / "student")
    map_ = HeadMap.from_fa([(0, 0)], card.shape.num_layers, card.shape.num_heads, card.shape.num_kv_groups)
    dataclasses.replace(card, head_map=map_).save(other)
    before = (other / "model.json").read_bytes()
    assert "already holds another run (layer 0: FA heads 0 there, none here)" in refusal(folder, run="other")
    assert (other / "model.json").read_bytes() == before


def test_output_folder_of_something_else(folder: Path) -> None:
    (folder / "letters" / "extend").mkdir(parents=True)
    (folder / "letters" / "extend" / "dear.txt").write_text("x")
    assert "is not empty and no run of ours" in refusal(folder, run="letters")


def test_other_ranks_do_not_judge_a_folder_that_is_being_filled(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hydra_mcore.train.arguments import resolve

    save = folder / "filling" / "extend"
    save.mkdir(parents=True)
    (save / "model.json.partial").write_text("{")  # all that a start killed at once leaves
    argv = ["--stage", "extend", "--run-dir", str(save.parent), "--start-from", str(folder / "student"), *FLAGS]
    monkeypatch.setenv("RANK", "0")
    assert not resolve(argv).resume
    (save / "dear.txt").write_text("x")
    monkeypatch.setenv("RANK", "1")
    assert not resolve(argv).resume
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(InputError, match="is not empty and no run of ours"):
        resolve(argv)


def test_checkpoint_cut_short(folder: Path) -> None:
    shutil.copytree(folder / "student", folder / "cut")
    victim = max((folder / "cut").rglob("*.distcp"), key=lambda path: path.stat().st_size)
    victim.write_bytes(victim.read_bytes()[: victim.stat().st_size // 2])
    assert "the checkpoint is cut short" in refusal(folder, "--start-from", str(folder / "cut"))


def test_checkpoint_from_another_head_map(folder: Path) -> None:
    shutil.copytree(folder / "student", folder / "mixed")
    card = ModelCard.load(folder / "student")
    map_ = HeadMap.from_fa([(0, 0), (3, 1)], card.shape.num_layers, card.shape.num_heads, card.shape.num_kv_groups)
    dataclasses.replace(card, head_map=map_).save(folder / "mixed")
    line = refusal(folder, "--start-from", str(folder / "mixed"))
    assert (
        "are from another head map or shape (no tensor decoder.layers.0.self_attention.fa.linear_q.weight there)"
        in line
    )


@pytest.mark.parametrize(
    ("stage", "where"), [("align", r"align loss of layer \d"), ("extend", r"first seen in (the|layer)")]
)
def test_loss_that_is_not_finite(folder: Path, stage: str, where: str) -> None:
    run = f"nan-{stage}"
    line = refusal(folder, "--lr", "1e37", "--min-lr", "1e37", "--save-interval", "1", stage=stage, run=run)
    found = re.search(rf"step (\d+): the .*{where}", line)
    assert found and "the last complete checkpoint is kept" in line
    assert int((folder / run / stage / TRACKER).read_text()) == int(found[1]) - 1
    assert ModelCard.load(folder / run / stage).head_map == ModelCard.load(folder / "student").head_map
