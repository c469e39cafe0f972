# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""A study's file, the commands that it stands for, and its numbers; tests/slurm/test_study.py runs one."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from hydra_mcore.config import ConfigError, HydraOptions
from hydra_mcore.errors import InputError
from hydra_mcore.recipe import Recipe, parse_with_recipe
from hydra_mcore.train.arguments import recipe_flags
from tests.support.paths import ROOT
from tools import convert, evaluate, select_heads
from tools.commands.study import job_lines
from tools.studies.figure import drawn, write_figure
from tools.studies.file import Study, laid_over
from tools.studies.run import describe, write_recipe
from tools.studies.steps import shared_jobs, variant_jobs
from tools.studies.table import Value, difference, over_prompts, over_seeds, read, tables, write_csv
from tools.study import main

RECIPE = {
    "run-dir": "run",
    "seed": 5,
    "data-cache-path": "cache{seed}",
    "align": {"train-iters": 3, "global-batch-size": 2, "seq-length": 64},
    "import": {"hf": "hf", "out": "teacher"},
    "select": {"teacher": "teacher", "out": "heads", "ratio": "3:1"},
    "hybridize": {
        "teacher": "teacher",
        "head-map": "heads/head_map.json",
        "out": "student",
        "scores": "heads/scores.json",
    },
    "evaluate": {
        "models": ["teacher=teacher", "student=extend"],
        "yarn": ["teacher"],
        "lengths": [64],
        "out": "report",
    },
}
STUDY: dict[str, Any] = {
    "recipes": ["recipe.yaml"],
    "out": "runs/it",
    "stages": ["align"],
    "seeds": [0, 3],
    "over": {"hybridize": {"fa_position": "rope"}, "data-path": "data{seed}"},
    "variants": {
        "chosen 3:1": {},
        "any": {"select": {"strategy": "global_random"}},
        "longer": {"select": {"pairs": 9}},
    },
}


def study_of(folder: Path, **changes: Any) -> Study:
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    raw = {key: value for key, value in (STUDY | changes).items() if value is not None}
    (folder / "study.yaml").write_text(yaml.safe_dump(raw, sort_keys=False))
    return Study.load(folder / "study.yaml")


def test_every_combination_of_the_axes_is_a_variant(tmp_path: Path) -> None:
    axes = {"hybridize.fa_gate": ["none", "headwise"], "heads": {"best": {}, "any": {"select": {"ratio": "7:1"}}}}
    study = study_of(tmp_path, variants=None, axes=axes)
    assert [(variant.name, variant.over) for variant in study.variants] == [
        ("fa_gate none, best", {"hybridize": {"fa-gate": "none"}}),
        ("fa_gate none, any", {"hybridize": {"fa-gate": "none"}, "select": {"ratio": "7:1"}}),
        ("fa_gate headwise, best", {"hybridize": {"fa-gate": "headwise"}}),
        ("fa_gate headwise, any", {"hybridize": {"fa-gate": "headwise"}, "select": {"ratio": "7:1"}}),
    ]
    assert study.base == "fa_gate none, best" and study.variants[0].slug == "fa-gate-none-best"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"variant": {}}, "unknown key 'variant'; did you mean 'variants'?"),
        ({"axes": {"lr": [1]}}, "give 'variants' or 'axes', one of them"),
        ({"variants": None}, "give 'variants' or 'axes', one of them"),
        ({"variants": {}}, "'variants' holds no values"),
        ({"variants": None, "axes": {"hybrid.lr": [1]}}, "axis 'hybrid.lr': no section is called 'hybrid'"),
        ({"variants": {"a b": {}, "a-b": {}}}, "variant 'a b': its name is no folder of its own"),
        ({"variants": {"a": {"select": 3}}}, "variant 'a': 'select': expected 'key: value' lines under it"),
        ({"variants": {"a": {"lr": {"x": 3}}}}, "variant 'a': 'lr': no section is called so"),
        ({"base": "b"}, "base 'b' is none of the variants"),
        ({"stages": ["aline"]}, "no stage is called 'aline'"),
        ({"seeds": [1, 1]}, "'seeds' names one twice"),
        ({"seeds": ["1"]}, "'seeds' is a list of whole numbers"),
        ({"recipes": []}, "'recipes' names no file"),
        ({"out": None}, "'out' is the folder of the study"),
    ],
)
def test_broken_studies_are_one_line(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        study_of(tmp_path, **changes)
    line = str(refused.value)
    assert line.startswith(f"study {tmp_path}/study.yaml: {said}") and "\n" not in line


@pytest.mark.parametrize(
    ("left_out", "said"),
    [("import", "section 'import' needs 'hf', shared"), ("evaluate", "section 'evaluate' needs 'lengths', shared")],
)
@pytest.mark.parametrize("command", ["run --dry-run", "run", "steps --job 0"])
def test_a_recipe_that_lacks_a_section_is_refused_before_anything_is_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, left_out: str, said: str
) -> None:
    study = study_of(tmp_path, out=str(tmp_path / "out"))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({key: v for key, v in RECIPE.items() if key != left_out}))
    name, *flags = command.split()
    with pytest.raises(SystemExit) as end:
        main([name, str(study.path), *flags])
    line = capsys.readouterr().err
    assert end.value.code == 2 and line.count("\n") == 1 and f"{tmp_path}/recipe.yaml: {said}" in line
    assert not study.out.exists()


