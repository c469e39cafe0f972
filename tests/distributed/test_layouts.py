# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The law: the same weights and data give the same losses and gradients on every layout."""

import dataclasses
import itertools
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from PIL import Image

from hydra_mcore.config import HydraOptions, ModelCard
from hydra_mcore.kinds import KINDS
from hydra_mcore.train import training_log
from tests.support.launch import model_parallel, run_ranks
from tests.support.stages import SHAPE, gradients, make_run, run_stage

STAGES = ("align", "distill", "extend")
STEPS = ("--train-iters", "2", "--save-interval", "1", "--lr-warmup-iters", "1", "--micro-batch-size", "1")
STEPS += ("--head-statistics-interval", "1")
WATCHED = ("align", "distill", "extend", "kl", "ce", "grad-norm", *KINDS)
PACKED = ("--packed-documents",)
TP4_SP = ("--tensor-model-parallel-size", "4", "--sequence-parallel")


def layout(tp: int, cp: int, pp: int, dp: int, *more: str) -> tuple[int, tuple[str, ...]]:
    """(ranks, flags). Sequence parallelism and balanced FA heads come and go, so that both meet every other axis."""
    sizes = {"tensor-model-parallel-size": tp, "context-parallel-size": cp, "pipeline-model-parallel-size": pp}
    flags = [item for name, size in sizes.items() if size > 1 for item in (f"--{name}", str(size))]
    if tp > 1 and dp == 1:
        flags.append("--sequence-parallel")
    if tp > 1 and (cp + pp) % 2 == 0:
        flags += ["--fa-balance", "queries"]
    return tp * cp * pp * dp, (*flags, *more)


LAYOUTS = {
    f"tp{tp}-cp{cp}-pp{pp}-dp{dp}": layout(tp, cp, pp, dp)
    for tp, cp, pp, dp in itertools.product((1, 2, 4), (1, 2, 4), (1, 2), (1, 2))
    if 1 < tp * cp * pp * dp <= 8
}
LAYOUTS |= {
    "tp2-cp1-pp1-dp1-shared": layout(2, 1, 1, 1, "--fa-balance", "queries"),
    "tp4-cp2-pp1-dp1-shared": layout(4, 2, 1, 1, "--fa-balance", "queries"),
    "cp2-pp2-virtual": layout(1, 2, 2, 1, "--num-layers-per-virtual-pipeline-stage", "1"),
    "tp2-pp2-virtual": layout(2, 1, 2, 1, "--num-layers-per-virtual-pipeline-stage", "1"),
    # first and last stage hold no layer: nothing to train there in align
    "pp4-uneven": layout(1, 1, 4, 1, "--pipeline-model-parallel-layout", "E|tt|tt|L"),
    # several gradient buckets
    "cp2-dp2-overlap": layout(
        1, 2, 1, 2, "--overlap-grad-reduce", "--overlap-param-gather", "--ddp-bucket-size", "100"
    ),
    "cp2-per-token-loss": layout(1, 2, 1, 1, "--calculate-per-token-loss"),
    "cp2-full-recompute": layout(
        1, 2, 1, 1, "--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"
    ),
    "tp2-cp2-selective-recompute": layout(
        2, 2, 1, 1, "--recompute-granularity", "selective", "--recompute-modules", "core_attn"
    ),
}
# What `make test` runs; `make test-all` runs everything.
QUICK = {("tp2-cp2-pp2-dp1", stage, "packed") for stage in STAGES}
QUICK |= {("tp2-cp1-pp1-dp2", "align", "dense"), ("cp2-pp2-virtual", "distill", "dense")}
QUICK |= {
    ("tp1-cp4-pp1-dp1", "extend", "dense"),
    ("pp4-uneven", "align", "dense"),
    ("cp2-full-recompute", "distill", "packed"),
}
QUICK |= {("cp2-dp2-overlap", "distill", "dense")}
CASES = [
    pytest.param(name, stage, rows, marks=() if (name, stage, rows) in QUICK else pytest.mark.slow)
    for name, stage, rows in itertools.product(LAYOUTS, STAGES, ("dense", "packed"))
    if (name, stage) != ("cp2-per-token-loss", "align")
]
BIASED = [("tp2-cp1-pp1-dp1-shared", "align"), ("tp2-cp2-pp2-dp1", "distill"), ("tp4-cp2-pp1-dp1-shared", "extend")]
CASES += [
    pytest.param(name, stage, "biased", marks=() if stage == "align" else pytest.mark.slow) for name, stage in BIASED
]
CASES += [("tp2-cp2-pp1-dp1", "align", "heads")]
ROWS = {"packed": PACKED, "heads": ("--align-heads", "0.5")}


