# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Recipes become exactly the flags they say, for a stage and for a command, out of one file or several."""

from __future__ import annotations

import argparse
import datetime
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hydra_mcore.config import ConfigError
from hydra_mcore.recipe import Recipe, main, with_recipe


def flag_parser() -> argparse.ArgumentParser:
    """The kinds of flags that Megatron has."""
    parser = argparse.ArgumentParser(prog="p", exit_on_error=False)
    parser.add_argument("--num-layers", type=int)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--swiglu", action="store_true")
    parser.add_argument("--disable-bias-linear", action="store_false", dest="add_bias_linear")
    parser.add_argument("--no-rope-fusion", action="store_false", dest="apply_rope_fusion")
    parser.add_argument("--data-path", nargs="*")
    parser.add_argument("--lr-decay-style", type=str)
    parser.add_argument("--min-lr", type=float, dest="least_lr")
    return parser


@pytest.mark.parametrize(
    ("values", "flags"),
    [
        ({"num-layers": 4}, ["--num-layers", "4"]),
        ({"num_layers": 4}, ["--num-layers", "4"]),
        ({"lr": 1e-3}, ["--lr", "0.001"]),
        ({"lr": "1e-3"}, ["--lr", "1e-3"]),  # YAML reads 1e-3 as a text
        ({"swiglu": True}, ["--swiglu"]),
        ({"swiglu": False}, []),
        ({"disable-bias-linear": True}, ["--disable-bias-linear"]),
        ({"disable-bias-linear": False}, []),
        ({"add-bias-linear": False}, ["--disable-bias-linear"]),  # by the name that Megatron's settings have
        ({"add_bias_linear": True}, []),
        ({"apply-rope-fusion": False}, ["--no-rope-fusion"]),
        ({"least-lr": 1.0}, ["--min-lr", "1.0"]),
        ({"data-path": ["0.7", "a", "0.3", "b"]}, ["--data-path", "0.7", "a", "0.3", "b"]),
        ({"data-path": [1, 2.5]}, ["--data-path", "1", "2.5"]),
        ({"data-path": []}, ["--data-path"]),
        ({"lr": None}, []),
        ({}, []),
        ({"swiglu": True, "num-layers": 2}, ["--swiglu", "--num-layers", "2"]),
        ({"lr": -1e-3}, ["--lr", "-0.001"]),
        ({"lr-decay-style": datetime.date(2026, 1, 2)}, ["--lr-decay-style", "2026-01-02"]),
        ({"disable-bias-linear": True, "add-bias-linear": True}, []),  # two names of one flag: the later one counts
    ],
)
def test_recipes_become_flags(values: dict[str, Any], flags: list[str]):
    found = Recipe("r.yaml", values).to_flags(flag_parser())
    assert found == flags
    flag_parser().parse_args(found)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num-layer": 4}, "unknown key 'num-layer'; did you mean 'num-layers'"),
        ({"wholly-unlike": 4}, "unknown key 'wholly-unlike'$"),
        ({7: 4}, "unknown key '7'"),
        ({"num-layers": True}, "'num-layers' takes a value, not true"),
        ({"lr": False}, "'lr' takes a value, not false"),
        ({"swiglu": 3}, "'swiglu' takes true or false, not 3"),
        ({"swiglu": "yes"}, "'swiglu' takes true or false, not 'yes'"),
        ({"add-bias-linear": [True]}, "'add-bias-linear' takes true or false"),
        ({"lr": {"max": 1}}, "'lr' is no stage"),
        ({"lr": [1, 2]}, "'lr' takes one value, not a list"),
        ({"lr": []}, "'lr' takes one value, not a list"),
        ({"num-layer": None}, "unknown key 'num-layer'"),
        ({"data-path": [None]}, "'data-path' takes text or a number, not null"),
        ({"data-path": [["a"]]}, "'data-path' takes text or a number, not a list"),
        ({"data-path": [True]}, "'data-path' takes text or a number, not True"),
        ({"data-path": ["a", "--swiglu"]}, "'data-path' is '--swiglu', which would be read as a flag"),
        ({"lr-decay-style": "-h"}, "'lr-decay-style' is '-h', which would be read as a flag"),
        ({"lr-decay-style": "a\nb"}, "'lr-decay-style' is 'a.nb'; no flag takes control characters"),
        ({"lr-decay-style": "\ud800"}, "'lr-decay-style' is '.ud800'; no flag takes control characters"),
        ({"lr-decay-style": "x" * 5000}, "'lr-decay-style' is 'x{56}[.]{3}; no flag takes"),
        ({"lr-decay-style": b"x"}, "'lr-decay-style' takes text or a number, not a bytes"),
        ({"aline": {"lr": 1}}, "'aline' is no stage"),
    ],
)
def test_recipe_keys_that_are_refused(values: dict, message: str):
    with pytest.raises(ConfigError, match=r"^recipe r\.yaml: " + message):
        Recipe("r.yaml", values).to_flags(flag_parser())


