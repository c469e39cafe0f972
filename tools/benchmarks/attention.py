# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Measure causal attention by each of torch's kernels, forward and backward.

The heads of a group share keys and values, or each head gets a copy of them.

FA heads copy them, because groups may be uneven, and take the kernel that torch chooses. This section says what another
choice would give.
"""

from __future__ import annotations

import argparse
import contextlib
import warnings
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from hydra_mcore.errors import InputError
from hydra_mcore.model.precision import DTYPES
from tools.benchmarks.measure import chosen_machine, measured
from tools.benchmarks.report import Report

COLUMNS = ("tokens", "kernel", "s (least..most)", "times torch's choice", "TFLOP/s", "peak MiB")
CHOICE = "torch's choice"
LENGTHS = {"cpu": [512, 2048], "cuda": [2048, 16_384, 131_072]}


def run(args: argparse.Namespace) -> Report:
    device, dtype = chosen_machine(args)
    if args.heads % args.kv_groups:
        raise InputError(f"--kv-groups {args.kv_groups} does not divide {args.heads} heads")
    points, rows = [], []
    for length in args.lengths or LENGTHS[device]:
        calls = _calls(args, length, device, dtype)
        refused = {name: error for name, call in calls.items() if (error := _refusal(call))}
        found = measured(
            {name: call for name, call in calls.items() if name not in refused}, length, args.repeats, device
        )
        points += found
        chosen = next(point.median for point in found if point.name == CHOICE)
        # forward takes two products of half a square; backward five, as it makes the scores again
        operations = 7 * args.heads * args.head_dim * length * (length + 1)
        for point in found:
            speed, memory = operations / point.median / 1e12, point.peak_bytes / 2**20
            rows.append(
                [length, point.name, point.spread, f"{point.median / chosen:.3f}", f"{speed:.2f}", f"{memory:.1f}"]
            )
        rows += [[length, name, error, "-", "-", "-"] for name, error in refused.items()]
    notes = (
        f"{args.heads} heads of {args.head_dim} channels, {args.kv_groups} kv groups, one row, {dtype}, {device};"
        " forward and backward."
    )
    return Report("Causal attention by kernel", notes, COLUMNS, rows, points)


def _calls(args: argparse.Namespace, length: int, device: str, dtype: str) -> dict[str, Callable[[], None]]:
    """A call of each kernel, by name."""

    def made(heads: int) -> torch.Tensor:
        return torch.randn(length, 1, heads, args.head_dim, device=device, dtype=DTYPES[dtype], requires_grad=True)

    q, k, v = made(args.heads), made(args.kv_groups), made(args.kv_groups)
    grad_out, times = torch.randn_like(q), args.heads // args.kv_groups
    gpu_only = (
        {"cuDNN": SDPBackend.CUDNN_ATTENTION, "memory-efficient": SDPBackend.EFFICIENT_ATTENTION}
        if device == "cuda"
        else {}
    )
    kernels = {CHOICE: None, "flash": SDPBackend.FLASH_ATTENTION, **gpu_only}

    def call(kernel: SDPBackend | None, shared: bool) -> None:
        with contextlib.nullcontext() if kernel is None else sdpa_kernel(kernel):
            k_and_v = (k, v) if shared or times == 1 else (x.repeat_interleave(times, dim=2) for x in (k, v))
            heads_first = (x.permute(1, 2, 0, 3) for x in (q, *k_and_v))
            out = F.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=shared)
            torch.autograd.grad(out.permute(2, 0, 1, 3), (q, k, v), grad_out)

    calls = {}
    for name, kernel in kernels.items():
        calls[name] = partial(call, kernel, False)
        if times > 1:
            calls[f"{name}, shared"] = partial(call, kernel, True)
    return calls


def _refusal(call: Callable[[], None]) -> str:
    """Why a kernel does not take such tensors here; empty where it does."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch tells all the reasons of all kernels
            call()
    except RuntimeError as error:
        if "No available kernel" not in str(error):
            raise
        return "not taken"
    return ""
