# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The file of a study: recipes, and what each variant lays over them."""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra_mcore.config import ConfigError
from hydra_mcore.files import is_name, shown
from hydra_mcore.recipe import COMMAND_SECTIONS, STAGE_SECTIONS, read_yaml, with_dashes
from hydra_mcore.stages import STAGES

KEYS = ("recipes", "out", "setup", "stages", "seeds", "base", "over", "variants", "axes")
SECTIONS = STAGE_SECTIONS + COMMAND_SECTIONS
Overlay = Mapping[str, Any]  # top-level keys of a recipe, and its sections


@dataclass(frozen=True)
class Variant:
    """One variant of a study: a row of its table."""

    name: str
    over: Overlay = field(default_factory=dict)

    @property
    def slug(self) -> str:
        """The name as it is used for a folder."""
        return re.sub(r"[^A-Za-z0-9.]+", "-", self.name.replace(":", "to")).strip("-").lower()


@dataclass(frozen=True)
class Study:
    """What is compared, on which seeds, and where it is kept."""

    path: Path
    recipes: tuple[Path, ...]
    out: Path
    setup: tuple[str, ...]  # Python's arguments of what comes before the recipes' own commands
    stages: tuple[str, ...]
    seeds: tuple[int, ...]
    base: str  # the variant that the others are compared with
    over: Overlay
    variants: tuple[Variant, ...]

    @classmethod
    def load(cls, path: Path) -> Study:
        """Read a study's file; raises ConfigError for one that cannot be used."""
        raw = read_yaml(path, "study")
        try:
            return cls._of(path, raw)
        except ConfigError as error:
            raise ConfigError(f"study {path}: {error}") from None

    @classmethod
    def _of(cls, path: Path, raw: dict[str, Any]) -> Study:
        for key in raw:
            if key not in KEYS:
                near = difflib.get_close_matches(key, KEYS, n=1)
                raise ConfigError(f"unknown key {shown(key)}" + (f"; did you mean {near[0]!r}?" if near else ""))
        variants = _variants(raw)
        recipes = tuple(path.parent / name for name in _texts(raw, "recipes"))
        if not recipes:
            raise ConfigError("'recipes' names no file")
        stages = tuple(_texts(raw, "stages")) or tuple(STAGES)
        if unknown := [stage for stage in stages if stage not in STAGES]:
            raise ConfigError(f"no stage is called {shown(unknown[0])}; the stages are {', '.join(STAGES)}")
        base = raw.get("base", variants[0].name)
        if base not in [variant.name for variant in variants]:
            raise ConfigError(f"base {shown(base)} is none of the variants, {', '.join(v.name for v in variants)}")
        over, out = _overlay(raw.get("over"), "over"), raw.get("out")
        if not isinstance(out, str):
            raise ConfigError("'out' is the folder of the study, a text")
        setup = tuple(_texts(raw, "setup"))
        return cls(path, recipes, Path(out), setup, stages, _seeds(raw), base, over, variants)


def _seeds(raw: dict[str, Any]) -> tuple[int, ...]:
    seeds = raw.get("seeds", [0])
    if not isinstance(seeds, list) or not seeds or any(type(seed) is not int or seed < 0 for seed in seeds):
        raise ConfigError("'seeds' is a list of whole numbers from 0 on")
    if len(set(seeds)) < len(seeds):
        raise ConfigError("'seeds' names one twice")
    return tuple(seeds)


def _texts(raw: dict[str, Any], key: str) -> list[str]:
    found = raw.get(key, [])
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise ConfigError(f"{key!r} is a list of texts")
    return found


def _variants(raw: dict[str, Any]) -> tuple[Variant, ...]:
    """The variants of a study: those that it names, or every combination of its axes' values."""
    named, axes = raw.get("variants"), raw.get("axes")
    if (named is None) == (axes is None):
        raise ConfigError("give 'variants' or 'axes', one of them")
    if named is not None:
        found = [Variant(name, over) for name, over in _values("variants", named)]
    else:
        if not isinstance(axes, dict) or not axes:
            raise ConfigError("'axes' holds axes, by name, with their values")
        grid = itertools.product(*(_values(str(axis), values) for axis, values in axes.items()))
        found = [Variant(", ".join(name for name, _ in each), laid_over(*(over for _, over in each))) for each in grid]
    slugs = [variant.slug for variant in found]
    for variant in found:
        if not is_name(variant.name) or not variant.slug or slugs.count(variant.slug) > 1:
            raise ConfigError(f"variant {shown(variant.name)}: its name is no folder of its own; choose another")
    return tuple(found)


def _values(axis: str, values: Any) -> list[tuple[str, Overlay]]:
    """Names and overlays: a mapping says both; the values of a list belong to the flag that the axis is called by."""
    if isinstance(values, list) and values:
        section, _, flag = axis.rpartition(".")
        if section not in ("", *SECTIONS):
            raise ConfigError(f"axis {shown(axis)}: no section is called {shown(section)}; write SECTION.FLAG")
        flags = ({flag.replace("_", "-"): value} for value in values)
        return [
            (f"{flag} {value}", {section: flag_value} if section else flag_value)
            for value, flag_value in zip(values, flags, strict=True)
        ]
    if isinstance(values, dict) and values:
        return [(str(name), _overlay(over, f"variant {shown(str(name))}")) for name, over in values.items()]
    raise ConfigError(f"{shown(axis)} holds no values: write a list, or names with what each lays over the recipes")


def _overlay(raw: Any, where: str) -> dict[str, Any]:
    """Keys and sections with dashes."""
    over = with_dashes({} if raw is None else raw)
    if not isinstance(over, dict):
        raise ConfigError(f"{where}: expected lines of a recipe")
    for key, value in over.items():
        if (key in SECTIONS) != isinstance(value, dict):
            what = "expected 'key: value' lines under it" if key in SECTIONS else "no section is called so"
            raise ConfigError(f"{where}: {key!r}: {what}")
        over[key] = with_dashes(value)
    return over


def laid_over(*overlays: Overlay) -> dict[str, Any]:
    """Overlays in one, a later one winning key by key, as recipes do."""
    merged: dict[str, Any] = {}
    for over in overlays:
        for key, value in over.items():
            merged[key] = {**merged.get(key, {}), **value} if key in SECTIONS else value
    return merged
