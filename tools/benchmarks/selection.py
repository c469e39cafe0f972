# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Seconds of the exact scores of all heads of random models, beside a forward pass for every head."""

from __future__ import annotations

import argparse

from hydra_mcore.config import ModelShape
from tools.benchmarks.options import positive
from tools.benchmarks.report import Report

HELP = "seconds of the scores of all heads, beside one forward pass for each of them"
EXAMPLES = """\
  seconds of the exact scores of all heads beside a forward pass for every head (minutes, random models)
      python tools/benchmark.py selection
      python tools/benchmark.py selection --models 28x16 --naive-heads 448
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    models = [(4, 8), (8, 8), (14, 16), (28, 16)]
    parser.add_argument(
        "--models", nargs="+", type=_layers_x_heads, default=models, metavar="LxH", help="default 4x8 8x8 14x16 28x16"
    )
    parser.add_argument("--hidden", type=positive, default=256, metavar="N", help="width (default 256)")
    parser.add_argument("--head-dim", type=positive, default=32, metavar="N", help="channels of a head (default 32)")
    parser.add_argument("--ffn", type=positive, default=768, metavar="N", help="width of the MLPs (default 768)")
    parser.add_argument("--vocabulary", type=positive, default=512, metavar="N", help="tokens (default 512)")
    parser.add_argument("--length", type=positive, default=512, metavar="N", help="tokens a prompt (default 512)")
    parser.add_argument(
        "--pairs", type=positive, default=1, metavar="N", help="pairs of prompts in the batch (default 1)"
    )
    parser.add_argument("--answer", type=positive, default=7, metavar="N", help="tokens an answer (default 7)")
    parser.add_argument(
        "--naive-heads", type=positive, default=64, metavar="N", help="receivers scored by definition too (default 64)"
    )
    parser.add_argument(
        "--naive-senders", type=positive, default=24, metavar="N", help="senders scored by definition too (default 24)"
    )


def run(args: argparse.Namespace) -> Report:
    """Receiver scores, attribution and one round of sender scores of random models."""
    from tools.benchmarks.score_seconds import COLUMNS, Prompts, rows

    shapes = [
        ModelShape(
            num_layers=layers, hidden_size=args.hidden, num_heads=heads, num_kv_groups=max(1, heads // 2),
            head_dim=args.head_dim,
            ffn_hidden_size=args.ffn, vocab_size=args.vocabulary, native_length=args.length,
        )
        for layers, heads in args.models
    ]  # fmt: skip
    prompts = Prompts(args.length, args.pairs, args.answer)
    notes = (
        f"Random float32 models: width {args.hidden}, head_dim {args.head_dim}, MLPs {args.ffn}, two heads a kv group."
        f" Prompts of {args.length} tokens, {args.answer} of them the answer; pairs in the batch: {args.pairs}."
        " Predicted: by counting operations. By definition: one forward pass for every head (senders: two) and two"
        " more; the median of the heads run stands for all. Difference: between both ways, the largest, over the"
        " largest score."
    )
    found = [row for shape in shapes for row in rows(shape, prompts, args.naive_heads, args.naive_senders)]
    return Report("Seconds of the scores of all heads", notes, COLUMNS, found)


def _layers_x_heads(text: str) -> tuple[int, int]:
    layers, heads = map(positive, text.split("x"))
    if layers == 1:
        raise argparse.ArgumentTypeError("heads of a single layer have no heads to act through")
    return layers, heads
