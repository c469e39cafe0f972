# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Transformer Engine and Apex: hidden where they cannot run, and one line with the fix where they do not load.

The installations are folders as an installer would leave them.  Transformer Engine's are its own Python of the package
index, which lacks its compiled libraries, and libraries compiled here that are broken in one way each.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from hydra_mcore.compat import accelerators
from tests.support.accelerators import ASKED, cuda, decision, library, needs_compiler, needs_te, te_core, te_python
from tests.support.doctor import distribution
from tests.support.paths import ROOT

HALF = "half installed; pip install --no-build-isolation 'transformer-engine[pytorch]'"
WITHOUT = "; or go on without it: pip uninstall transformer-engine\n"
NOTHING = ("", set())
CURAND = next(Path("/usr/local/cuda").rglob("libcurand.so*"), None)  # where Transformer Engine looks first


def refusal(site: Path, **environment: str) -> str:
    """What is said about Transformer Engine on a machine with a GPU: one line."""
    said, _ = decision(site, environment=environment)
    assert said.startswith("Transformer Engine") and said.endswith(WITHOUT) and said.count("\n") == 1
    return said


def packages(site: Path) -> Path:
    """Transformer Engine and NVIDIA's Apex, as Python that loads."""
    modules = ("transformer_engine/__init__", "transformer_engine/pytorch", "transformer_engine_torch")
    distribution(site, "transformer-engine", "2.19.0+5be0a1f", modules={f"{name}.py": "" for name in modules})
    modules = ("apex/optimizers/__init__", "apex/optimizers/fused_adam", "apex/multi_tensor_apply", "apex/__init__")
    distribution(site, "apex", "0.1", modules={f"{name}.py": "" for name in (*modules, "amp_C")})
    return site


def test_on_a_cpu_both_are_hidden_and_on_a_gpu_both_are_used(tmp_path: Path) -> None:
    site = packages(tmp_path)
    assert decision(site, on_cpu=True) == NOTHING
    assert decision(site) == ("", set(ASKED) - {"fused_weight_gradient_mlp_cuda"})


def test_where_neither_is_installed_nothing_is_said(tmp_path: Path) -> None:
    assert decision(tmp_path) == NOTHING


def test_an_uninstalled_one_left_its_libraries(tmp_path: Path) -> None:
    """The core library's own package keeps a folder, which Python imports, and Megatron-Core then takes for TE."""
    (tmp_path / "transformer_engine" / "wheel_lib").mkdir(parents=True)
    assert decision(tmp_path) == NOTHING


@needs_te
def test_te_without_its_core_library(tmp_path: Path) -> None:
    site = te_python(tmp_path)
    assert decision(site, on_cpu=True) == NOTHING
    said = refusal(site)
    assert "Found empty `transformer-engine` meta package" in said and HALF in said


@needs_te
@needs_compiler
@pytest.mark.skipif(CURAND is not None, reason=f"{CURAND} is there")
def test_te_without_curand(tmp_path: Path) -> None:
    te_core(te_python(tmp_path / "site"))
    said = refusal(tmp_path / "site")
    assert "curand shared object not found" in said
    assert ": pip install --upgrade nvidia-curand (nvidia-curand-cu12 for CUDA 12);" in said


@needs_te
@needs_compiler
def test_te_without_its_extension_for_torch(tmp_path: Path) -> None:
    te_core(te_python(tmp_path / "site"))
    said = refusal(tmp_path / "site", **cuda(tmp_path / "cuda"))
    assert "Could not find shared object file for Transformer Engine torch lib" in said and HALF in said


@needs_te
@needs_compiler
def test_te_of_two_versions(tmp_path: Path) -> None:
    te_core(te_python(tmp_path / "site"), version="2.19.0")
    said = refusal(tmp_path / "site", **cuda(tmp_path / "cuda"))
    assert "version mismatch" in said and HALF in said