@pytest.mark.parametrize(
    ("over", "said"),
    [
        (
            {"select": {"ratoi": "3:1"}},
            "odd, seed 0, select: recipe {recipe}: unknown key 'ratoi'; did you mean",
        ),
        ({"hybridize": {"fa-gate": "big"}}, "odd, seed 0, hybridize: argument --fa-gate: invalid choice: 'big'"),
        ({"hybridize": {"gdn-conv-kernel": -1}}, "odd, seed 0, hybridize: gdn_conv_kernel"),
        ({"align": {"lr": "fast"}}, "odd, seed 0, align: argument --lr: invalid float value: 'fast'"),
        ({"learning-rate": 1}, "odd, seed 0, align: recipe {recipe}: unknown key 'learning-rate'"),
        ({"evaluate": {"prompts": "few"}}, "odd, seed 0, evaluate: argument --prompts: invalid"),
    ],
)
@pytest.mark.parametrize("command", ["run --dry-run", "run", "steps --job shared"])
def test_a_flag_of_a_variant_is_refused_before_anything_is_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, over: dict[str, Any], said: str
) -> None:
    study = study_of(tmp_path, out=str(tmp_path / "out"), variants={"chosen": {}, "odd": over})
    name, *flags = command.split()
    with pytest.raises(SystemExit) as end:
        main([name, str(study.path), *flags])
    line = capsys.readouterr().err
    assert end.value.code == 2 and line.count("\n") == 1
    assert f"study {study.path}: {said.format(recipe=tmp_path / 'recipe.yaml')}" in line
    assert not study.out.exists()


def test_every_job_has_its_own_places_and_seeds(tmp_path: Path) -> None:
    study = study_of(tmp_path)
    jobs = variant_jobs(study)
    assert [job.name for job in jobs[:4]] == [
        "chosen 3:1, seed 0",
        "any, seed 0",
        "longer, seed 0",
        "chosen 3:1, seed 3",
    ]
    over = jobs[3].overlay()
    assert over["run-dir"] == "runs/it/seed3/chosen-3to1" and over["seed"] == 8
    assert over["data-path"] == "data3" and over["data-cache-path"] == "cache3"
    scores = "runs/it/seed3/shared/heads/scores.json"
    assert over["select"] == {"seed": 3, "out": "runs/it/seed3/chosen-3to1/heads", "scores": scores}
    assert over["hybridize"] == {
        **{"fa-position": "rope", "seed": 1237, "scores": scores, "out": "runs/it/seed3/chosen-3to1/student"},
        "head-map": "runs/it/seed3/chosen-3to1/heads/head_map.json",
    }
    assert over["evaluate"]["models"] == ["chosen 3:1=runs/it/seed3/chosen-3to1/align"]
    assert over["evaluate"]["seed"] == 1_000_003 and over["evaluate"]["yarn"] is None
    shared = shared_jobs(study)[1].overlay()
    assert shared["evaluate"]["models"] == ["teacher=teacher"] and "yarn" not in shared["evaluate"]
    assert shared["evaluate"]["out"] == over["evaluate"]["out"] == "runs/it/seed3/evaluation"


