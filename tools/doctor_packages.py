# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Python, the packages that setup.py asks for, and Megatron-Core: are they there, do they fit, do they load?"""

from __future__ import annotations

import ast
import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tools.doctor_lines import Check, Line, allows, fail, ok, one_line, version_of, warn

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[1]
INSTALL = "make env, or: pip install -e . --constraint constraints.txt"
TOPIC = "packages"
WHEELS_UP_TO = (3, 13)  # megatron-core 0.19.2 has wheels for 3.12 and 3.13
FAST = ("Transformer Engine", "flash-linear-attention")  # training on GPUs works without them, slowly
HOPPER = "9.0"
BAD_ON_HOPPER = ">=3.4,<3.7.1"  # Triton miscompiles the gated backward there (flash-linear-attention, issue 640)


def checks(has_gpu: bool, capability: str) -> list[Check]:
    """The checks of this topic.

    Args:
        has_gpu: this node has a GPU, so that packages for GPUs are expected.
        capability: its compute capability, such as ``9.0``.
    """
    return [
        Check(TOPIC, "Python", lambda: python_version(sys.version_info[:3])),
        Check(TOPIC, "packages", lambda: requirements(ROOT / "setup.py", ROOT / "constraints.txt")),
        Check(TOPIC, "Megatron-Core", engine),
        Check(TOPIC, "dataset helpers", dataset_helpers),
        Check(TOPIC, "Apex", lambda: apex(has_gpu)),
        Check(TOPIC, "Transformer Engine", lambda: transformer_engine(has_gpu)),
        Check(TOPIC, "flash-linear-attention", lambda: delta_kernels(has_gpu, capability)),
        Check(TOPIC, "tokenizers parallelism", tokenizers_parallelism),
    ]


def python_version(version: tuple[int, ...], setup: Path = ROOT / "setup.py") -> Iterator[Line]:
    found = f"{'.'.join(map(str, version))} ({sys.executable})"
    wanted = _setup_argument(setup, "python_requires")
    if not allows(wanted, ".".join(map(str, version))):
        yield fail(
            "Python", f"{found}, needs {wanted}", "make env finds or fetches one; then .venv/bin/python tools/doctor.py"
        )
    elif version[:2] > WHEELS_UP_TO:
        yield warn("Python", found, "Megatron-Core has no wheel for it and is compiled: Python 3.12 saves that")
    else:
        yield ok("Python", found)


def requirements(setup: Path, constraints: Path) -> Iterator[Line]:
    """Every package that setup.py asks for: missing or outside its range fails, other than the tested version warns."""
    tested = dict(re.findall(r"(?m)^([\w.-]+)==([\w.+!]+)", constraints.read_text(encoding="utf-8")))
    tested = {_normal(name): version for name, version in tested.items()}
    for requirement in _setup_argument(setup, "install_requires"):
        name, wanted = _parsed(requirement)
        found = version_of(name)
        tried = tested.get(_normal(name))
        if found is None:
            yield fail(name, "not installed", INSTALL)
        elif not allows(wanted, found):
            yield fail(name, f"{found}, needs {wanted}", f"pip install '{name}{f'=={tried}' if tried else wanted}'")
        elif tried and not allows(f"=={tried}", found):
            yield warn(name, f"{found}, tested with {tried}", f"pip install {name}=={tried}, if something breaks")
        else:
            yield ok(name, found)


def engine() -> Iterator[Line]:
    """Where Megatron-Core is imported from, and whether hydra_mcore's patches fit it."""
    if version_of("megatron-core") is None:
        return  # said among the packages
    installed = Path(str(importlib.metadata.distribution("megatron-core").locate_file("megatron/core"))).resolve()
    core = _megatron_core()
    if core and installed.is_dir() and core.resolve() != installed:
        yield fail(
            "Megatron-Core",
            f"imported from {core}, not from the installed package",
            "take that checkout off PYTHONPATH",
        )
        return
    try:
        from hydra_mcore.compat import install

        patches = install()
    except Exception as error:
        yield fail("Megatron-Core", f"does not load: {one_line(error)}", INSTALL)
        return
    yield ok("Megatron-Core", f"loads, {len(patches)} patches of hydra_mcore.compat in place")


