# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""What setup.py asks for, what constraints.txt was tested with, and the rule by which pip compares versions."""

import ast
import importlib.metadata
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SETUP = ROOT / "setup.py"
CONSTRAINTS = ROOT / "constraints.txt"


def setup_argument(name: str, setup: Path = SETUP) -> Any:
    """A literal argument of the call of setup() in a setup.py, which is read and not run."""
    for node in ast.walk(ast.parse(setup.read_text(encoding="utf-8"))):
        if isinstance(node, ast.keyword) and node.arg == name:
            return ast.literal_eval(node.value)
    raise ValueError(f"{setup}: no {name}")


def required(extra: str = "", setup: Path = SETUP) -> list[str]:
    """What the package, or an extra of it, needs: as setup.py says, or as was noted when it came from a wheel."""
    if setup.is_file():
        return setup_argument("extras_require", setup)[extra] if extra else setup_argument("install_requires", setup)
    mark = f'extra == "{extra}"'
    noted = importlib.metadata.requires("hydra_mcore") or []
    return [text.split(";")[0].strip() for text in noted if (mark in text if extra else "extra ==" not in text)]


def parsed(requirement: str) -> tuple[str, str]:
    """The name and the range of ``name[extra]>=1.0``."""
    name, wanted = re.fullmatch(r"([\w.-]+)(?:\[[^\]]*\])?\s*(.*)", requirement).groups()
    return name, wanted


def pinned_versions(constraints: Path = CONSTRAINTS) -> dict[str, str]:
    """The version of every package that hydra_mcore was tested with, by its normal name (a wheel has none)."""
    if not constraints.is_file():
        return {}
    pins = re.findall(r"(?m)^([\w.-]+)==([\w.+!]+)", constraints.read_text(encoding="utf-8"))
    return {normal(name): version for name, version in pins}


def normal(name: str) -> str:
    """The one way to write the name of a package (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def allows(specifier: str, version: str) -> bool:
    """Whether pip leaves an installed version in its place for a requirement, by PEP 440.

    A pre-release that is installed counts: 2.10.0a0+nv25.12 is in ``>=2.9``.  It comes before its release, however:
    2.9.0a0+nv25.10 is not, and pip would put another torch in its place.
    """
    from packaging.specifiers import SpecifierSet  # comes with the packages whose versions are asked for here

    return SpecifierSet(specifier).contains(version, prereleases=True)
