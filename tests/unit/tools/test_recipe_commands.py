# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Commands whose flags come from a recipe, and that do nothing where their result is there, as jobs need it."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tools import convert, evaluate, select_heads

COMMANDS: dict[str, tuple[Callable, list[str], str]] = {
    "import": (convert.main, ["import"], "model.json"),
    "hybridize": (convert.main, ["hybridize"], "model.json"),
    "export": (convert.main, ["export"], "config.json"),
    "select": (select_heads.main, [], "head_map.json"),
    "evaluate": (evaluate.main, [], "results.json"),
}
each_command = pytest.mark.parametrize("command", COMMANDS)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    out = tmp_path / "out"
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"import: {{hf: nowhere, out: {out}}}\nhybridize: {{teacher: nowhere, head-map: none.json, out: {out}}}\n"
        f"export: {{checkpoint: nowhere, out: {out}}}\nselect: {{teacher: nowhere, out: {out}}}\n"
        f"evaluate: {{models: [nowhere], lengths: [8, 16], text: none.txt, out: {out}}}\n"
    )
    out.mkdir()
    return path


@pytest.mark.parametrize(
    "command", [name for name in COMMANDS if name != "evaluate"]
)  # it looks at every piece: test_evaluate_command.py
def test_what_is_there_is_not_made_again(command: str, recipe: Path, capsys: pytest.CaptureFixture) -> None:
    main, argv, mark = COMMANDS[command]
    (recipe.parent / "out" / mark).touch()
    main([*argv, "--config", str(recipe), "--skip-existing"])
    said = capsys.readouterr()
    assert said.out.startswith(str(recipe.parent / "out")) and said.out.count("\n") == 1 and not said.err


@each_command
def test_an_unfinished_result_is_made(command: str, recipe: Path, capsys: pytest.CaptureFixture) -> None:
    main, argv, _ = COMMANDS[command]
    with pytest.raises(SystemExit) as stopped:
        main([*argv, "--config", str(recipe), "--skip-existing"])
    assert stopped.value.code == 2 and re.search(r"nowhere|none\.json", capsys.readouterr().err)


@each_command
def test_a_recipe_that_cannot_be_used_is_one_line(command: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    main, argv, _ = COMMANDS[command]
    path = tmp_path / "recipe.yaml"
    for text, cause in (
        ("train-iters: 3", f"no section '{command}'"),
        (f"{command}: {{ouut: x}}", "unknown key 'ouut'; did you mean 'out'?"),
    ):
        path.write_text(text)
        with pytest.raises(SystemExit) as stopped:
            main([*argv, "--config", str(path)])
        said = capsys.readouterr().err
        assert stopped.value.code == 2 and cause in said and said.count("\n") == 1


def test_flags_of_the_command_line_win(recipe: Path) -> None:
    args = convert.parse_args(["import", "--config", str(recipe), "--hf", "mine"])
    assert (args.hf, args.out) == ("mine", str(recipe.parent / "out"))