def dataset_helpers() -> Iterator[Line]:
    """Megatron's compiled helpers for its datasets, loaded by themselves: its packages take seconds and need torch."""
    core = _megatron_core()
    if core is None:
        return  # said among the packages
    folder = core / "datasets"
    mend = (
        f"pip install --force-reinstall --no-deps megatron-core=={version_of('megatron-core')}, with Python 3.12 or"
        " 3.13"
    )
    built = [folder / f"helpers_cpp{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES]
    found = next((path for path in built if path.exists()), None)
    if found is None:
        yield fail("dataset helpers", f"Megatron's are not compiled for this Python in {folder}", mend)
        return
    try:
        spec = importlib.util.spec_from_file_location("helpers_cpp", found)
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    except ImportError as error:
        yield fail("dataset helpers", one_line(error), mend)
        return
    yield ok("dataset helpers", f"Megatron's load ({found.name})")


def _megatron_core() -> Path | None:
    """The folder that ``import megatron.core`` would take; several may add to the namespace ``megatron``."""
    spec = importlib.util.find_spec("megatron")
    places = (spec.submodule_search_locations if spec else None) or ()
    return next((Path(place, "core") for place in places if Path(place, "core").is_dir()), None)


def apex(has_gpu: bool) -> Iterator[Line]:
    """NVIDIA's Apex, or the web toolkit of that name on the public package index, which Megatron would try to
    import.
    """
    spec = importlib.util.find_spec("apex")
    places = [Path(place) for place in spec.submodule_search_locations or ()] if spec else []
    if not places:
        yield ok("Apex", "not installed; not needed" + (" beside Transformer Engine" if has_gpu else ""))
        return
    version, where = version_of("apex") or "of unknown version", places[0]
    web = (
        [name for name in importlib.metadata.requires("apex") or () if "pyramid" in name] if version_of("apex") else []
    )
    if web or not any((place / "optimizers" / "fused_adam.py").exists() for place in places):
        why = "a Pyramid web toolkit" if web else "no apex.optimizers"
        yield fail(
            "Apex",
            f"{version} in {where} is not NVIDIA's ({why})",
            "pip uninstall apex; NVIDIA's comes from github.com/NVIDIA/apex",
        )
    elif importlib.util.find_spec("amp_C") is None:
        yield warn(
            "Apex",
            f"NVIDIA's, {version}, without its CUDA kernels",
            "build with APEX_CPP_EXT=1 APEX_CUDA_EXT=1, or uninstall it",
        )
    else:
        yield ok("Apex", f"NVIDIA's, {version}")


def transformer_engine(has_gpu: bool) -> Iterator[Line]:
    yield from _for_gpus(
        has_gpu,
        "Transformer Engine",
        "transformer-engine",
        "transformer_engine.pytorch",
        "not installed: Megatron's slower local layers run",
        "built for another torch or CUDA: reinstall transformer-engine[pytorch] with --no-build-isolation",
    )


def delta_kernels(has_gpu: bool, capability: str) -> Iterator[Line]:
    """flash-linear-attention, its convolution, and the Triton between it and torch: pairs known not to work are
    named.
    """
    name = "flash-linear-attention"
    slow = "not installed: GDN heads run on the torch reference, far slower"
    yield from _for_gpus(
        has_gpu, name, name, "fla.ops.gated_delta_rule", slow, "reinstall it and fla-core, and see Triton"
    )
    yield from _triton_pair(has_gpu and version_of(name) is not None, capability)
    yield ok("causal-conv1d", version_of("causal-conv1d") or "not installed; hydra_mcore does not use it")


def _for_gpus(has_gpu: bool, what: str, distribution: str, module: str, without: str, mend: str) -> Iterator[Line]:
    """A package of the extra ``gpu``: there, in its range, and loading; only a node with a GPU needs it."""
    found, wanted = version_of(distribution), _extra("gpu", distribution)
    if found is None:
        yield (
            warn(what, without, "pip install -e .[gpu]")
            if has_gpu
            else ok(what, "not installed; not needed without a GPU")
        )
        return
    if not allows(wanted, found):
        yield fail(what, f"{found}, needs {wanted}", f"pip install '{distribution}{wanted}'")
        return
    if has_gpu:
        try:
            importlib.import_module(module)
        except Exception as error:
            yield fail(what, f"{found} does not load: {one_line(error)}", mend)
            return
    yield ok(what, found)


def _triton_pair(needed: bool, capability: str) -> Iterator[Line]:
    triton, pin = version_of("triton"), next(iter(_asked_by("torch", "triton")), "")
    if triton is None:
        missing = "not installed: flash-linear-attention cannot run"
        yield (
            fail("Triton", missing, f"pip install 'triton{pin}'")
            if needed
            else ok("Triton", "not installed; not needed without a GPU")
        )
        return
    wanted = [spec for spec in _asked_by("fla-core", "triton", 'extra == "cuda"') if not allows(spec, triton)]
    if needed and wanted:
        yield fail(
            "Triton",
            f"{triton}, flash-linear-attention needs {wanted[0]}",
            f"a torch that comes with triton{wanted[0]}",
        )
    elif needed and capability == HOPPER and allows(BAD_ON_HOPPER, triton) and version_of("tilelang") is None:
        yield fail(
            "Triton",
            f"{triton}: on Hopper its gated delta rule has wrong gradients",
            "a torch with Triton 3.7.1, or pip install tilelang",
        )
    elif pin and not allows(pin, triton):
        yield warn("Triton", f"{triton}, this torch was built for {pin}", f"pip install 'triton{pin}'")
    else:
        yield ok("Triton", triton + (f", as torch asks ({pin})" if pin else ""))


def tokenizers_parallelism() -> Iterator[Line]:
    value = os.environ.get("TOKENIZERS_PARALLELISM")
    if value is None:
        yield ok(
            "tokenizers parallelism",
            "TOKENIZERS_PARALLELISM unset: threads, switched off in processes forked after first use",
        )
    elif value.lower() in ("true", "1", "on", "yes", "y", "t", "false", "0", "off", "no", "n", "f", ""):
        yield ok("tokenizers parallelism", f"TOKENIZERS_PARALLELISM={value}")
    else:
        yield warn(
            "tokenizers parallelism",
            f"TOKENIZERS_PARALLELISM={value!r} is neither true nor false",
            "export TOKENIZERS_PARALLELISM=false",
        )


def _setup_argument(setup: Path, name: str) -> object:
    """A literal argument of the call of setup() in a setup.py, which is read and not run."""
    for node in ast.walk(ast.parse(setup.read_text(encoding="utf-8"))):
        if isinstance(node, ast.keyword) and node.arg == name:
            return ast.literal_eval(node.value)
    raise ValueError(f"{setup}: no {name}")


def _extra(extra: str, name: str) -> str:
    """The range that setup.py gives a package in one of its extras."""
    wanted = dict(map(_parsed, _setup_argument(ROOT / "setup.py", "extras_require")[extra]))
    return wanted[name]


def _asked_by(distribution: str, name: str, marker: str = "") -> list[str]:
    """The ranges that an installed distribution asks for a package, under requirements whose marker holds that text or
    none.
    """
    try:
        asked = importlib.metadata.requires(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        return []
    parts = [requirement.partition(";") for requirement in asked]
    fitting = [head for head, _, condition in parts if (marker in condition if marker else "extra" not in condition)]
    return [spec for found, spec in map(_parsed, fitting) if _normal(found) == _normal(name)]


def _parsed(requirement: str) -> tuple[str, str]:
    """The name and the range of ``name[extra] (>=1.0)``."""
    name, spec = re.match(r"\s*([\w.-]+)\s*(?:\[[^\]]*\])?\s*\(?([^;)]*)", requirement).groups()
    return name, spec.strip()


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
