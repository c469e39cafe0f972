# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Of each Triton kernel one configuration, here or in a command: python -m tests.support.one_configuration MODULE ARGS.

A tuner compiles and times some 40 for every number of heads of a GDN layer, a second each: minutes before a first
result. What is right in one is right in all.
"""

from __future__ import annotations

import runpy
import sys
from typing import Any


def install() -> None:
    """Keep each tuner's first configuration, for good."""
    from triton.runtime.autotuner import Autotuner  # not everywhere

    prune = Autotuner.prune_configs

    def first(tuner: Any, arguments: dict[str, Any]) -> list[Any]:
        return prune(tuner, arguments)[:1]

    Autotuner.prune_configs = first


if __name__ == "__main__":
    install()
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
