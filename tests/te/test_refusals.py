# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""What training says to settings of Transformer Engine where it is there: those that cannot work, and those that do."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from hydra_mcore.train.arguments import recipe_flags
from tests.distributed.test_bad_input import arguments, refusal
from tests.support.commands import training_ended
from tests.support.launch import run_ranks
from tests.support.stages import SHAPE, make_run
from tools.commands.flag_table import WORKS_WITH_TE

FP8 = ("--fp8-format", "hybrid")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Heads of 16, and an MLP of 48 that two ranks would cut to 24."""
    return make_run(tmp_path_factory.mktemp("refused"), shape=dataclasses.replace(SHAPE, head_dim=16))


def test_without_a_word_its_layers_are_used() -> None:
    parser, recipe, _ = recipe_flags(["--stage", "align"], with_gpu=True)
    assert parser.parse_args(recipe.to_flags(parser)).transformer_impl == "transformer_engine"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ((*FP8, "--fp8-recipe", "delayed"), "fp8-recipe is delayed; the stages train with tensorwise or blockwise"),
        ((*FP8, "--fp8-recipe", "mxfp8"), "fp8-recipe is mxfp8; the stages train with tensorwise or blockwise"),
        ((*FP8, "--seq-length", "36"), "tokens (seq-length x micro-batch-size) is 72, no multiple of 16"),
        ((*FP8, "--transformer-impl", "local"), "fp8-format needs transformer-impl transformer_engine, not local"),
        (("--first-last-layers-bf16",), "first-last-layers-bf16 says where FP8 is used; set fp8-format"),
        ((*FP8, "--fp8-param-gather"), "--fp8-param-gather: cannot be used here"),
        (
            (*FP8, "--recompute-granularity", "selective", "--recompute-modules", "layernorm"),
            "fp8-format keeps the inputs that recompute-modules layernorm drops",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_settings(folder: Path, flags: tuple[str, ...], said: str) -> None:
    assert said in refusal(folder, *flags)


def test_sizes_that_fp8_does_not_take(folder: Path, tmp_path: Path) -> None:
    two_ranks = (*FP8, "--tensor-model-parallel-size", "2")
    assert "the MLP's width on a tensor-parallel rank is 24" in refusal(folder, *two_ranks, ranks=2)
    assert "the size of a head is 8" in refusal(make_run(tmp_path), *FP8)


TAKEN = {
    "no-gradient-accumulation-fusion": {"no-gradient-accumulation-fusion": False},
    "no-rope-fusion": {"no-rope-fusion": False},
    "first-last-layers-bf16": {"fp8-format": "hybrid", "first-last-layers-bf16": True},
    "num-layers-at-start-in-bf16": {"fp8-format": "e4m3", "num-layers-at-start-in-bf16": 2},
    "num-layers-at-end-in-bf16": {"fp8-format": "hybrid", "num-layers-at-end-in-bf16": 2},
}


def test_what_works_with_transformer_engine_is_taken(folder: Path, tmp_path: Path) -> None:
    assert set(TAKEN) == WORKS_WITH_TE
    for values in (*TAKEN.values(), {"fp8-format": "hybrid", "fp8-recipe": "blockwise", "teacher-fp8": True}):
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(values))
        code, said = run_ranks(training_ended, 1, arguments(folder, "--config", str(recipe), "--dry-run"))[0]
        assert (code, said) == (0, ""), values