@pytest.fixture(scope="module", autouse=True)
def quick_pictures() -> Iterator[None]:
    """The statistics of heads are compared here, not looked at: their pictures are a third of a run's time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_log, "statistic_maps", lambda path, *_: Image.new("RGB", (1, 1)).save(path))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("layouts"))


@pytest.fixture(scope="module")
def biased(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Teachers of other families: biases on q, k and v, no q/k norm, scaled rotary frequencies."""
    shape = dataclasses.replace(
        SHAPE, qkv_bias=True, qk_norm=False, rope_scaling={"rope_type": "linear", "factor": 4.0}
    )
    return make_run(tmp_path_factory.mktemp("biased"), shape=shape)


@cache
def single(folder: Path, stage: str, *flags: str) -> tuple[dict[str, dict[int, float]], dict[str, torch.Tensor]]:
    """Losses of the steps on one process, and the gradients of the first step."""
    run = "-".join(("single", *(flag.strip("-") for flag in flags)))
    return run_stage(folder, stage, 1, *STEPS, *flags, run=run), gradients(folder / run / stage / "iter_0000001")


@pytest.mark.parametrize(("name", "stage", "rows"), CASES)
def test_losses_and_gradients_equal_one_process(folder: Path, biased: Path, name: str, stage: str, rows: str) -> None:
    ranks, flags = LAYOUTS[name]
    folder = biased if rows == "biased" else folder
    kind = ROWS.get(rows, ())
    per_token = tuple(flag for flag in flags if flag == "--calculate-per-token-loss")
    losses, expected = single(folder, stage, *kind, *per_token)
    found = run_stage(folder, stage, ranks, *STEPS, *flags, *kind, run=f"{name}-{rows}")
    compared = [tag for tag in losses if tag.startswith(WATCHED) and "samples" not in tag]
    assert {f"{stage} loss", "grad-norm", "gdn half-life/all", "kda half-life/all"} <= set(compared)
    for tag in compared:
        assert list(found[tag]) == [1, 2]
        for step, value in losses[tag].items():
            assert found[tag][step] == pytest.approx(value, rel=1e-5), f"{tag} at step {step}"
    assert_same_gradients(gradients(folder / f"{name}-{rows}" / stage / "iter_0000001"), expected)