def test_variables_keep_what_the_recipes_make_of_them(tmp_path: Path) -> None:
    """A job's own run folder does not move the teacher, which all jobs share."""
    study = study_of(tmp_path, seeds=[3])
    with_variables = {
        **RECIPE,
        "teacher": "${run-dir}/teacher",
        "data-path": "data",
        "import": {"hf": "hf", "out": "${teacher}"},
        "select": {"teacher": "${teacher}", "text": "${data-path}.txt", "out": "${run-dir}/heads"},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(with_variables))
    over = variant_jobs(study)[0].overlay()
    assert over["teacher"] == over["select"]["teacher"] == "run/teacher" and "hf" not in over["import"]
    assert over["select"]["text"] == "data3.txt"  # as the study's own settings say
    assert over["select"]["out"] == "runs/it/seed3/chosen-3to1/heads"
    assert shared_jobs(study)[0].overlay()["evaluate"]["models"] == ["teacher=run/teacher"]


def test_scores_are_shared_where_they_are_the_same(tmp_path: Path) -> None:
    """Random heads need none; a variant that scores otherwise makes its own."""
    chosen, at_random, longer = (job.overlay() for job in variant_jobs(study_of(tmp_path, seeds=[0])))
    assert "scores" in chosen["select"] and "scores" not in at_random["select"] | longer["select"]
    assert at_random["hybridize"]["scores"] == "runs/it/seed0/shared/heads/scores.json"
    assert longer["hybridize"]["scores"] == "runs/it/seed0/longer/heads/scores.json"
    unscored = {"chosen": {}, "any": {"select": {"strategy": "global_random", "pairs": 9}}}
    at_random = variant_jobs(study_of(tmp_path, variants=unscored, seeds=[0]))[1].overlay()
    assert at_random["hybridize"]["scores"] == "runs/it/seed0/shared/heads/scores.json"


def test_steps_come_in_their_order(tmp_path: Path) -> None:
    study = study_of(tmp_path, setup=["-m examples.tiny.data --seed {seed}"], seeds=[7])
    (shared,), (variant, *_) = shared_jobs(study), variant_jobs(study)
    assert [step.name for step in shared.steps()][1:] == ["import", "head selection", "evaluation"]
    assert shared.steps()[0].words == ("-m", "examples.tiny.data", "--seed", "7")
    assert [step.name for step in variant.steps()] == ["head selection", "student", "align", "evaluation"]
    config = ("--config", str(tmp_path / "recipe.yaml"), "runs/it/seed7/chosen-3to1/recipe.yaml")
    assert variant.steps()[2].words == ("-m", "hydra_mcore.train", *config, "--stage", "align")


def test_a_folder_keeps_the_settings_that_it_was_made_with(tmp_path: Path) -> None:
    study = study_of(tmp_path, out=str(tmp_path / "out"), seeds=[0])
    for job in variant_jobs(study):
        write_recipe(job)
    (job, *_) = variant_jobs(
        study_of(tmp_path, out=str(tmp_path / "out"), over={**STUDY["over"], "evaluate": {"prompts": 3}})
    )
    write_recipe(job)  # a student may be asked more
    assert Recipe.load(job.recipes, "evaluate").values["prompts"] == 3
    (job, *_) = variant_jobs(study_of(tmp_path, out=str(tmp_path / "out"), over={"hybridize": {"fa-position": "nope"}}))
    with pytest.raises(
        InputError, match=r"chosen-3to1: was made with another 'data-path'; call the variant by another"
    ):
        write_recipe(job)


def test_a_job_s_commands_for_a_shell(tmp_path: Path) -> None:
    study = study_of(tmp_path, out=str(tmp_path / "out"), setup=["-m my.data --name 'two words'"])
    shared = job_lines(study, "shared")
    assert shared[0] == shared[4] == "alone -m my.data --name 'two words'"
    assert [line.split()[0] for line in shared] == ["alone", "alone", "ranks", "ranks"] * 2
    lines = job_lines(study, "5")
    assert lines[0].startswith("ranks tools/select_heads.py --config ") and len(lines) == 4
    assert str(tmp_path / "out/seed3/longer/recipe.yaml") in lines[0]
    assert (tmp_path / "out/seed3/longer/recipe.yaml").exists()
    for wrong in ("6", "-1", "x"):
        with pytest.raises(InputError, match=f"--job {wrong}: there are shared and 0 to 5"):
            job_lines(study, wrong)


