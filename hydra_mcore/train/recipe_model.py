# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The model that a recipe trains, from whatever is there of it already."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path

from hydra_mcore.config import CARD_NAME, ConfigError, HydraOptions, ModelCard, ModelShape, StageOptions
from hydra_mcore.convert.hf_config import CONFIG_NAME, read_config
from hydra_mcore.heads import HeadMap
from hydra_mcore.recipe import Recipe
from hydra_mcore.selection.choose import linear_words, parse_linear, parse_ratio


def model_card(
    config: Sequence[str],
    options: StageOptions,
    hf: Path | None = None,
    heads: Path | None = None,
    ratio: str | None = None,
) -> tuple[ModelCard, str]:
    """The student's card, and where its shape and its heads come from, for the reader.

    Args:
        config: the recipe's files.
        options: name the folders of student and teacher.
        hf: folder with the teacher's config.json, instead of what is there.
        heads: head map to take, instead of what is there.
        ratio: of linear heads to FA heads to assume, instead of the recipe's.

    Raises:
        InputError: no model can be found, or a head map that is for another one.
    """
    for folder in (options.start_from, options.run_dir and f"{options.run_dir}/student"):
        if folder and not (hf or heads or ratio) and (Path(folder) / CARD_NAME).is_file():
            return dataclasses.replace(ModelCard.load(folder), stage=options.stage), f"model of {folder}"
    teacher, source = _teacher(config, options, hf)
    hybridize = Recipe.load(config, "hybridize").values if config else {}
    if not (heads or ratio) and Path(str(hybridize.get("head-map"))).is_file():
        heads = Path(str(hybridize["head-map"]))
    if heads:
        head_map = HeadMap.load(heads)
        teacher.check_head_map(head_map)
        source += f", heads of {heads}"
    else:
        select = Recipe.load(config, "select").values if config else {}
        ratio, linear = ratio or select.get("ratio", "3:1"), select.get("linear") or []
        words = linear if isinstance(linear, list) else [linear]
        kinds = parse_linear(map(str, words), teacher.shape.num_layers)
        head_map = even_map(teacher.shape, str(ratio), kinds)
        source += (
            f"; heads not selected yet: assumed {ratio}, spread evenly, each FA head in a kv group of its own as far as"
            f" there are groups, the others {linear_words(kinds)}"
        )
    layer = {key.replace("-", "_"): value for key, value in hybridize.items()}
    choices = HydraOptions(
        **{field.name: layer[field.name] for field in dataclasses.fields(HydraOptions) if field.name in layer}
    )
    return dataclasses.replace(teacher, head_map=head_map, options=choices, stage=options.stage), source


def _teacher(config: Sequence[str], options: StageOptions, hf: Path | None) -> tuple[ModelCard, str]:
    """The teacher's card: of its folder, else of a config.json (its weights are then unknown)."""
    if options.teacher and not hf and (Path(options.teacher) / CARD_NAME).is_file():
        return ModelCard.load(options.teacher), f"shape of {options.teacher}"
    named = Recipe.load(config, "import").values.get("hf") if config else None
    beside = [Path(path).parent for path in config]
    for folder in [hf] if hf else [*([Path(str(named))] if named else []), *beside]:
        if hf or (folder / CONFIG_NAME).is_file():
            return read_config(folder), f"shape of {folder / CONFIG_NAME}"
    raise ConfigError(
        "no model is there: no student, no teacher, no config.json in the folder of the recipe's import section or"
        " beside the recipe; put config.json beside the recipe (tools/plan.py also takes --hf)"
    )


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
