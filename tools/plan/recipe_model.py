# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The model that a recipe trains, from whatever is there of it already."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path

from hydra_mcore.config import CARD_NAME, ConfigError, HydraOptions, ModelCard, ModelShape, StageOptions
from hydra_mcore.convert.hf_config import CONFIG_NAME, read_config
from hydra_mcore.heads import HeadMap
from hydra_mcore.recipe import Recipe
from hydra_mcore.selection.choose import linear_words, parse_linear, parse_ratio


def model_card(args: argparse.Namespace, options: StageOptions) -> tuple[ModelCard, str]:
    """The student's card, and where its shape and its heads come from, for the reader.

    Raises:
        InputError: no model can be found, or a head map that is for another one.
    """
    asked = args.hf or args.head_map or args.ratio
    for folder in (options.start_from, options.run_dir and f"{options.run_dir}/student"):
        if folder and not asked and (Path(folder) / CARD_NAME).is_file():
            return dataclasses.replace(ModelCard.load(folder), stage=options.stage), f"model of {folder}"
    teacher, source = _teacher(args, options)
    if args.head_map:
        head_map = HeadMap.load(args.head_map)
        teacher.check_head_map(head_map)
        source += f", heads of {args.head_map}"
    else:
        select = Recipe.load(args.config, "select").values
        ratio, linear = args.ratio or select.get("ratio", "3:1"), select.get("linear") or []
        words = linear if isinstance(linear, list) else [linear]
        kinds = parse_linear(map(str, words), teacher.shape.num_layers)
        head_map = even_map(teacher.shape, str(ratio), kinds)
        source += (
            f"; heads not selected yet: assumed {ratio}, spread evenly, each FA head in a kv group of its own as far as"
            f" there are groups, the others {linear_words(kinds)}"
        )
    layer = {key.replace("-", "_"): value for key, value in Recipe.load(args.config, "hybridize").values.items()}
    choices = HydraOptions(
        **{field.name: layer[field.name] for field in dataclasses.fields(HydraOptions) if field.name in layer}
    )
    return dataclasses.replace(teacher, head_map=head_map, options=choices, stage=options.stage), source


def _teacher(args: argparse.Namespace, options: StageOptions) -> tuple[ModelCard, str]:
    """The teacher's card: of its folder, else of a config.json (its weights are then unknown)."""
    if options.teacher and not args.hf and (Path(options.teacher) / CARD_NAME).is_file():
        return ModelCard.load(options.teacher), f"shape of {options.teacher}"
    folders = [args.hf] if args.hf else [Path(path).parent for path in args.config]
    for folder in folders:
        if (folder / CONFIG_NAME).is_file() or args.hf:
            return read_config(folder), f"shape of {folder / CONFIG_NAME}"
    raise ConfigError("no model to plan for: give --hf a folder with config.json, or put config.json beside the recipe")


def even_map(shape: ModelShape, ratio: str, linear: Sequence[str]) -> HeadMap:
    """As many FA heads in every layer as the ratio keeps, the busiest kv groups last; the others of a kind a layer."""
    num_fa = parse_ratio(ratio, shape.num_heads)
    size = shape.num_heads // shape.num_kv_groups
    by_group = sorted(range(shape.num_heads), key=lambda head: (head % size, head))
    step = max(1, shape.num_kv_groups // num_fa)
    first = by_group[: shape.num_kv_groups : step] + [
        head for head in by_group if head not in by_group[: shape.num_kv_groups : step]
    ]
    pairs = itertools.product(range(shape.num_layers), first[:num_fa])
    return HeadMap.from_fa(pairs, shape.num_layers, shape.num_heads, shape.num_kv_groups, linear, strategy="assumed")