def test_overlays_win_key_by_key() -> None:
    merged = laid_over({"lr": 1, "align": {"lr": 2, "x": 3}}, {"align": {"lr": 4}})
    assert merged == {"lr": 1, "align": {"lr": 4, "x": 3}}


def test_differences_and_their_intervals() -> None:
    """Student's t over seeds (2, 4 and 6: mean 4, standard error 2 / sqrt(3)); over prompts Newcombe's own example."""
    low, high = over_seeds([2.0, 4.0, 6.0])
    assert (low + high) / 2 == pytest.approx(4) and (high - low) / 2 == pytest.approx(4.303 * 2 / math.sqrt(3))
    assert over_prompts(Value(100 * 56 / 70, 70), Value(100 * 48 / 80, 80)) == pytest.approx((5.24, 33.39), abs=0.01)
    assert over_prompts(Value(0.0, 10), Value(0.0, 10)) == pytest.approx((-27.75, 27.75), abs=0.01)
    assert over_prompts(Value(12.0), Value(11.0)) is None
    both = {0: Value(70, 10), 1: Value(80, 10)}, {0: Value(50, 10), 1: Value(60, 10), 2: Value(0, 10)}
    assert difference(*both) == "+20 (+20 to +20)" and difference(both[0], None) == "-"


def results(folder: Path, models: dict[str, tuple[int, float]]) -> None:
    """An evaluation's file: right ones of ten single keys at 64 tokens, perplexity."""
    entries = {}
    for name, (right, perplexity) in models.items():
        agreement = {"with": "teacher", "share": 0.5}
        entries[name] = {
            "groups": [{"group": "single-key", "length": 64, "accuracy": right / 10, "total": 10}],
            "text": [{"length": 64, "perplexity": perplexity, "agreement": agreement}],
        }
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps({"models": entries}))


def test_the_table_of_two_seeds(tmp_path: Path) -> None:
    study = study_of(tmp_path, out=str(tmp_path / "out"))
    with pytest.raises(InputError, match="no model has been evaluated there"):
        read(study)
    results(tmp_path / "out/seed0/evaluation", {"any": (2, 30.0), "teacher": (10, 9.0), "chosen 3:1": (6, 20.0)})
    results(tmp_path / "out/seed3/evaluation", {"teacher": (9, 9.0), "chosen 3:1": (8, 22.0)})
    said = tables(read(study))
    assert "| teacher | 95 (100, 90) |\n| chosen 3:1 | 70 (60, 80) |\n| any | 20 (6-51) |" in said
    assert "| single-key, difference to chosen 3:1 | 64 |" in said and "| any | -40 (-67 to +2) |" in said
    assert (
        "| perplexity | 64 |\n| :-- | --: |\n| teacher | 9.0 (9.0, 9.0) |\n| chosen 3:1 | 21.0 (20.0, 22.0) |" in said
    )
    assert "| agreement with the teacher | 64 |\n| :-- | --: |\n| chosen 3:1 |" in said
    path = tmp_path / "out/seed0/evaluation/results.json"
    found = json.loads(path.read_text())
    found["models"]["teacher"]["text"].append(found["models"]["teacher"]["text"][0] | {"length": 128})
    path.write_text(json.dumps(found))  # another study with this folder has asked for more
    assert tables(read(study)) == said
    write_csv(tmp_path / "all.csv", read(study))
    rows = list(csv.DictReader((tmp_path / "all.csv").open()))
    assert rows[0] == {
        "model": "teacher",
        "measure": "single-key",
        "length": "64",
        "seed": "0",
        "value": "100",
        "prompts": "10",
    }
    assert len(rows) == 5 * 2 + 3
    write_figure(tmp_path / "all.png", read(study))
    assert (tmp_path / "all.png").read_bytes().startswith(b"\x89PNG")


