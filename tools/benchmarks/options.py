# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Flags and model shapes that several sections of the benchmark share."""

from __future__ import annotations

import argparse

from hydra_mcore.config import ModelShape
from hydra_mcore.errors import InputError

DTYPES = {"cpu": "float32", "cuda": "bfloat16"}
# Qwen3-1.7B (its config.json).
QWEN3 = ModelShape(
    num_layers=28, hidden_size=2048, num_heads=16, num_kv_groups=8, head_dim=128, ffn_hidden_size=6144,
    vocab_size=151936,
    native_length=40960,
)  # fmt: skip


def positive(text: str) -> int:
    """A flag's value that counts something."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not above 0")
    return value


def add_machine(parser: argparse.ArgumentParser) -> None:
    """``--device`` and ``--dtype``, for ``chosen_machine``."""
    parser.add_argument(
        "--device", choices=tuple(DTYPES), help="where to measure (default: cuda where torch sees a GPU)"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32 on a CPU, bfloat16 on a GPU")


def chosen_machine(args: argparse.Namespace) -> tuple[str, str]:
    """Device ("cpu" or "cuda") and torch's name of the dtype.

    Raises:
        InputError: cuda, and torch sees no GPU.
    """
    import torch

    available = torch.cuda.is_available()
    if args.device == "cuda" and not available:
        raise InputError("--device cuda: torch sees no GPU; leave it out to measure on the CPU")
    device = args.device or ("cuda" if available else "cpu")
    return device, args.dtype or DTYPES[device]


def spread_heads(count: int, shape: ModelShape) -> list[int]:
    """So many heads, in as many kv groups as there are: the most keys and values for that number.

    Raises:
        InputError: more heads than the shape has.
    """
    if not 0 <= count <= shape.num_heads:
        raise InputError(f"{count} FA heads: choose 0 to {shape.num_heads}")
    size = shape.num_heads // shape.num_kv_groups
    return sorted(range(shape.num_heads), key=lambda head: head % size)[:count]
