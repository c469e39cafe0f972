# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The exported model beside its teacher in transformers: seconds of a prompt, seconds and cache bytes of a decoded
token.
"""

from __future__ import annotations

import argparse
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hydra_mcore.config import ModelShape
from hydra_mcore.errors import InputError
from tools.benchmarks.measure import Point
from tools.benchmarks.options import add_machine, chosen_machine, positive, spread_heads
from tools.benchmarks.report import Report

if TYPE_CHECKING:
    from tools.benchmarks.decoders import Decoder

HELP = "seconds of a prompt and of a decoded token, and cache bytes, by context length, beside the teacher"
EXAMPLES = """\
  seconds of a prompt, seconds and cache bytes of a decoded token, teacher beside HydraHead (minutes, random models or
  your own)
      MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=1000000000000 python tools/benchmark.py decode --figure decode.png
      python tools/benchmark.py decode --teacher-hf Qwen3-1.7B --hf runs/a/hf --lengths 1024 4096
"""
PREFILL_COLUMNS = ("tokens", "model", "s a prompt (least..most)", "tokens/s", "times faster than the teacher")
SHAPE = {"layers": 4, "heads": 16, "kv_groups": 8, "head_dim": 64, "hidden": 512, "ffn": 1536, "vocabulary": 1024}
FA_HEADS = [4, 2]


def add_options(parser: argparse.ArgumentParser) -> None:
    lengths = [2**power for power in range(10, 16)]
    parser.add_argument(
        "--lengths",
        nargs="+",
        type=positive,
        default=lengths,
        metavar="N",
        help="tokens of context (default 1024 ... 32768)",
    )
    parser.add_argument(
        "--steps", type=positive, default=16, metavar="N", help="tokens timed at each length (default 16)"
    )
    prompts = "times that a prompt of each length is read in one call (default 2)"
    parser.add_argument("--prompts", type=positive, default=2, metavar="N", help=prompts)
    add_machine(parser)
    parser.add_argument("--teacher-hf", type=Path, metavar="DIR", help="Hugging Face folder of the teacher")
    parser.add_argument(
        "--hf",
        nargs="+",
        type=Path,
        default=[],
        metavar="DIR",
        help="exported HydraHead models; the code in them is run",
    )
    random_models = parser.add_argument_group("random models, without --hf")
    counts = "FA heads of each layer, in the fewest kv groups that hold them and spread over the most (default 4 2)"
    random_models.add_argument("--fa-heads", nargs="+", type=positive, default=FA_HEADS, metavar="N", help=counts)
    for name, default in SHAPE.items():
        flag = "--" + name.replace("_", "-")
        random_models.add_argument(flag, type=positive, default=default, metavar="N", help="default %(default)s")


def run(args: argparse.Namespace) -> Report:
    """Single-token calls after a real prefill, then whole prompts; fails where a cache is not of the size that the
    formula says.
    """
    import torch

    from tools.benchmarks.decoders import COLUMNS, MIB, measured, prefills, rows

    device, dtype = chosen_machine(args)
    decoders = _decoders(args, device, dtype)
    found = list(measured(decoders, args.lengths, args.steps))
    prompts = prefills(decoders, args.lengths, args.prompts)
    steps = [point for points in found for point in points]
    weights = ", ".join(f"{decoder.weight_bytes / MIB:.1f} ({decoder.name})" for decoder in decoders)
    # Linux counts in KiB.
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    notes = (
        f"One row, {dtype}, {device}, threads: {torch.get_num_threads()}. After a real prefill, {args.steps} calls of"
        " one token each, models in turn: median (least..most). By bytes read: the ratio if time went with the bytes"
        " of weights and cache, each read once. Page faults, teacher / HydraHead: the allocator handed out fresh"
        " memory for a cache that grew by a copy, and the kernel cleared it; MALLOC_MMAP_MAX_=0"
        " MALLOC_TRIM_THRESHOLD_=1000000000000 in the environment keep glibc from that.\n\nMiB of weights that a token"
        f" reads: {weights}. Resident memory of the process, prefills, all models and all caches together, at most:"
        f" {resident:.0f} MiB."
    )
    wrong = [f"{step.name} at {step.length}" for step in steps if not step.exact]
    return Report(
        title="Decoding one token",
        notes=notes,
        columns=COLUMNS,
        rows=[row for points in found for row in rows(points)],
        points=[Point(step.name, step.length, step.seconds, step.cache_bytes) for step in steps],
        memory="cache",
        more=(_prefill_report(prompts, args.prompts),),
        failure=f"the cache is not of the size that the formula says: {', '.join(wrong)}" if wrong else "",
    )


def _prefill_report(points: Sequence[Point], repeats: int) -> Report:
    teachers = {point.length: point.median for point in points if point.name == "teacher"}
    rows = [
        [
            point.length,
            point.name,
            point.spread,
            f"{point.length / point.median:.0f}",
            f"{teachers[point.length] / point.median:.2f}",
        ]
        for point in points
    ]
    notes = f"One call for the whole prompt, logits of its last token, models in turn, {repeats} times."
    return Report("Reading a prompt", notes, PREFILL_COLUMNS, rows, points)


def _decoders(args: argparse.Namespace, device: str, dtype: str) -> list[Decoder]:
    """Teacher and students, stored or random."""
    from tools.benchmarks.decoders import random_decoders, stored_decoders

    if bool(args.hf) != bool(args.teacher_hf):
        raise InputError("--hf and --teacher-hf go together: a model is measured beside its teacher")
    if args.hf:
        random_only = SHAPE | {"fa_heads": FA_HEADS}
        if given := [name for name, default in random_only.items() if getattr(args, name) != default]:
            raise InputError(
                f"--{given[0].replace('_', '-')} has no use with --hf, whose folders say what the models are; leave"
                " it out"
            )
        return stored_decoders(args.teacher_hf, args.hf, device, dtype)
    shape = ModelShape(
        num_layers=args.layers, hidden_size=args.hidden, num_heads=args.heads, num_kv_groups=args.kv_groups,
        head_dim=args.head_dim,
        ffn_hidden_size=args.ffn, vocab_size=args.vocabulary, native_length=max(args.lengths),
    )  # fmt: skip
    return random_decoders(
        shape, [heads for n in args.fa_heads for heads in (range(n), spread_heads(n, shape))], device, dtype
    )
