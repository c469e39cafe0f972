# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The Dockerfile's steps in a Python that plays NVIDIA's image, with a real pip: the image's own builds stay."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.support.doctor import distribution
from tests.support.paths import ROOT
from tools.container import constraints, installed, requirements
from tools.doctor.wanted import allows, normal, parsed, pinned_versions

OWN = Path(sysconfig.get_path("purelib"))  # what the tests themselves run with
TORCH = "2.14.0a0+b2c75dd062.nv26.9.1"
IMAGE = {
    **{"torch": TORCH, "triton": "3.8.0", "transformer-engine": "2.19.0+c1f6d8a", "apex": "0.1", "numpy": "2.1.0"},
    **{"pyyaml": "99.0", "pillow": "12.0", "tqdm": "4.60"},  # newer than tested, older, too old
}


def wheel(folder: Path, name: str, version: str, *requires: str) -> None:
    """A package without code for pip to install."""
    folder.mkdir(exist_ok=True)
    stem = f"{name.replace('-', '_')}-{version}"
    metadata = [f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {requirement}" for requirement in requires)]
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{stem}.dist-info/METADATA", "Metadata-Version: 2.1\n" + "\n".join(metadata) + "\n")
        archive.writestr(f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{stem}.dist-info/RECORD", "")


def own(site: Path, *names: str) -> None:
    """Packages that the tests run with, in the image too."""
    for name in names:
        for path in (*OWN.glob(f"{name}-*.dist-info"), OWN / name):
            (site / path.name).symlink_to(path)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package index with all that setup.py asks for, in the tested version and a later one."""
    folder, tested = tmp_path_factory.mktemp("index"), pinned_versions()
    for name, wanted in map(parsed, requirements()):
        for version in (tested.get(normal(name), wanted.lstrip(">=")), "100.0"):
            wheel(folder, name, version)
    return folder


def image(folder: Path, packages: Mapping[str, str]) -> dict[str, str]:
    """A Python with these packages; returns the environment in which it is `python3`."""
    site = folder / "site"
    site.mkdir()
    own(site, "pip", "packaging")
    for name, version in packages.items():
        distribution(site, name, version)
    command = [sys.executable, "-m", "venv", "--system-site-packages", "--without-pip", str(folder / "python")]
    subprocess.run(command, check=True, timeout=60)
    (folder / "nvidias.txt").write_text("tqdm==4.60\n")
    return {
        **os.environ,
        "PATH": f"{folder}/python/bin:{os.environ['PATH']}",
        "PYTHONPATH": str(site),
        "PIP_CONSTRAINT": str(folder / "nvidias.txt"),
    }


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What .dockerignore leaves for a build."""
    folder = tmp_path_factory.mktemp("context")
    ignored, *kept, caches = re.findall(r"(?m)^[^#].*$", (ROOT / ".dockerignore").read_text())
    assert (ignored, caches) == ("*", "**/__pycache__")
    for name in (line.removeprefix("!") for line in kept):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    return folder


def steps(folder: Path, context: Path) -> list[str]:
    """What the Dockerfile runs, with the new environment in this folder."""
    lines = re.findall(r"(?m)^RUN (?:--\S+ )*(.*)$", (ROOT / "Dockerfile").read_text())
    return [line.replace("/src", str(context)).replace("/opt/hydra", str(folder / "hydra")) for line in lines]


def run(step: str, environment: Mapping[str, str], limit_s: float = 120) -> subprocess.CompletedProcess:
    return subprocess.run(["sh", "-c", step], env=environment, cwd="/", capture_output=True, text=True, timeout=limit_s)


def offline(index: Path) -> dict[str, str]:
    return {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(index)}


def added(folder: Path) -> dict[str, str]:
    (site,) = (folder / "hydra").glob("lib/python3*/site-packages")
    return installed(str(site))


def test_the_image_keeps_its_own_and_gets_tested_versions(tmp_path: Path, index: Path, context: Path) -> None:
    environment = image(tmp_path, IMAGE)
    done = run(steps(tmp_path, context)[0], environment | offline(index))
    assert done.returncode == 0, done.stderr
    new, tested = added(tmp_path), pinned_versions()
    left = {"torch", "numpy", "pyyaml", "pillow"}
    names = {normal(name) for name, _ in map(parsed, requirements())} - left
    assert {"megatron-core", "transformers", "flash-linear-attention", "lm-eval", "pytest", "tqdm"} <= names
    assert new.keys() == names
    assert {name: tested[name] for name in names & tested.keys()} == {name: new[name] for name in names & tested.keys()}
    ask = "import importlib.metadata as m; print(*map(m.version, ('torch', 'numpy', 'triton', 'apex', 'pyyaml')))"
    seen = subprocess.run([tmp_path / "hydra/bin/python", "-c", ask], env=environment, capture_output=True, text=True)
    assert seen.stdout.split() == [TORCH, "2.1.0", "3.8.0", "0.1", "99.0"]
    assert done.stdout.splitlines()[-1].endswith(
        f"of the image: torch {TORCH}, triton 3.8.0, numpy 2.1.0, apex 0.1, transformer-engine 2.19.0+c1f6d8a"
    )


def test_an_image_that_does_not_fit_is_refused_in_one_line(tmp_path: Path, index: Path, context: Path) -> None:
    packages = {**IMAGE, "torch": "2.9.0a0+50eac811a6.nv25.9.1"}
    environment = image(tmp_path, packages) | offline(index)
    too_old = run(steps(tmp_path, context)[0], environment)
    assert too_old.returncode == 2 and not added(tmp_path)
    assert "torch>=2.9" in too_old.stderr and too_old.stderr.splitlines()[-1].startswith("container: pip cannot add")
    again = run(steps(tmp_path, context)[0], environment)
    assert again.returncode == 2 and "hydra exists; name another folder" in again.stderr
    assert again.stderr.count("\n") == 1


def test_nothing_is_put_before_what_the_image_has(tmp_path: Path, context: Path) -> None:
    packages = {name: version for name, version in IMAGE.items() if name != "triton"}
    index = tmp_path / "index"
    for name, wanted in map(parsed, requirements()):
        needs = ["triton"] if name == "flash-linear-attention" else []
        wheel(index, name, pinned_versions().get(normal(name), wanted.lstrip(">=")), *needs)
    wheel(index, "triton", "3.9.0")
    done = run(steps(tmp_path, context)[0], image(tmp_path, {**packages, "pytorch-triton": "3.8.0"}) | offline(index))
    assert done.returncode == 2 and "container: pip has put triton before what the image has" in done.stderr


def test_a_python_without_torch_is_no_image(tmp_path: Path, context: Path) -> None:
    done = run(steps(tmp_path, context)[0], image(tmp_path, {}))
    assert done.returncode == 2 and "has no torch; use the Python of NVIDIA's" in done.stderr
    assert done.stderr.count("\n") == 1 and not (tmp_path / "hydra").exists()


def test_limits_for_pip() -> None:
    tested = {"torch": "2.15.0", "triton": "3.9.0", "numpy": "2.5.5", "certifi": "3", "click": "8.2", "idna": "4"}
    kept = {"torch": TORCH, "numpy": "2.1.0", "certifi": "4", "click": "8.1"}
    assert constraints(tested, kept) == [f"torch=={TORCH}", "numpy==2.1.0", "click<=8.2", "idna==4"]


def test_doctor_and_pip_agree_about_versions(tmp_path: Path) -> None:
    """Pip puts a release in the place of exactly those that doctor does not accept."""
    found = ["2.8.0", "2.9.0a0+50eac811a6.nv25.9.1", "2.9.0rc1", "2.9", "2.9.0+nv25.10", "2.10.0a0+nv25.12", TORCH, "3"]
    environment = image(tmp_path, {f"p{number}": version for number, version in enumerate(found)})
    for number in range(len(found)):
        wheel(tmp_path / "index", f"p{number}", "100.0")
    wanted = [f"p{number}>=2.9" for number in range(len(found))]
    pip = ["python3", "-m", "pip", "install", "--quiet", "--dry-run", "--report", "-", *wanted]
    environment = {**environment, **offline(tmp_path / "index")}
    report = subprocess.run(pip, env=environment, capture_output=True, text=True, timeout=60, check=True).stdout
    replaced = {found[int(each["metadata"]["name"][1:])] for each in json.loads(report)["install"]}
    assert replaced == {version for version in found if not allows(">=2.9", version)}
    assert replaced == {"2.8.0", "2.9.0a0+50eac811a6.nv25.9.1", "2.9.0rc1"}


def test_the_tag_that_is_taken_fits() -> None:
    tag = re.search(r"(?m)^ARG TAG=(\S+)$", (ROOT / "Dockerfile").read_text()).group(1)
    rows = re.findall(r"(?m)^\| (\d\d\.\d\d) \|.*\| (\w+)[^|]*\|$", (ROOT / "docs" / "container.md").read_text())
    assert len(rows) > 1 and dict(rows)[tag] == "fits"


@pytest.mark.slow
def test_the_whole_build_with_the_package_index(tmp_path: Path, context: Path) -> None:
    """The image has this environment's packages, torch under NVIDIA's version, and none that its makers leave out."""
    lacks = (
        "megatron,transformers,tokenizers,datasets,huggingface_hub,lm_eval,wandb,wonderwords,flash_linear,fla,hydra_"
    )
    environment = image(tmp_path, {"torch": TORCH})
    site = tmp_path / "site"
    for path in OWN.iterdir():
        other = path.name.startswith((*lacks.split(","), "torch-", "__"))
        if not other and not (site / path.name).exists() and path.suffix != ".pth":
            (site / path.name).symlink_to(path)
    install, check = steps(tmp_path, context)
    done = run(install, environment, 500)
    assert done.returncode == 0, done.stderr[-2000:]
    assert {"megatron-core", "transformers", "fla-core"} <= added(tmp_path).keys()
    environment["PATH"] = f"{tmp_path}/hydra/bin:{environment['PATH']}"
    done = run(check, environment, 500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"torch                    {TORCH}, tested with" in done.stdout and " 0 fail" in done.stdout
