# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The search for a base of the log-position scale, from the flags of ``tools/tune_log_scale.py``."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hydra_mcore.config import HydraOptions, ModelCard
from hydra_mcore.convert.tensor_table import is_teacher
from hydra_mcore.errors import InputError
from hydra_mcore.evaluation.log_scale import GRID, Trials, best_base
from hydra_mcore.evaluation.log_scale_report import markdown, write_report
from hydra_mcore.evaluation.parallel import ParallelModel
from hydra_mcore.model.build import load_model
from hydra_mcore.model.precision import DTYPES, chosen_dtype
from hydra_mcore.model.runtime import from_first_rank, process_groups
from hydra_mcore.ruler.haystack import read_text
from hydra_mcore.tokenizer import load_tokenizer


def run(args: argparse.Namespace) -> None:
    """Search, report, and write the choice if asked; raises InputError for what cannot be used."""
    layout = (args.tensor_model_parallel_size, args.pipeline_model_parallel_size)
    with process_groups(*layout, alone=False, cp_size=args.context_parallel_size):
        tune(args)


def tune(args: argparse.Namespace) -> None:
    """Check all input, run the search, report, and write the choice if asked."""
    card = ModelCard.load(args.checkpoint)
    check_model(args, card)
    windows_bs = from_first_rank(lambda: read_windows(args, card))
    _, model = load_model(args.checkpoint, DTYPES[chosen_dtype(args.dtype)])
    trials = Trials(ParallelModel([model]), windows_bs)
    present = card.options.fa_log_scale_base if card.options.log_scale_in("inference") else None
    for setting in (None, present):
        trials.loss(setting)
    _, inside = best_base(trials.loss, args.candidates or GRID)
    if torch.distributed.get_rank() != 0:
        return
    text = markdown(trials, present, inside)
    print(text)
    chosen = chosen_options(card.options, trials.best)
    if args.out:
        names = ("checkpoint", "text", "length", "dtype", "write")
        settings = {name: str(value) if isinstance(value := getattr(args, name), Path) else value for name in names}
        write_report(args.out, trials, present, text, settings)
        print(f"report: {args.out}")
    named = f"fa_log_scale {chosen.fa_log_scale!r}, fa_log_scale_base {chosen.fa_log_scale_base:g}"
    if args.write:
        dataclasses.replace(card, options=chosen).save(args.checkpoint)
        print(f"{args.checkpoint / 'model.json'}: {named}")
    elif chosen != card.options:
        print(f"to use it: the same command with --write, which sets in {args.checkpoint / 'model.json'} {named}")


def check_model(args: argparse.Namespace, card: ModelCard) -> None:
    """Raise InputError for a model that cannot be tuned; warn of windows that show nothing new."""
    if card.head_map.num_fa == 0:
        raise InputError(f"{args.checkpoint}: no FA heads, so nothing to scale")
    if is_teacher(card) and args.write:
        raise InputError(
            f"{args.checkpoint}: a teacher's family has no log-position scale to write; leave --write out, or give a"
            " student"
        )
    trained = max([stage["sequence_length"] for stage in card.stages], default=card.shape.native_length)
    if args.length <= trained:
        print(f"warning: windows of {args.length} tokens are no longer than the {trained} of training", file=sys.stderr)


def read_windows(args: argparse.Namespace, card: ModelCard) -> Tensor:
    """int64 [windows, length] from the beginning of the text; raises InputError where it has too few tokens, or unknown
    ones.
    """
    ids = read_text(load_tokenizer(args.checkpoint), args.text)
    if args.windows < 2 or args.length < 2:
        raise InputError(
            f"--windows {args.windows} --length {args.length}: at least two windows of two tokens are needed"
        )
    if len(ids) < args.windows * args.length:
        raise InputError(
            f"{args.text}: {len(ids):,} tokens, {args.windows} windows of {args.length:,} need"
            f" {args.windows * args.length:,}; give a longer text, or fewer --windows"
        )
    if ids.max() >= card.shape.vocab_size:
        raise InputError(
            f"{args.checkpoint}: its tokenizer gives token {ids.max()}, the model knows {card.shape.vocab_size}"
        )
    return torch.from_numpy(ids[: args.windows * args.length].astype(np.int64)).view(args.windows, args.length)


def chosen_options(options: HydraOptions, base: float | None) -> HydraOptions:
    """The options with this base, or with no scale for None; "always" stays what it is."""
    if base is None:
        return dataclasses.replace(options, fa_log_scale="never")
    when = "extend" if options.fa_log_scale == "never" else options.fa_log_scale
    return dataclasses.replace(options, fa_log_scale=when, fa_log_scale_base=base)
