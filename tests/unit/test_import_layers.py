# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The layers of the package: who may import whom, how long things may be, how loops read, what must not be required."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from hydra_mcore.convert.hf_code import CODE_FILES
from tests.support.paths import ROOT

# From the ground up. A package may import the layers below and, in its own layer, what stands before it.
LAYERS = [
    [
        *("hydra_mcore.errors", "hydra_mcore.files", "hydra_mcore.commands", "hydra_mcore.tokenizer"),
        *("hydra_mcore.progress", "hydra_mcore.torchrun"),
        *("hydra_mcore.figures", "hydra_mcore.shape", "hydra_mcore.sequence", "hydra_mcore.stages"),
        *("hydra_mcore.kinds", "hydra_mcore.heads", "hydra_mcore.config", "hydra_mcore.recipe"),
    ],
    ["hydra_mcore.compat", "hydra_mcore.ops"],
    ["hydra_mcore.model"],
    ["hydra_mcore.costs", "hydra_mcore.ruler", "hydra_mcore.corpus"],
    ["hydra_mcore.convert", "hydra_mcore.selection"],
    ["hydra_mcore.evaluation"],
    ["hydra_mcore.train"],
    ["hydra_mcore.api", "hydra_mcore.__main__"],
    ["tools", "examples"],
]
INDEPENDENT = {("hydra_mcore.selection", "hydra_mcore.convert")}  # though one stands before the other
PACKAGES = [package for layer in LAYERS for package in layer]
FILES = sorted(path for top in ("hydra_mcore", "tools", "examples") for path in (ROOT / top).rglob("*.py"))
TRAVELLERS = [ROOT / "hydra_mcore" / name for name in CODE_FILES]  # copied side by side into every exported model
OPTIONAL = ("apex", "fla", "transformer_engine", "wandb")

each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def package_of(module: str) -> str | None:
    return next((package for package in PACKAGES if f"{module}.".startswith(f"{package}.")), None)


def imported(path: Path) -> set[str]:
    """Return the modules that a file imports, inside functions too; ``from a import b`` counts as a and a.b."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                assert path in TRAVELLERS, f"{path}:{node.lineno}: write the import with its full name"
                continue
            names.update((str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)))
    return names


def allowed(importer: str, target: str) -> bool:
    below = PACKAGES.index(target) < PACKAGES.index(importer)
    return importer == target or (below and (importer, target) not in INDEPENDENT)


def test_the_rules_bite() -> None:
    assert package_of("hydra_mcore.config") == package_of("hydra_mcore.config.x") == "hydra_mcore.config"
    assert package_of("hydra_mcore.configuration") is package_of("torch") is None
    assert allowed("hydra_mcore.train", "hydra_mcore.model")
    assert allowed("hydra_mcore.config", "hydra_mcore.heads")
    assert not allowed("hydra_mcore.heads", "hydra_mcore.config")
    assert not allowed("hydra_mcore.model", "hydra_mcore.train")
    assert not allowed("hydra_mcore.selection", "hydra_mcore.convert")
    assert not allowed("hydra_mcore.convert", "hydra_mcore.selection")


@each_file
def test_imports_never_go_up(path: Path) -> None:
    importer = package_of(module_name(path))
    if importer is None:
        assert module_name(path) == "hydra_mcore", f"{path}: in no package of LAYERS"
        assert not any(map(package_of, imported(path)))
    else:
        targets = {package_of(module) for module in imported(path)} - {None}
        assert [target for target in targets if not allowed(importer, target)] == []


@pytest.mark.parametrize("path", TRAVELLERS, ids=lambda path: path.name)
def test_what_travels_with_a_model_needs_nothing_that_stays(path: Path) -> None:
    assert not any(map(package_of, imported(path)))
    relative = {
        node.module for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom) and node.level
    }
    assert relative <= {traveller.stem for traveller in TRAVELLERS}


@each_file
def test_files_and_functions_are_short(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) < 400
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    assert [f.name for f in functions if f.end_lineno - f.lineno + 1 >= 60] == []


@each_file
def test_no_comprehension_has_two_loops(path: Path) -> None:
    nodes = ast.walk(ast.parse(path.read_text()))
    assert [node.lineno for node in nodes if len(getattr(node, "generators", ())) > 1] == []


@each_file
def test_files_say_whose_they_are(path: Path) -> None:
    header = "# Copyright 2026 the hydra_mcore authors.\n# SPDX-License-Identifier: Apache-2.0\n"
    text = path.read_text().removeprefix("#!/usr/bin/env python3\n")
    assert not text or text.startswith(header)


def test_every_module_imports_without_the_optional_packages() -> None:
    elsewhere = {path for path in TRAVELLERS if path.parent.name == "hf_model"}  # imported from an exported model only
    modules = [module_name(path) for path in FILES if path.name != "__main__.py" and path not in elsewhere]
    code = f"""
import importlib, sys, traceback
sys.modules.update(dict.fromkeys({OPTIONAL!r}))
failed = []
for name in {modules!r}:
    try:
        importlib.import_module(name)
    except BaseException:
        failed.append(name)
        traceback.print_exc()
sys.exit(f"failed: {{failed}}" if failed else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
