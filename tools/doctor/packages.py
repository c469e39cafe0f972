# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Python, the packages that setup.py asks for, and Megatron-Core: are they there, do they fit, do they load?"""

import ast
import importlib
import importlib.metadata
import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tools.doctor.lines import Line, fail, ok, one_line, version_of, warn

ROOT = Path(__file__).resolve().parents[2]
SETUP = ROOT / "setup.py"
INSTALL = "make env, or: pip install -e . --constraint constraints.txt"
# Training on GPUs works without them, slowly: the module that must load, what happens without, what helps.
FAST = {
    "Transformer Engine": (
        "transformer_engine.pytorch",
        "Megatron's slower local layers run",
        "built for another torch or CUDA: reinstall transformer-engine[pytorch] with --no-build-isolation",
    ),
    "flash-linear-attention": (
        "fla.ops.gated_delta_rule",
        "GDN heads run on the torch reference, far slower",
        "reinstall it, fla-core and the Triton that torch asks for",
    ),
}
HOPPER = "9.0"
BAD_ON_HOPPER = ">=3.4,<3.7.1"  # Triton miscompiles the gated backward there (flash-linear-attention, issue 640)


def requirements(setup: Path = SETUP, constraints: Path = ROOT / "constraints.txt") -> Iterator[Line]:
    """Every package that setup.py asks for: missing or outside its range fails, other than the tested version warns."""
    python = ".".join(map(str, sys.version_info[:3]))
    yield ok("Python", f"{python} ({sys.executable})")  # tools/doctor.py refuses one that is too old
    pins = re.findall(r"(?m)^([\w.-]+)==([\w.+!]+)", constraints.read_text(encoding="utf-8"))
    tested = {_normal(name): version for name, version in pins}
    for name, wanted in map(_parsed, _setup_argument("install_requires", setup)):
        found, tried = version_of(name), tested.get(_normal(name))
        install = f"pip install '{name}{f'=={tried}' if tried else wanted}'"
        if found is None:
            yield fail(name, "not installed", INSTALL)
        elif not allows(wanted, found):
            yield fail(name, f"{found}, needs {wanted}", install)
        elif tried and not allows(f"=={tried}", found):
            yield warn(name, f"{found}, tested with {tried}", f"{install}, if something breaks")
        else:
            yield ok(name, found)


def megatron() -> Iterator[Line]:
    """Where Megatron-Core is imported from, whether hydra_mcore's patches fit it, and its compiled dataset helpers."""
    version = version_of("megatron-core")
    if version is None:
        return  # said among the packages
    installed = Path(str(importlib.metadata.distribution("megatron-core").locate_file("megatron/core"))).resolve()
    spec = importlib.util.find_spec("megatron")  # several folders may add to this namespace, the first one counts
    places = [Path(place, "core") for place in (spec.submodule_search_locations if spec else None) or ()]
    core = next((place for place in places if place.is_dir()), None)
    if core and installed.is_dir() and core.resolve() != installed:
        found = f"imported from {core}, not from the installed package"
        yield fail("Megatron-Core", found, "take that checkout off PYTHONPATH")
        return
    try:
        from hydra_mcore.compat import install

        patches = install()
    except Exception as error:
        yield fail("Megatron-Core", f"does not load: {one_line(error)}", INSTALL)
        return
    yield ok("Megatron-Core", f"loads, {len(patches)} patches of hydra_mcore.compat in place")
    try:
        importlib.import_module("megatron.core.datasets.helpers_cpp")
    except ImportError as error:
        fix = f"pip install --force-reinstall --no-deps megatron-core=={version}, with Python 3.12 or 3.13"
        yield fail("dataset helpers", f"Megatron's do not load: {one_line(error)}", fix)
    else:
        yield ok("dataset helpers", "Megatron's load")


def apex() -> Iterator[Line]:
    """NVIDIA's Apex, or the web toolkit of that name on the public index, which Megatron would try to import."""
    spec = importlib.util.find_spec("apex")
    places = [Path(place) for place in spec.submodule_search_locations or ()] if spec else []
    if not places:
        yield ok("Apex", "not installed; not needed")
    elif not any((place / "optimizers" / "fused_adam.py").exists() for place in places):
        fix = "pip uninstall apex; NVIDIA's comes from github.com/NVIDIA/apex"
        yield fail("Apex", f"{places[0]} is not NVIDIA's (no apex.optimizers)", fix)
    elif importlib.util.find_spec("amp_C") is None:
        fix = "build with APEX_CPP_EXT=1 APEX_CUDA_EXT=1, or uninstall it"
        yield warn("Apex", "NVIDIA's, without its CUDA kernels", fix)
    else:
        yield ok("Apex", "NVIDIA's")


def gpu_package(what: str, has_gpu: bool) -> Iterator[Line]:
    """A package of the extra ``gpu``: there, in its range, and loading; only a node with a GPU needs it."""
    module, without, fix = FAST[what]
    distribution = what.lower().replace(" ", "-")
    found, wanted = version_of(distribution), dict(map(_parsed, _setup_argument("extras_require")["gpu"]))[distribution]
    if found is None and has_gpu:
        yield warn(what, f"not installed: {without}", "pip install -e .[gpu]")
    elif found is None:
        yield ok(what, "not installed; not needed without a GPU")
    elif not allows(wanted, found):
        yield fail(what, f"{found}, needs {wanted}", f"pip install '{distribution}{wanted}'")
    else:
        try:
            if has_gpu:
                importlib.import_module(module)
        except Exception as error:
            yield fail(what, f"{found} does not load: {one_line(error)}", fix)
        else:
            yield ok(what, found)


def triton(capability: str) -> Iterator[Line]:
    """Versions that compute wrong gradients; one that is missing or too old shows in what needs it."""
    found = version_of("triton")
    if found and capability == HOPPER and allows(BAD_ON_HOPPER, found) and version_of("tilelang") is None:
        wrong = f"{found}: on Hopper its gated delta rule has wrong gradients"
        yield fail("Triton", wrong, "a torch with Triton 3.7.1, or pip install tilelang")
    else:
        yield ok("Triton", found or "not installed")


def allows(specifier: str, version: str) -> bool:
    """Tell whether a version is in a range; containers ship builds such as 2.9.0a0+nv25.10, good for ``>=2.9``."""
    from packaging.specifiers import SpecifierSet  # comes with the packages whose versions are asked for here
    from packaging.version import Version

    found, wanted = Version(version), SpecifierSet(specifier, prereleases=True)
    return found in wanted or (found.local is not None and found.base_version in wanted)


def _setup_argument(name: str, setup: Path = SETUP) -> Any:
    """A literal argument of the call of setup() in a setup.py, which is read and not run."""
    for node in ast.walk(ast.parse(setup.read_text(encoding="utf-8"))):
        if isinstance(node, ast.keyword) and node.arg == name:
            return ast.literal_eval(node.value)
    raise ValueError(f"{setup}: no {name}")


def _parsed(requirement: str) -> tuple[str, str]:
    """The name and the range of ``name[extra]>=1.0``."""
    name, wanted = re.fullmatch(r"([\w.-]+)(?:\[[^\]]*\])?\s*(.*)", requirement).groups()
    return name, wanted


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
