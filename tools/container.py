#!/usr/bin/env python3
# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Add what hydra_mcore needs to NVIDIA's PyTorch image, in an environment of its own; the image stays unchanged."""

import argparse
import importlib.metadata
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hydra_mcore.commands import one_line_errors
from hydra_mcore.errors import InputError
from tools.doctor.wanted import normal, pinned_versions, setup_argument

EXTRAS = ("kernels", "eval", "test")  # not te: the image has its own
# What the image was built around. Another build of one of these would not load with the others.
KEPT = (
    *("torch", "torchvision", "triton", "pytorch-triton", "numpy", "apex", "flash-attn"),
    *("transformer-engine", "transformer-engine-torch", "transformer-engine-cu13"),
)
NEVER = re.compile("|".join((*map(re.escape, KEPT), "nvidia-.*")))  # what must not come into the new environment

EXAMPLES = """\
The environment sees all packages of the Python that makes it. pip keeps those that fit setup.py. It installs what is
missing or too old from the package index, in the version of constraints.txt. torch, Triton, Transformer Engine, Apex
and numpy stay as they are. If that is not possible, the command ends with status 2 and says why.

example:
  in a container of nvcr.io/nvidia/pytorch:26.09-py3 (the Dockerfile does it)
      python3 tools/container.py /opt/hydra
"""


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="container", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("folder", type=Path, help="the new environment; it must not exist")
    return p


@one_line_errors("container")
def main(argv: list[str] | None = None) -> None:
    folder = parser().parse_args(argv).folder
    if folder.exists():
        raise InputError(f"{folder} exists; name another folder, or remove it")
    image = installed()
    if "torch" not in image:
        raise InputError(f"{sys.executable} has no torch; use the Python of NVIDIA's PyTorch image (docs/container.md)")
    if subprocess.run([sys.executable, "-m", "venv", "--system-site-packages", "--without-pip", folder]).returncode:
        raise InputError(f"no environment could be made in {folder}; the reason stands above")
    wanted, limits = folder / "requirements.txt", folder / "constraints.txt"
    wanted.write_text("\n".join(requirements()) + "\n")
    limits.write_text("\n".join(constraints(pinned_versions(), image)) + "\n")
    pip = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install", "--no-cache-dir"]
    # NVIDIA sets it, so that every pip in the image keeps to the versions there; some of them are too old.
    free = {name: value for name, value in os.environ.items() if name != "PIP_CONSTRAINT"}
    if subprocess.run([*pip, "--requirement", wanted, "--constraint", limits], env=free).returncode:
        raise InputError(
            "pip cannot add what is needed to this image; the reason stands above, other images are in"
            " docs/container.md"
        )
    (site,) = folder.glob("lib/python3*/site-packages")
    added = installed(str(site))
    if hides := sorted(filter(NEVER.fullmatch, added)):
        raise InputError(
            f"pip has put {', '.join(hides)} before what the image has; take another image (docs/container.md)"
        )
    print(
        f"{len(added)} packages in {folder}; of the image: {', '.join(f'{n} {image[n]}' for n in KEPT if n in image)}"
    )


def installed(*path: str) -> dict[str, str]:
    """The version of every package on a path, or else on Python's own, by its normal name."""
    found = importlib.metadata.distributions(path=list(path)) if path else importlib.metadata.distributions()
    versions: dict[str, str] = {}
    for distribution in found:
        if distribution.name:  # None is a folder that an uninstallation left behind
            versions.setdefault(normal(distribution.name), distribution.version)  # the first on the path is imported
    return versions


def requirements() -> list[str]:
    """What setup.py asks for, with the extras that a job needs."""
    extras = setup_argument("extras_require")
    return sum((extras[extra] for extra in EXTRAS), setup_argument("install_requires"))


def constraints(tested: Mapping[str, str], image: Mapping[str, str]) -> list[str]:
    """Limits for pip, one a package.

    Args:
        tested: the version of constraints.txt for each name.
        image: the version that the image has.
    """
    from packaging.version import Version  # Transformer Engine needs it, so every image has it

    lines = [f"{name}=={image[name]}" for name in KEPT if name in image]
    for name in sorted(tested.keys() - set(KEPT)):
        if name not in image:
            lines.append(f"{name}=={tested[name]}")
        elif Version(image[name]) <= Version(tested[name]):
            lines.append(f"{name}<={tested[name]}")  # pip leaves it, or where it is too old takes the tested one
    return lines


if __name__ == "__main__":
    main()
