# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Define the flags that commands share: a model's precision and, under Megatron's names, how ranks divide the model."""

from __future__ import annotations

import argparse

DTYPE_CHOICES = ("auto", "bf16", "float32")


def add_dtype_flag(group: argparse._ArgumentGroup, default: str | None = None) -> None:
    """Add ``--dtype``; None stands for bf16 on a GPU, else float32."""
    what = (
        "precision of the parameters. 'auto' is bf16 on a GPU and on a CPU that is faster in it, else float32 (default"
    )
    said = default or "bf16 on a GPU, else float32"
    group.add_argument("--dtype", choices=DTYPE_CHOICES, default=default, help=f"{what}: {said})")


def add_layout_flags(group: argparse._ArgumentGroup, shared: str, parted: str = "") -> None:
    """Add the sizes of tensor, pipeline and, where ``parted`` names what such ranks divide, context parallelism.

    Args:
        shared: what the ranks beyond the layout share out among them.
        parted: such as "each prompt".
    """
    meanings = {"tensor-model": "share every layer", "pipeline-model": "hold different layers"}
    if parted:
        meanings["context"] = f"hold parts of {parted}"
    for index, (name, what) in enumerate(meanings.items()):
        rest = (
            f". Ranks that torchrun starts beyond {'these three' if parted else 'these two'} sizes share {shared}"
            if index == len(meanings) - 1
            else ""
        )
        group.add_argument(
            f"--{name}-parallel-size", type=int, default=1, metavar="N", help=f"ranks that {what} (default 1){rest}"
        )
