# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""A dry run: the run is checked as the real job's would be, and said; nothing is built or trained."""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path
from typing import Any

from megatron.training.arguments import add_megatron_arguments

from hydra_mcore.config import CARD_NAME, ConfigError, add_stage_flags
from hydra_mcore.corpus.manifest import finished_path
from hydra_mcore.files import write_text
from hydra_mcore.recipe import Recipe
from hydra_mcore.stages import STAGES
from hydra_mcore.train.arguments import ResolvedStage
from hydra_mcore.train.data import check_data
from hydra_mcore.train.flags import OURS, FlagParser, flag_name

WIDTH = 110  # of a line of settings


def report(resolved: ResolvedStage, args: argparse.Namespace, settings: dict[str, Any], table: str) -> None:
    """Check what is left to check, and print model, places, ranks, batches and settings.

    Args:
        args: as Megatron validated them.
        settings: the flags as they were given, by what they set.
        table: of all arguments, for the file.

    Raises:
        ConfigError: data that cannot be trained on.
    """
    options, shape, head_map = resolved.options, resolved.card.shape, resolved.card.head_map
    data = _data(resolved, args)
    teacher = options.teacher if STAGES[options.stage].needs_teacher else "none"
    if teacher != "none" and not (Path(teacher) / CARD_NAME).is_file():
        teacher += " (is not there yet)"
    sizes = (args.tensor_model_parallel_size, args.pipeline_model_parallel_size, args.context_parallel_size)
    rows, steps = args.global_batch_size, args.train_iters
    a_rank = rows // (args.micro_batch_size * args.data_parallel_size)
    batches = "micro-batch" if a_rank == 1 else "micro-batches"
    arguments = Path(options.run_dir) / f"{options.stage}.dry_run.txt"
    write_text(arguments, table)
    heads = f"{head_map.num_fa} FA heads of {shape.num_layers} layers x {shape.num_heads}"
    print(f"stage {options.stage}, a dry run: nothing is trained")
    print(f"  model    {heads}{f'; {resolved.assumed}' if resolved.assumed else ''}")
    print(f"  start    {resolved.start}{' (is not there yet)' if resolved.assumed else ''}")
    print(f"  save     {resolved.save}{' (goes on from its last checkpoint)' if resolved.resume else ''}")
    print(f"  teacher  {teacher}")
    print(f"  data     {data}")
    print(
        f"  ranks    {args.world_size} = tensor {sizes[0]} x pipeline {sizes[1]} x context {sizes[2]} x data"
        f" {args.data_parallel_size}"
    )
    print(
        f"  batch    {rows} rows of {args.seq_length} tokens a step, {a_rank} {batches} of"
        f" {args.micro_batch_size} on each data-parallel rank;"
        f" {steps} steps are {steps * rows * args.seq_length:,} tokens"
    )
    _print_settings(settings)
    print(f"all arguments: {arguments}")


def _data(resolved: ResolvedStage, args: argparse.Namespace) -> str:
    """Where the data are, checked unless the recipe's section prepare has yet to write them."""
    paths = [str(path) for path in args.data_path or []]
    awaited = str(Recipe.load(resolved.config, "prepare").values.get("out")) if resolved.config else ""
    try:
        check_data(args)
    except ConfigError:
        if awaited not in paths or any(path.exists() for path in (finished_path(awaited), Path(f"{awaited}.idx"))):
            raise
        return f"{awaited} (the section prepare is to write it: not checked)"
    return f"{len(paths)} paths, the first one {paths[0]}" if len(paths) > 1 else "".join(paths)


def _print_settings(settings: dict[str, Any]) -> None:
    """Ours, and what differs from Megatron's default, each with its value."""
    ours, changed = [], []
    for action in add_stage_flags(add_megatron_arguments(FlagParser(allow_abbrev=False)))._actions:
        if action.dest not in settings:
            continue
        value, name = settings[action.dest], flag_name(action)
        if action.container.title.startswith(OURS):
            ours.append(f"{name} {value!r}" if value == "" else f"{name} {value}")
        elif value != action.default and str(value) != str(action.default):
            changed.append(f"{action.dest.replace('_', '-') if action.nargs == 0 else name} {_short(value)}")
    for title, items in (("hydra_mcore's settings", ours), ("settings that differ from Megatron's defaults", changed)):
        unbroken = ", ".join(item.replace(" ", "\xa0") for item in items)
        filled = textwrap.fill(unbroken, WIDTH, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
        print(f"{title}:\n{filled}".replace("\xa0", " "))


def _short(value: Any) -> str:
    text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
