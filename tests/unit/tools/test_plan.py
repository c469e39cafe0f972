# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The planner's command line: recipes of the examples, what makes a layout fit that does not, bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hydra_mcore.heads import HeadMap
from tests.support.paths import ROOT
from tools.plan.__main__ import main

SMALL, LARGE = (str(ROOT / "examples" / name / "recipe.yaml") for name in ("qwen3-1.7b", "qwen3-8b"))


def plan(tmp_path: Path, *flags: str) -> dict:
    main([*flags, "--json", str(tmp_path / "plan.json")])
    return json.loads((tmp_path / "plan.json").read_text())["stages"]


@pytest.mark.parametrize("recipe", [SMALL, LARGE], ids=["1.7b", "8b"])
def test_the_examples_fit_one_node(tmp_path: Path, recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    stages = plan(tmp_path, "--config", recipe, "--price", "2.5")
    assert list(stages) == ["align", "distill", "extend"]
    assert all(stage["fits"] for stage in stages.values())
    assert sum(stage["tokens"] for stage in stages.values()) == pytest.approx(15e9, rel=1e-3)
    text = capsys.readouterr().out
    assert "heads not selected yet: assumed 3:1" in text and "at 2.5 a GPU-hour" in text


def test_the_recipe_s_kinds_of_other_heads_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In all layers or by layer, as select would have it."""
    flags = ["--stage", "extend", "--config", SMALL]
    plain = plan(tmp_path, *flags)["extend"]
    assert "the others Gated DeltaNet (GDN) heads\n" in capsys.readouterr().out
    hypenet = plan(tmp_path, *flags, str(ROOT / "examples" / "qwen3-1.7b" / "hypenet.yaml"))["extend"]
    said = capsys.readouterr().out
    assert "the others Lightning attention (Lightning) heads\n" in said and "| Lightning head" in said
    assert "GDN" not in said
    (tmp_path / "mixed.yaml").write_text("select: {linear: [lightning, 0-1=kda]}\n")
    mixed = plan(tmp_path, *flags, str(tmp_path / "mixed.yaml"))["extend"]
    said = capsys.readouterr().out
    assert "heads in layers 0 to 1, Lightning attention (Lightning) heads in layers 2 to 27\n" in said
    assert "| KDA head" in said
    assert len({stage["flops"] for stage in (plain, hypenet, mixed)}) == 3


def test_numbers_by_hand(tmp_path: Path) -> None:
    """Qwen3-1.7B, extend on 8 GPUs: memory that stands, and the time of its FLOPs."""
    stage = plan(tmp_path, "--config", SMALL, "--stage", "extend", "--efficiency", "0.5")["extend"]
    parameters, memory = 1_869_298_096, stage["memory"]
    assert memory["weights"] == 2 * parameters and memory["gradients"] == 4 * parameters and memory["teacher"] == 0
    assert memory["optimizer"] == 12 * parameters / 8
    assert memory["total"] == sum(value for part, value in memory.items() if part != "total")
    assert stage["seconds"]["computing"] == pytest.approx(stage["flops"] / (8 * 989e12 * 0.5))
    assert stage["gpu_hours"] == pytest.approx(8 * stage["step_seconds"] * 4768 / 3600)


def test_what_does_not_fit_is_mended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layout = ["--tensor-model-parallel-size", "1", "--context-parallel-size", "1"]
    assert not plan(tmp_path, "--config", LARGE, "--stage", "extend", *layout)["extend"]["fits"]
    text = capsys.readouterr().out
    flags = text.split("smallest change that fits: ")[1].split(" (")[0].split()
    assert plan(tmp_path, "--config", LARGE, "--stage", "extend", *layout, *flags)["extend"]["fits"]


def test_the_fastest_layouts_all_fit(tmp_path: Path) -> None:
    found = plan(tmp_path, "--config", SMALL, "--stage", "extend", "--gpus", "4", "--layouts", "3")["extend"]
    assert len(found) == 3 and all(at["fits"] for at in found)
    assert [at["step_seconds"] for at in found] == sorted(at["step_seconds"] for at in found)
    first = plan(tmp_path, "--config", SMALL, "--stage", "extend", "--gpus", "4", *found[0]["flags"].split())["extend"]
    assert first["memory"] == found[0]["memory"]


def test_a_head_map_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All FA heads in few layers: more attention work on one rank than on the others."""
    HeadMap.from_fa([(layer_idx, head_idx) for layer_idx in range(28) for head_idx in range(3)], 28, 16, 8).save(
        tmp_path / "map.json"
    )
    flags = ["--config", SMALL, "--stage", "extend", "--head-map", str(tmp_path / "map.json")]
    flags += ["--tensor-model-parallel-size", "4", "--context-parallel-size", "1"]
    uneven = plan(tmp_path, *flags)["extend"]
    assert "84 FA heads" in capsys.readouterr().out
    assert (
        uneven["seconds"]["imbalance"]
        > 0
        == plan(tmp_path, *flags, "--fa-balance", "queries")["extend"]["seconds"]["imbalance"]
    )


def test_imitations_are_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ten memories; the recurrence reads 2,048 columns of values, and the fit solves for as many unknowns."""
    plan(tmp_path, "--config", SMALL, "--stage", "align", "--gpus", "1", "--efficiency", "0.5")
    tokens, hidden, head_dim = 16 * 512, 2048, 128
    flops = 28 * 16 * 10 * (8 * head_dim * hidden * tokens + hidden**2 * tokens + 5 * hidden**3 / 3)
    said = f"--replaceable-by gdn): {flops:.1e} operations in float32, {flops / (67e12 * 0.5):.0f} s of 1 GPU."
    assert said in capsys.readouterr().out


def test_imitations_of_a_map_without_linear_heads_are_the_default_kind_s(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    HeadMap.all_fa(28, 16, 8).save(tmp_path / "map.json")
    plan(tmp_path, "--config", SMALL, "--stage", "align", "--head-map", str(tmp_path / "map.json"))
    assert "--replaceable-by gdn)" in capsys.readouterr().out


def plan_evaluation(tmp_path: Path, *flags: str) -> list[dict]:
    main(["--stage", "evaluate", *flags, "--json", str(tmp_path / "plan.json")])
    return json.loads((tmp_path / "plan.json").read_text())["evaluate"]


@pytest.mark.parametrize("recipe", [SMALL, LARGE], ids=["1.7b", "8b"])
def test_512k_tokens_fit_one_node_of_80_gb(tmp_path: Path, recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = plan_evaluation(tmp_path, "--config", recipe, "--gpu", "h100-80gb", "--gpus", "8")
    assert all(at["fits"] for at in found) and "\nFits: 72.7 GiB usable" in capsys.readouterr().out
    assert [at["model"] for at in found if at["run"]["length"] == 524_288] == ["teacher", "student"]
    assert all(at["run"]["cp_size"] == 8 for at in found)


def test_an_evaluation_by_hand(tmp_path: Path) -> None:
    """Qwen3-1.7B's teacher at 512K tokens on eight ranks: 28 layers of 16 heads, 8 kv groups, 128 dimensions, bf16."""
    flags = [
        "--config",
        SMALL,
        "--lengths",
        "524288",
        "--tasks",
        "niah_single_1",
        "--prompts",
        "10",
        "--efficiency",
        "0.5",
    ]
    teacher, _ = plan_evaluation(tmp_path, *flags)
    length, part, memory = 524_288, 65_536, teacher["memory"]
    assert memory["weights"] == 2 * 1_720_574_976 and memory["kept"] == 0
    around = 3 * part * 2048 * 2 + (length + part) * 128 * 4
    keys_values = 2 * 128 * 2 * (8 * (length + part) + 16 * length)
    attended = part * 128 * 2 * (4 * 16)  # more than queries with rotary, as by head keys and values stand beside it
    token_ids = 3 * 8 * length + 2 * 8 * part
    assert memory["forward"] == around + keys_values + attended + token_ids
    attention = 28 * 16 * 2 * 2 * 128 * length * (length + 1) / 2
    products = 2 * length * 28 * 2048 * (2 * 2048 + 2 * 1024 + 3 * 6144)
    assert teacher["seconds"] == pytest.approx((attention + products) / (8 * 989e12 * 0.5))
    assert teacher["hours"] == pytest.approx(10 * teacher["seconds"] / 3600)
    decoding, _ = plan_evaluation(tmp_path, *flags, "--scoring", "generation")
    assert decoding["memory"]["kept"] == 28 * 2 * 8 * 128 * 2 * (part + 128)


def test_one_gpu_is_not_enough_for_512k_tokens_of_8b(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--config", LARGE, "--context-parallel-size", "1", "--gpus", "1", "--lengths", "4096", "524288"]
    assert [at["fits"] for at in plan_evaluation(tmp_path, *flags)] == [True, False, True, False]
    assert "DOES NOT FIT" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gpus", "4"], "4 GPUs are no multiple of tensor 1 x pipeline 1 x context parallel 8"),
        (["--pipeline-model-parallel-size", "3", "--gpus", "24"], "3 ranks do not divide the number of layers of 28"),
        (
            ["--tensor-model-parallel-size", "3", "--gpus", "24"],
            "tensor parallel size 3 does not divide 16 query heads",
        ),
        (["--tasks", "everything"], "--tasks everything: unknown"),
        (["--seq-length", "4096"], "unrecognized arguments: --seq-length"),
    ],
)
def test_bad_input_to_an_evaluation_s_plan(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--config", SMALL, "--stage", "evaluate", *flags])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gpu", "h100"], "unknown GPU 'h100'; choose one of a100-40gb"),
        (["--gpus", "0"], "--gpus and --layouts must be at least 1"),
        (["--efficiency", "35"], "--efficiency above 0 and at most 1"),
        (["--ratio", "3-1"], "ratio '3-1'"),
        (["--head-map", "nowhere.json"], "head map nowhere.json: No such file"),
        (["--hf", "nowhere"], "nowhere"),
        (["--tensor-model-parallel", "2"], "unknown flag --tensor-model-parallel"),
        (["--tensor-model-parallel-size", "3"], "tensor parallel size 3 does not divide 16 query heads"),
        (["--gpus", "7"], "does not divide 7 ranks"),
        (["--micro-batch-size", "3", "--context-parallel-size", "1"], "does not divide by micro-batch-size 3"),
        (["--num-layers-per-virtual-pipeline-stage", "2"], "is not planned for"),
        (["--bf16", "--fp8-format", "hybrid"], "--fp8-format is not planned for"),
    ],
)
def test_bad_input_is_one_line_and_status_2(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--config", SMALL, "--stage", "extend", *flags])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_recipe_without_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "recipe.yaml").write_text("global-batch-size: 8\n")
    with pytest.raises(SystemExit):
        main(["--config", str(tmp_path / "recipe.yaml"), "--stage", "extend"])
    assert "put config.json beside the recipe" in capsys.readouterr().err


def test_help_needs_no_torch() -> None:
    code = (
        "import sys; sys.argv = ['plan', '--help']\nfrom tools.plan.__main__ import main\ntry:\n    main()\nexcept"
        " SystemExit:\n    pass\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code + "print('torch' in sys.modules)"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout.endswith("False\n") and "examples:" in done.stdout
