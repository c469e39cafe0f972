# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The flags by which commands are told, in Megatron's words, how ranks divide a model."""

from __future__ import annotations

import argparse


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
            f"; what torchrun starts beyond {'the three' if parted else 'both'} shares {shared}"
            if index == len(meanings) - 1
            else ""
        )
        group.add_argument(
            f"--{name}-parallel-size", type=int, default=1, metavar="N", help=f"ranks that {what} (default 1){rest}"
        )