def test_many_variants_are_drawn_as_differences(tmp_path: Path) -> None:
    names = [f"variant {number}" for number in range(12)]
    study = study_of(tmp_path, out=str(tmp_path / "out"), base=names[0], variants={name: {} for name in names})
    for seed, more in ((0, 0), (3, 1)):
        scores = {name: (number % 8 + more * (number % 3), 20.0 + number) for number, name in enumerate(names)}
        results(tmp_path / f"out/seed{seed}/evaluation", {"teacher": (10, 9.0), **scores})
    figure = drawn(read(study))
    panels = [axes for axes in figure.axes if axes.get_title()]
    assert [axes.get_title() for axes in panels] == ["single-key", "perplexity", "agreement with the teacher"]
    assert [label.get_text() for label in panels[0].get_yticklabels()] == names[1:]  # without teacher and base
    middles = [line.get_xdata()[0] for line in panels[1].lines if line.get_marker() != "None"]
    assert middles == pytest.approx(range(1, 12))
    spans = [line.get_xdata() for line in panels[0].lines if line.get_marker() == "None"][:2]
    assert spans[0] == pytest.approx(over_seeds([10, 20])) and spans[1] == pytest.approx(over_seeds([20, 40]))
    for seed in study.seeds:  # before the base is finished
        path = tmp_path / f"out/seed{seed}/evaluation/results.json"
        models = json.loads(path.read_text())["models"]
        path.write_text(json.dumps({"models": {name: models[name] for name in models if name != names[0]}}))
    assert {"teacher", *names[1:]} <= {line.get_label() for line in drawn(read(study)).axes[0].lines}


STUDIES = sorted(path for path in (ROOT / "examples" / "studies").glob("*/*.yaml") if path.name != "base.yaml")


def test_the_study_of_the_page_can_be_run(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "studies.md").read_text()
    block = re.search(r"```yaml\n(.*?)```", page, re.DOTALL)[1]
    (tmp_path / "my_study.yaml").write_text(block.replace("examples/", f"{ROOT}/examples/"))
    check_commands(tmp_path / "my_study.yaml", tmp_path)


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: "/".join(path.parts[-2:]))
def test_studies_that_come_along_are_known_to_their_commands(path: Path, tmp_path: Path) -> None:
    check_commands(path, tmp_path)


def check_commands(path: Path, tmp_path: Path) -> None:
    """Every key of every variant of a study is a flag, and each variant is another student."""
    study = dataclasses.replace(Study.load(path), out=tmp_path)
    assert study.out == tmp_path and len(study.variants) >= 3
    made = set()
    for job in (*shared_jobs(study)[:1], *(job for job in variant_jobs(study) if job.seed == study.seeds[0])):
        write_recipe(job)
        config = ["--config", *map(str, job.recipes)]
        selected = parse_with_recipe(select_heads.parser(), "select", config)
        student = convert.parse_args(["hybridize", *config])
        HydraOptions(**{field.name: getattr(student, field.name) for field in dataclasses.fields(HydraOptions)})
        assert parse_with_recipe(evaluate.parser(), "evaluate", config).seed >= 2_000_000 or "qwen3" in str(path)
        settings = [vars(selected) | {"out": 0, "scores": 0, "config": 0}]
        settings.append(vars(student) | {"out": 0, "head_map": 0, "scores": 0, "config": 0})
        for stage in study.stages:
            parser, recipe, options = recipe_flags(["--stage", stage, *config], with_gpu=False)
            assert recipe.to_flags(parser) and options.run_dir == str(job.folder)
            settings.append(dataclasses.asdict(options) | {"run_dir": 0})
        made.add(str(settings))
    assert len(made) >= len(study.variants)
    assert re.search(r"^tokens of each student: align [\d,]+", describe(study, ()), re.MULTILINE)


def test_all_studies_stand_on_their_page() -> None:
    page = (ROOT / "docs" / "studies.md").read_text()
    named = set(re.findall(r"`((?:\w|[.-])+/(?:\w|-)+\.yaml)`", page.partition("## Studies that come along")[2]))
    assert named == {"/".join(path.parts[-2:]) for path in STUDIES}


def test_hours_on_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    """A student of the paper's 2.3B tokens: the plan's hours of its three stages, ten times."""
    study = str(ROOT / "examples/studies/qwen3-1.7b/selection.yaml")
    main(["run", study, "--dry-run", "--gpus", "8"])
    said = capsys.readouterr().out.splitlines()[-1]
    hours, total = re.fullmatch(
        r"training on 8 h100-80gb by the plan: ([\d.]+) hours a student, (\d+) GPU hours for 10 \(.*\)", said
    ).groups()
    flops = 2.36e9 * 1.7e9 * 10  # about: the student's training, the teacher's forward for two of three stages
    assert 0.5 < float(hours) * 3600 * 8 * 989e12 * 0.35 / flops < 2
    assert int(total) == pytest.approx(float(hours) * 8 * 10, rel=0.05)