@needs_te
@needs_compiler
def test_te_for_another_torch(tmp_path: Path) -> None:
    te_core(te_python(tmp_path / "site"))
    extension = tmp_path / "site" / "transformer_engine" / "wheel_lib" / "transformer_engine_torch.so"
    library(extension, "extern int _ZN3c104cuda9of_anotherE; int *use(void) { return &_ZN3c104cuda9of_anotherE; }")
    said = refusal(tmp_path / "site", **cuda(tmp_path / "cuda"))
    assert "undefined symbol: _ZN3c104cuda9of_anotherE" in said
    assert "built for another torch or CUDA; pip install --force-reinstall" in said


@needs_te
@needs_compiler
def test_te_for_another_cuda(tmp_path: Path) -> None:
    runtime = tmp_path / "libcudart.so.11.0"
    library(runtime, "int cudaMalloc(void) { return 0; }", f"-Wl,-soname,{runtime.name}")
    te_core(te_python(tmp_path / "site"), "int cudaMalloc(); int use() { return cudaMalloc(); }", str(runtime))
    runtime.unlink()
    said = refusal(tmp_path / "site", **cuda(tmp_path / "cuda"))
    assert "libcudart.so.11.0: cannot open shared object file" in said
    assert "built for another torch or CUDA; pip install --force-reinstall" in said


def test_te_that_is_too_old(tmp_path: Path) -> None:
    distribution(tmp_path, "transformer-engine", "2.18.0", modules={"transformer_engine/__init__.py": ""})
    line = "Transformer Engine 2.18.0 is too old, >=2.19 is needed: pip install --no-build-isolation"
    assert refusal(tmp_path).startswith(f"{line} 'transformer-engine[pytorch]>=2.19'")


@pytest.mark.parametrize(
    ("raised", "fix"),
    [
        ("import no_such_package.part", "pip install no_such_package;"),
        ("raise RuntimeError('TE requires cuDNN 9.12.0 or later, but the runtime is 9.1')", "nvidia-cudnn-cu13 ("),
        ("import importlib.metadata as m; m.version('transformer_engine_torch')", HALF),
    ],
)
def test_other_reasons(raised: str, fix: str, tmp_path: Path) -> None:
    modules = {"transformer_engine/__init__.py": "", "transformer_engine/pytorch.py": raised}
    distribution(tmp_path, "transformer-engine", "2.20.2", modules=modules)
    assert fix in refusal(tmp_path)


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ("apex/optimizers/fused_adam.py", "/apex is not NVIDIA's Apex: pip uninstall apex; NVIDIA's comes from"),
        ("amp_C.py", "NVIDIA's Apex does not load (No module named 'amp_C'): build it for this torch"),
    ],
)
def test_an_apex_that_cannot_be_used_is_hidden_with_a_line(broken: str, said: str, tmp_path: Path) -> None:
    site = packages(tmp_path)
    (site / broken).unlink()
    line, there = decision(site)
    assert line.startswith("Apex is not used: ") and said in line and line.count("\n") == 1
    assert there == {name for name in ASKED if name.startswith("transformer_engine")}
    assert decision(site, environment={"LOCAL_RANK": "1"})[0] == ""
    assert decision(site, on_cpu=True) == NOTHING


def test_what_was_inside_a_hidden_package_is_hidden_too(tmp_path: Path) -> None:
    """Python looks for a module by its full name first: one that was loaded before the error would still be found."""
    site = packages(tmp_path)
    (site / "amp_C.py").write_text("import apex.optimizers; raise ImportError('undefined symbol')")
    said, there = decision(site)
    assert "does not load (undefined symbol)" in said and "apex.optimizers" not in there


def test_setup_asks_for_the_same_version() -> None:
    tree = ast.parse((ROOT / "setup.py").read_text())
    (extras,) = (
        ast.literal_eval(node.value) for node in ast.walk(tree) if getattr(node, "arg", None) == "extras_require"
    )
    assert extras["te"] == [f"transformer-engine[pytorch]>={accelerators.OLDEST_TE}", "nvidia-curand"]
    assert extras["gpu"] == ["hydra_mcore[kernels,te]"]
