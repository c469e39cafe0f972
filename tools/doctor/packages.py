# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Python, the packages that setup.py asks for, and Megatron-Core: are they there, do they fit, do they load?"""

import importlib
import importlib.metadata
import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from hydra_mcore.errors import InputError
from tools.doctor.lines import Line, fail, ok, one_line, version_of, warn
from tools.doctor.wanted import CONSTRAINTS, SETUP, allows, normal, parsed, pinned_versions, required

NVIDIAS = re.compile(r"\+(.*\.)?nv\d")  # the version of a build in NVIDIA's images: 2.14.0a0+b2c75dd062.nv26.9.1
OTHER_IMAGE = "take another of NVIDIA's images (docs/container.md)"
INSTALL = "make env, or: pip install -e . --constraint constraints.txt"
TE, FLA = "Transformer Engine", "flash-linear-attention"
FAST = (TE, FLA)  # training on GPUs works without them, slowly
NO_BUILD = "pip install --no-build-isolation -e .[te]"  # its extension for torch is compiled against the torch in use
HOPPER = "9.0"
BAD_ON_HOPPER = ">=3.4,<3.7.1"  # Triton miscompiles the gated backward there (flash-linear-attention, issue 640)


def requirements(setup: Path = SETUP, constraints: Path = CONSTRAINTS) -> Iterator[Line]:
    """Every package that setup.py asks for: missing or outside its range fails, other than the tested version warns."""
    python = ".".join(map(str, sys.version_info[:3]))
    yield ok("Python", f"{python} ({sys.executable})")  # tools/doctor.py refuses one that is too old
    tested = pinned_versions(constraints)
    for name, wanted in map(parsed, required(setup=setup)):
        found, tried = version_of(name), tested.get(normal(name))
        nvidias = bool(found and NVIDIAS.search(found))  # what else is in the image was built for it
        install = OTHER_IMAGE if nvidias else f"pip install '{name}{f'=={tried}' if tried else wanted}'"
        if found is None:
            yield fail(name, "not installed", INSTALL)
        elif not allows(wanted, found):
            replaced = "; pip would put another build in its place" if nvidias else ""
            yield fail(name, f"{found}, needs {wanted}{replaced}", install)
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
    except InputError:  # a GPU, and a Transformer Engine that its own line is about
        yield fail("Megatron-Core", "not imported because of Transformer Engine", f"that of {TE}, above")
        return
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


def transformer_engine(has_gpu: bool) -> Iterator[Line]:
    """Transformer Engine: there, new enough and loading; only a node with a GPU can use it."""
    spec, version = importlib.util.find_spec("transformer_engine"), version_of("transformer-engine")
    if not has_gpu:
        yield ok(TE, f"{version}, hidden: it needs a GPU" if version else "not installed; it needs a GPU")
        return
    from hydra_mcore.compat import accelerators

    try:
        version = spec and accelerators.transformer_engine()
    except accelerators.Unusable as unusable:
        yield fail(TE, unusable.found, unusable.fix)
        return
    if version:
        yield ok(TE, version)
    else:
        yield warn(TE, "not installed: no FP8, no layers with fused norms, torch's optimizer", NO_BUILD)


def apex(has_gpu: bool) -> Iterator[Line]:
    """NVIDIA's Apex, or another package of that name on the public index; what does not load is not used."""
    if importlib.util.find_spec("apex") is None:
        yield ok("Apex", "not installed; not needed")
        return
    if not has_gpu:
        yield ok("Apex", "hidden: it needs a GPU")
        return
    from hydra_mcore.compat import accelerators

    try:
        accelerators.nvidia_apex()
    except accelerators.Unusable as unusable:
        yield warn("Apex", f"not used: {unusable.found}", unusable.fix)
    else:
        yield ok("Apex", "NVIDIA's")


def flash_linear_attention(has_gpu: bool) -> Iterator[Line]:
    """The kernels of linear heads: there, in their range, and loading; only a node with a GPU needs them."""
    found, wanted = version_of(FLA), dict(map(parsed, required("kernels")))[FLA]
    if found is None and has_gpu:
        yield warn(FLA, "not installed: linear heads run on torch functions, far slower", "pip install -e .[kernels]")
    elif found is None:
        yield ok(FLA, "not installed; not needed without a GPU")
    elif not allows(wanted, found):
        yield fail(FLA, f"{found}, needs {wanted}", f"pip install '{FLA}{wanted}'")
    else:
        try:
            if has_gpu:
                importlib.import_module("fla.ops.gated_delta_rule")
        except Exception as error:
            fix = "reinstall it, fla-core and the Triton that torch asks for"
            yield fail(FLA, f"{found} does not load: {one_line(error)}", fix)
        else:
            yield ok(FLA, found)


def triton(capability: str) -> Iterator[Line]:
    """Versions that compute wrong gradients; one that is missing or too old shows in what needs it."""
    found = version_of("pytorch-triton") or version_of("triton")  # the first is its name in some of NVIDIA's images
    if found and capability == HOPPER and allows(BAD_ON_HOPPER, found) and version_of("tilelang") is None:
        wrong = f"{found}: on Hopper its gated delta rule has wrong gradients"
        yield fail("Triton", wrong, "a torch with Triton 3.7.1, or pip install tilelang")
    else:
        yield ok("Triton", found or "not installed")