def recipe(tmp_path: Path, content: str | bytes, stage: str = "align") -> dict[str, Any]:
    path = tmp_path / "r.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return Recipe.load(path, stage).values


def test_a_stage_lays_its_section_over_the_rest(tmp_path):
    content = """
    lr: 1.0
    num-layers: 4
    align:
      lr: 2.0
      swiglu: true
    extend:
      lr: 3.0
    """
    assert recipe(tmp_path, content, "align") == {"lr": 2.0, "num-layers": 4, "swiglu": True}
    assert recipe(tmp_path, content, "distill") == {"lr": 1.0, "num-layers": 4}
    assert recipe(tmp_path, content, "extend") == {"lr": 3.0, "num-layers": 4}


def test_empty_recipes(tmp_path):
    assert recipe(tmp_path, "") == recipe(tmp_path, "# nothing\n") == recipe(tmp_path, "align:\n") == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- lr\n- 3\n", "expected 'key: value' lines"),
        ("just words", "expected 'key: value' lines"),
        ("lr: [1, 2", "not YAML"),
        (b"lr: \xff\xfe", "not YAML"),
        ("align: 3\n", "'align' is a stage, expected 'key: value' lines under it"),
        ("distill: [lr]\n", "'distill' is a stage"),
    ],
)
def test_files_that_are_no_recipe(tmp_path, content, message):
    with pytest.raises(ConfigError, match=message) as refused:
        recipe(tmp_path, content)
    assert "r.yaml" in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("lr: 1\nseed: 2\nlr: 1\n", "'lr' stands there twice, on line 1 and on line 3; keep one"),
        ("seq-length: 1\nseq_length: 2\n", "'seq-length' stands there twice, on line 1 and on line 2"),
        ("align: {lr: 1}\nalign:\n  seed: 1\n", "'align' stands there twice, on line 1 and on line 2"),
        ("'select': {a: 1}\n# words\nselect: {b: 1}\n", "'select' stands there twice, on line 1 and on line 3"),
        ('align: {}\n"align": {}\n', "'align' stands there twice, on line 1 and on line 2"),
        ('align:\n  lr: 1\n  "lr": 2\n', "'lr' stands there twice, on line 2 and on line 3"),
        ("align: {lr: 1, seed: 2, lr: 3}\n", "'lr' stands there twice, on line 1 and on line 1"),
        ("select: {}\ndistill: &x {lr: 1, lr: 2}\nextend: *x\n", "'lr' stands there twice"),
        ("x: &x {lr: 1}\nalign: {<<: *x, <<: *x}\n", "'<<' stands there twice"),
        ("? [lr]\n: 1\n", "line 1: expected 'key: value' lines, with plain words as keys"),
        ("lr: 1\n---\nlr: 2\n", "not YAML (line 2: but found another document)"),
        ("align:\n\tlr: 1\n", "not YAML (line 2: found character"),
        ("lr: &a 1\nseed: &a 2\n", "not YAML (line 2: second occurrence)"),
        ("lr: *none\n", "not YAML (line 1: found undefined alias 'none')"),
        (
            "lr: !!python/object/apply:os.system [exit]\n",
            "not YAML (line 1: could not determine a constructor for the tag",
        ),
        ("lr: 2026-13-45\n", "not YAML (month must be in 1..12)"),
        ("lr: 1" + "0" * 5000, "not YAML (Exceeds the limit"),
        ("lr: \0", "not YAML ("),
        ("x: " + "[" * 5000, "nested deeper"),
        ("{a: " * 5000, "nested deeper"),
        (
            "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nd: &d [*c, *c]\n"
            "e: &e [*d, *d]\nf: &f [*e, *e]\ng: [*f, *f]\n",
            "line 1: nested deeper, or with more aliases",
        ),
        (
            "a: &a {x: 1}\nb: &b {<<: [*a, *a]}\nc: &c {<<: [*b, *b]}\nd: &d {<<: [*c, *c]}\ne: {<<: [*d, *d]}\n",
            "line 5: nested deeper, or with more aliases",
        ),
        ("a: &a 1\nb: [" + "*a, " * 200 + "]\n", "line 2: nested deeper, or with more aliases"),
        ("a: x\n" * 100_000, "longer than 262144 bytes, so no recipe"),
    ],
)
def test_recipes_that_would_lose_a_line_or_fill_the_memory(tmp_path: Path, content: str, said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        recipe(tmp_path, content)
    line = str(refused.value)
    assert line.startswith(f"recipe {tmp_path}/r.yaml: {said}") and "\n" not in line and len(line) < 400, line


VARIABLES = """
run-dir: runs/${name.of}
teacher: ${run_dir}/teacher
lr: 3e-4
data-path: [0.7, "${prepare.out}", 0.3, "b${seed}"]
seed: 7
align: {lr: "${lr}", min-lr: "${seed}"}
prepare:
  out: ${run-dir}/data
select: {data-path: "${data-path}", "lr-decay-style": "${teacher}+${prepare.out}"}
"""


def test_variables_stand_for_other_values(tmp_path: Path) -> None:
    content = VARIABLES.replace("${name.of}", "a")
    align = {"run-dir": "runs/a", "teacher": "runs/a/teacher", "lr": "3e-4", "seed": 7, "min-lr": 7}
    assert recipe(tmp_path, content) == align | {"data-path": [0.7, "runs/a/data", 0.3, "b7"]}
    assert recipe(tmp_path, content, "select") == {
        "data-path": [0.7, "runs/a/data", 0.3, "b7"],
        "lr-decay-style": "runs/a/teacher+runs/a/data",
    }


def test_variables_see_all_files(tmp_path: Path) -> None:
    paths = write(tmp_path, base=VARIABLES.replace("${name.of}", "a"), mine="run-dir: runs/b\n")
    assert Recipe.load(paths, "prepare").values == {"out": "runs/b/data"}
    assert Recipe.load(paths, "align").values["teacher"] == "runs/b/teacher"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (VARIABLES, "'run-dir' has the variable '${name.of}', which names no key; it takes a top-level key, or"
         " SECTION.KEY"),
        ("run-dir: a\nexport: {out: '${run-dri}/hf'}\n", "'export.out' has the variable '${run-dri}', which names no"
         " key; did you mean ${run-dir}?"),
        ("run-dir: ${teacher}/x\nteacher: ${run-dir}/y\n", "variables go in a circle: run-dir -> teacher -> run-dir"),
        ("run-dir: ${run_dir}\n", "variables go in a circle: run-dir -> run-dir"),
        ("align: {lr: '${align.lr}'}\n", "variables go in a circle: align.lr -> align.lr"),
        ("a: [1, 2]\nb: x${a}\n", "'b': ${a} is a list; within a text it must be text or a number"),
        ("a: true\nb: x${a}\n", "'b': ${a} is True; within a text"),
        ("a:\nb: x${a}\n", "'b': ${a} is null; within a text"),
        ("align: {lr: 1}\nb: ${align}\n", "'b' has the variable '${align}', which names no key"),
        ("a: 1\nb: ${a\n", "'${a' has a ${ without its }"),
        ("".join(f"a{n}: ${{a{n + 1}}}\n" for n in range(1000)) + "a1000: x", "variables name each other more often"),
        ("a: " + "x" * 3000 + "\nb: ${a}${a}\n", "'b' is longer than 4096 letters with its variables replaced"),
        ("select: {out: ${run-dir}/heads}\n", "not YAML (line 1: expected ',' or '}', but got '{'); put quotes around a"
         " value with ${...} that stands in [...] or {...}"),
    ],
)  # fmt: skip
def test_variables_that_stand_for_nothing(tmp_path: Path, content: str, said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        recipe(tmp_path, content)
    line = str(refused.value)
    assert line.startswith(f"recipe {tmp_path}/r.yaml: {said}") and "\n" not in line and len(line) < 500, line


def test_many_variables_take_no_time_and_no_memory(tmp_path: Path) -> None:
    content = "a0: ''\n" + "".join(f"a{n + 1}: {f'${{a{n}}}' * 600}\n" for n in range(6))
    assert recipe(tmp_path, content)["a6"] == ""


def test_what_yaml_allows_in_a_recipe(tmp_path: Path) -> None:
    content = (
        "\ufeffx: &common {lr: 1, seed: 2}\nalign: {<<: *common, lr: 3, window_size: 3:1, data-path: [0.5,"
        " a]}\ndistill: *common\n"
    )
    assert recipe(tmp_path, content)["lr"] == 3 and recipe(tmp_path, content)["seed"] == 2
    assert recipe(tmp_path, content)["window-size"] == "3:1"  # and not 181
    assert recipe(tmp_path, content, "distill")["lr"] == 1
    endless = recipe(tmp_path, "align: {data-path: &a [*a]}\n")
    with pytest.raises(ConfigError, match="'data-path' takes text or a number, not a list"):
        Recipe("r.yaml", endless).to_flags(flag_parser())


def test_a_null_stands_for_the_default() -> None:
    assert Recipe("r", {"lr": None, "swiglu": False, "num_layers": 3}).over(
        {"lr": 1, "swiglu": True, "num-layers": 2}
    ).values == {
        "lr": 1,
        "swiglu": False,
        "num-layers": 3,
    }


@pytest.mark.parametrize(
    ("sections", "answer"), [("select: {a: 1}", "yes"), ("select:", "no"), ("x: |\n  select: 1", "no")]
)
def test_job_scripts_ask_for_sections(
    tmp_path: Path, capsys: pytest.CaptureFixture, sections: str, answer: str
) -> None:
    (tmp_path / "r.yaml").write_text(sections)
    main(["has", "select", str(tmp_path / "r.yaml")])
    assert capsys.readouterr().out == f"{answer}\n"


def test_job_scripts_need_not_wait_for_torch() -> None:
    code = "import sys, hydra_mcore.recipe; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_a_recipe_that_is_missing(tmp_path):
    with pytest.raises(ConfigError, match=r"none.yaml: No such file"):
        Recipe.load(tmp_path / "none.yaml", "align")


def write(folder: Path, **files: str) -> list[Path]:
    paths = [folder / f"{name}.yaml" for name in files]
    for path, content in zip(paths, files.values(), strict=True):
        path.write_text(content)
    return paths


def test_later_files_win_key_by_key_but_not_over_a_section(tmp_path):
    schedule = "lr: 1\nnum-layers: 4\nalign: {lr: 2, swiglu: true}\n"
    layout = "lr: 5\nnum-layers: 8\nalign: {swiglu: false}\nextend: {lr: 6}\n"
    paths = write(tmp_path, schedule=schedule, layout=layout)
    assert Recipe.load(paths, "align").values == {"lr": 2, "num-layers": 8, "swiglu": False}
    assert Recipe.load(paths, "extend").values == {"lr": 6, "num-layers": 8}
    assert Recipe.load(paths[::-1], "align").values == {"lr": 2, "num-layers": 4, "swiglu": True}


def test_a_command_gets_its_section_alone_and_a_stage_none_of_it(tmp_path):
    (path,) = write(tmp_path, r="lr: 1\nselect: {num-layers: 2, swiglu: true}\n")
    assert Recipe.load(path, "select").values == {"num-layers": 2, "swiglu": True}
    assert Recipe.load(path, "align").values == {"lr": 1}
    found = with_recipe(["--lr", "3", "--config", str(path), "--num-layers", "9"], "select", flag_parser())
    assert found == ["--num-layers", "2", "--swiglu", "--lr", "3", "--num-layers", "9"]
    assert flag_parser().parse_args(found).num_layers == 9
    assert with_recipe(["--lr", "3"], "select", flag_parser()) == ["--lr", "3"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("lr: 1\n", "r.yaml: no section 'select'"),
        ("select: 3\n", "'select' is a command, expected"),
        ("select: {num-layer: 3}\n", "unknown key 'num-layer'; did you mean 'num-layers'"),
    ],
)
def test_commands_refuse_recipes_that_do_not_fit(tmp_path, content, message):
    (path,) = write(tmp_path, r=content)
    with pytest.raises(ConfigError, match=message):
        with_recipe(["--config", str(path)], "select", flag_parser())
