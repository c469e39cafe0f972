# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Count what makes a tree hard to read: python tests/support/structure.py [ROOT ...], a column each."""

from __future__ import annotations

import ast
import itertools
import re
import sys
from collections import defaultdict
from pathlib import Path

TOPS = ("hydra_mcore", "tools", "examples")
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
IMPORTS = (ast.Import, ast.ImportFrom)
BY_HAND = re.compile(
    r"os\.replace\(|beside\.(replace|rename)\(|\.write_text\(|\.write_bytes\("
    r"|open\([^)\n]*[\"'][wa]b?[\"']"
)


def counts(root: Path) -> dict[str, int]:
    """What is counted -> how much of it is below the tops of a tree."""
    texts = {path: path.read_text() for top in TOPS for path in sorted((root / top).rglob("*.py"))}
    trees = {path: ast.parse(text) for path, text in texts.items()}
    nodes = list(itertools.chain.from_iterable(map(ast.walk, trees.values())))
    functions = [node for node in nodes if isinstance(node, FUNCTIONS)]
    inside = itertools.chain.from_iterable(map(ast.walk, functions))
    lazy = {node for node in inside if isinstance(node, IMPORTS)}
    constructors = [node.args for node in functions if node.name == "__init__" and len(node.args.args) < 30]
    return {
        "lines": sum(len(text.splitlines()) for text in texts.values()),
        "files": len(texts),
        "files that name gdn in code": sum(bool(re.search("gdn", code(tree), re.I)) for tree in trees.values()),
        "files over 400 lines": sum(len(text.splitlines()) > 400 for text in texts.values()),
        "functions over 60 lines": sum(node.end_lineno - node.lineno >= 60 for node in functions),
        "imports inside functions": len(lazy),
        "comprehensions with two loops": sum(
            len(node.generators) > 1
            for tree in trees.values()
            for node in ast.walk(tree)
            if hasattr(node, "generators")
        ),
        "lines that write a file by hand": sum(len(BY_HAND.findall(text)) for text in texts.values()),
        "parameters of the widest constructor": max(len(args.args) + len(args.kwonlyargs) - 1 for args in constructors),
        "pairs of packages that import each other": mutual(root, trees),
        "lines over 120 characters": sum(len(line) > 120 for text in texts.values() for line in text.splitlines()),
    }


def code(tree: ast.Module) -> str:
    """A file without comments and docstrings."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [item for item in body if not _is_docstring(item)] or [ast.Pass()]
    return ast.unparse(tree)


def _is_docstring(item: ast.AST) -> bool:
    return isinstance(item, ast.Expr) and isinstance(item.value, ast.Constant) and isinstance(item.value.value, str)


def mutual(root: Path, trees: dict[Path, ast.Module]) -> int:
    """Of packages of hydra_mcore, and its files that stand in none."""
    imports: dict[str, set[str]] = defaultdict(set)
    for path, tree in trees.items():
        parts = path.relative_to(root).with_suffix("").parts
        if parts[0] == "hydra_mcore":
            for node in ast.walk(tree):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hydra_mcore."):
                    imports[parts[1]].add(node.module.split(".")[1])
    return sum(other > own and own in imports[other] for own in list(imports) for other in imports[own])


if __name__ == "__main__":
    columns = [counts(Path(root)) for root in sys.argv[1:] or ["."]]
    for name in columns[0]:
        print(f"{name:45}", *(f"{column[name]:>8,}" for column in columns))
