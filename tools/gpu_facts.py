#!/usr/bin/env python3
# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Print date, GPU and versions as JSON, so that a measured number can be judged. Fails if there is no GPU to check."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import platform
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hydra_mcore.commands import one_line_errors

PACKAGES = (
    "torch",
    "triton",
    "megatron-core",
    "flash-linear-attention",
    "fla-core",
    "transformer-engine",
    "transformers",
    "numpy",
)


@one_line_errors("gpu_facts")
def main() -> None:
    p = argparse.ArgumentParser(
        prog="gpu_facts", description=__doc__, epilog="example: python tools/gpu_facts.py gpu > machine.json"
    )
    p.add_argument("device", choices=("gpu", "cpu"), help="cpu: a rehearsal, no GPU is asked for")
    device = p.parse_args().device
    import torch  # takes seconds: not for --help

    if device == "gpu" and not torch.cuda.is_available():
        sys.exit("gpu-check: torch sees no GPU; HYDRA_TEST_DEVICE=cpu rehearses without one")
    facts = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
    }
    if device == "gpu":
        properties = torch.cuda.get_device_properties(0)
        facts |= {"gpu": properties.name, "GiB": round(properties.total_memory / 2**30, 1), "cuda": torch.version.cuda}
    installed = {each.name.lower().replace("_", "-"): each.version for each in importlib.metadata.distributions()}
    facts["packages"] = {name: installed[name] for name in PACKAGES if name in installed}
    print(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