def assert_same_gradients(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    scale = max(value.square().mean().sqrt() for value in expected.values())
    for name, value in expected.items():
        error = (found[name] - value).square().mean().sqrt()
        assert error <= 1e-4 * max(value.square().mean().sqrt(), 1e-4 * scale), name


# Every option away from its default, in sets, because shared K/V exclude per-head ones.
ABLATIONS = {
    "shared-kv": HydraOptions(
        qkv="shared", fusion="competition", fa_gate="headwise", gdn_gate="headwise", gate_order="after_norm",
        fa_position="rope", gdn_position="nope", gdn_conv_kernel=0, gdn_qk_norm="none", fusion_norm_weight="none",
        kda_gate="headwise", kda_position="nope", kda_conv_kernel=0, kda_qk_norm="none", lightning_gate="none",
        lightning_position="nope", lightning_qk_norm="none",
    ),
    "per-group": HydraOptions(
        gdn_kv="per_group", fusion="norm", fa_gate="none", gdn_gate="elementwise", gate_activation="silu",
        fa_log_scale="always",
        gdn_conv_activation="silu", gdn_write_max=2.0, gdn_half_life=10.0, fa_log_scale_base=20.0,
        kda_kv="per_group", kda_gate="elementwise", kda_conv_activation="silu", kda_write_max=2.0, kda_half_life=10.0,
        lightning_kv="per_group", lightning_gate="headwise", lightning_slope=0.1,
    ),
    "bare": HydraOptions(fusion="none", fa_gate="none", fa_log_scale="never", gdn_conv_kernel=2, kda_conv_kernel=2),
}  # fmt: skip


@pytest.mark.parametrize("options", ABLATIONS.values(), ids=ABLATIONS.keys())
def test_every_option_is_the_same_on_four_ranks(tmp_path: Path, options: HydraOptions) -> None:
    folder = make_run(tmp_path, options=options)
    one = run_stage(folder, "extend", 1, "--train-iters", "3", run="one")
    four = run_stage(folder, "extend", 4, *TP4_SP, "--train-iters", "3", run="four")
    for tag in ("extend loss", "grad-norm"):
        for step, value in one[tag].items():
            assert four[tag][step] == pytest.approx(value, rel=1e-5), f"{tag} at step {step}"


@pytest.mark.parametrize("more", [(), ("--calculate-per-token-loss",)], ids=["per micro-batch", "per token"])
def test_parts_that_count_different_numbers_of_tokens(folder: Path, more: tuple[str, ...]) -> None:
    """With ends of documents masked out, the parts of a row weigh by their tokens, not alike."""
    masked = ("--eod-mask-loss", *more)
    losses, expected = single(folder, "distill", *masked)
    unmasked, _ = single(folder, "distill", *more)
    assert losses["distill loss"][1] != pytest.approx(unmasked["distill loss"][1], rel=1e-4), "nothing was masked"
    run = f"masked-{len(more)}"
    found = run_stage(folder, "distill", 4, *STEPS, *masked, *layout(1, 4, 1, 1)[1], run=run)
    for tag in ("distill loss", "kl", "grad-norm"):
        for step, value in losses[tag].items():
            assert found[tag][step] == pytest.approx(value, rel=1e-5), f"{tag} at step {step}"
    assert_same_gradients(gradients(folder / run / "distill" / "iter_0000001"), expected)


@pytest.mark.parametrize(
    "stage", ["distill", *(pytest.param(stage, marks=pytest.mark.slow) for stage in ("align", "extend"))]
)
def test_validation_losses_equal_one_process(folder: Path, stage: str) -> None:
    validation = ("--split", "50,50,0", "--eval-iters", "1", "--eval-interval", "1", "--packed-documents")
    one = run_stage(folder, stage, 1, *STEPS, *validation, run="validation-1")
    four = run_stage(folder, stage, 4, *STEPS, *validation, *layout(1, 2, 2, 1)[1], run="validation-4")
    tags = [tag for tag in one if "validation" in tag and "vs samples" not in tag and "ppl" not in tag]
    assert any(f"{stage} loss" in tag for tag in tags)
    for tag in tags:
        for step, value in one[tag].items():
            assert four[tag][step] == pytest.approx(value, rel=1e-5), f"{tag} at step {step}"


def test_biases_stored_by_two_ranks_load_on_one(biased: Path, tmp_path: Path) -> None:
    run_ranks(_store_by_two, 2, biased / "student", tmp_path / "two")
    (expected,), (found,) = (
        run_ranks(_parameters, 1, checkpoint) for checkpoint in (biased / "student", tmp_path / "two")
    )
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    # Layer 2 keeps three FA heads, of both groups; each of its five GDN heads has keys and values of its own.
    layer = "decoder.layers.2.self_attention."
    rows = {"fa.linear_q": 3 * 8, "fa.linear_kv": 2 * 16, "gdn.linear_q": 5 * 8, "gdn.linear_kv": 5 * 16}
    assert {name: found[f"{layer}{name}.bias"].shape for name in rows} == {
        name: (count,) for name, count in rows.items()
    }
    assert all(
        value.count_nonzero() == value.numel()
        for name, value in found.items()
        if name.endswith(("_q.bias", "_kv.bias"))
    )


def _store_by_two(rank: int, source: Path, target: Path) -> None:
    from hydra_mcore.model.build import build_model
    from hydra_mcore.model.checkpoints import load_weights, save_weights

    with model_parallel(tp=2):
        card = ModelCard.load(source)
        model = build_model(card)
        load_weights([model], source)
        save_weights([model], card, target)


def _parameters(rank: int, checkpoint: Path) -> dict[str, torch.Tensor]:
    from hydra_mcore.model.build import load_model

    with model_parallel():
        return {name: parameter.detach() for name, parameter in load_model(checkpoint)[1].named_parameters()}


@pytest.mark.parametrize(("whose", "stage"), [("student", "extend"), ("teacher", "distill")])
def test_a_stage_turns_by_the_scaled_frequencies(biased: Path, tmp_path: Path, whose: str, stage: str) -> None:
    """The same weights with a card that does not scale have another loss."""
    run = shutil.copytree(biased, tmp_path / "run")
    card = ModelCard.load(run / whose)
    dataclasses.replace(card, shape=dataclasses.replace(card.shape, rope_scaling=None)).save(run / whose)
    losses, _ = single(biased, stage)
    found = run_stage(run, stage, 1, *STEPS, run="unscaled")
    assert found[f"{stage} loss"][1] != pytest.approx(losses[f"{stage} loss"][1], rel=1e-4)
