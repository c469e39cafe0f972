# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Read what a study found, and tell it as tables and CSV: means over seeds, intervals, differences to the base."""

from __future__ import annotations

import csv
import io
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from hydra_mcore.errors import InputError
from hydra_mcore.evaluation.report import NONE, RESULTS_NAME, table
from hydra_mcore.evaluation.scoring import Score
from hydra_mcore.figures import short
from hydra_mcore.files import read_json, write_text
from tools.studies.file import Study
from tools.studies.steps import TEACHER, shared_jobs, variant_jobs

PERPLEXITY, AGREEMENT = "perplexity", "agreement with the teacher"
# Two-sided 95% quantiles of Student's t for 1, 2, ... degrees of freedom; the normal one beyond.
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


@dataclass(frozen=True)
class Value:
    """One number of one seed; ``total`` prompts stand behind a share, none behind a perplexity."""

    value: float  # percent, or perplexity
    total: int | None = None

    @property
    def score(self) -> Score | None:
        return None if self.total is None else Score(self.value / 100 * self.total, self.total)


Column = tuple[str, int]  # measure, length
Seeds = dict[int, Value]


@dataclass(frozen=True)
class Found:
    """All numbers of a study's finished evaluations."""

    study: Study
    models: dict[str, dict[Column, Seeds]]  # in the order of rows

    @property
    def measures(self) -> dict[str, list[int]]:
        """Lengths by measure: task groups first, then text."""
        columns = dict.fromkeys(itertools.chain.from_iterable(self.models.values()))
        names = dict.fromkeys(sorted((name for name, _ in columns), key=(PERPLEXITY, AGREEMENT).__contains__))
        return {name: sorted(length for other, length in columns if other == name) for name in names}


def read(study: Study) -> Found:
    """The results of all seeds, at the lengths that this study asks for, since other studies may share the folder.

    Raises:
        InputError: there are none.
    """
    models: dict[str, dict[Column, Seeds]] = {}
    first = [job for job in (*shared_jobs(study), *variant_jobs(study)) if job.seed == study.seeds[0]]
    asked = set().union(*(job.section("evaluate")["lengths"] for job in first))
    for job in shared_jobs(study):
        path = job.evaluation / RESULTS_NAME
        if path.exists():
            for model, entry in read_json(path)["models"].items():
                for column, value in _values(model, entry):
                    if column[1] in asked:
                        models.setdefault(model, {}).setdefault(column, {})[job.seed] = value
    if not models:
        raise InputError(f"{study.out}: no model has been evaluated there; give tools/study.py run first")
    rows = [name for name in models if name.partition(" + ")[0] == TEACHER]
    rows += [variant.name for variant in study.variants if variant.name in models]
    return Found(study, {name: models[name] for name in rows})


def _values(model: str, entry: dict) -> Iterable[tuple[Column, Value]]:
    for score in entry["groups"]:
        yield (score["group"], score["length"]), Value(100 * score["accuracy"], score["total"])
    for text in entry["text"]:
        yield (PERPLEXITY, text["length"]), Value(text["perplexity"])
        agreement = text["agreement"]
        if agreement["share"] is not None and agreement["with"] != model:
            yield (AGREEMENT, text["length"]), Value(100 * agreement["share"])


def tables(found: Found) -> str:
    """Markdown: a table of values for each measure, and one of differences to the base."""
    base, parts = found.study.base, []
    for measure, lengths in found.measures.items():
        head = [measure, *map(short, lengths)]
        rows = {
            name: [columns.get((measure, length)) for length in lengths]
            for name, columns in found.models.items()
            if any((measure, length) in columns for length in lengths)
        }
        parts.append(table(head, ([name, *map(cell, row)] for name, row in rows.items())))
        if base in rows and len(rows) > 1:
            others = {name: row for name, row in rows.items() if name != base}
            lines = ([name, *map(difference, row, rows[base])] for name, row in others.items())
            parts.append(table([f"{measure}, difference to {base}", *map(short, lengths)], lines))
    return "\n\n".join(parts)


def cell(seeds: Seeds | None) -> str:
    """Mean (each seed); of one seed, the value (95% Wilson interval of a share)."""
    if not seeds:
        return NONE
    values = list(seeds.values())
    digits = 0 if values[0].total is not None else 1
    said = f"{mean(value.value for value in values):.{digits}f}"
    if len(values) > 1:
        return f"{said} ({', '.join(f'{value.value:.{digits}f}' for value in values)})"
    if (score := values[0].score) is None:
        return said
    low, high = score.interval
    return f"{said} ({100 * low:.0f}-{100 * high:.0f})"


def difference(seeds: Seeds | None, base: Seeds | None) -> str:
    """A cell for ``compared``."""
    if (found := compared(seeds, base)) is None:
        return NONE
    middle, interval = found
    digits = 0 if next(iter(seeds.values())).total is not None else 1
    said = f"{middle:+.{digits}f}"
    return said if interval is None else f"{said} ({interval[0]:+.{digits}f} to {interval[1]:+.{digits}f})"


def compared(seeds: Seeds | None, base: Seeds | None) -> tuple[float, tuple[float, float] | None] | None:
    """The difference of two means and its 95% interval, over seeds that both have, or over prompts with one seed; None
    without a seed that both have.
    """
    both = sorted((seeds or {}).keys() & (base or {}).keys())
    if not both:
        return None
    pairs = [(seeds[seed], base[seed]) for seed in both]
    apart = [one.value - other.value for one, other in pairs]
    return mean(apart), over_seeds(apart) if len(both) > 1 else over_prompts(*pairs[0])


def over_seeds(differences: Sequence[float]) -> tuple[float, float]:
    """Student's 95% interval of the mean: a seed is what would be drawn anew."""
    count = len(differences)
    quantile = T95[count - 2] if count - 2 < len(T95) else 1.96
    half = quantile * stdev(differences) / math.sqrt(count)
    return mean(differences) - half, mean(differences) + half


def over_prompts(one: Value, other: Value) -> tuple[float, float] | None:
    """95% interval of a difference of shares, in percent, from the Wilson interval of each (Newcombe 1998, method 10);
    None of perplexities.
    """
    if one.score is None or other.score is None:
        return None
    (low, high), (other_low, other_high) = one.score.interval, other.score.interval
    p, q = one.score.accuracy, other.score.accuracy
    below = math.hypot(p - low, other_high - q)
    above = math.hypot(high - p, q - other_low)
    return 100 * (p - q - below), 100 * (p - q + above)


def write_csv(path: Path, found: Found) -> None:
    """Every number: model, measure, length, seed, value, prompts."""
    sink = io.StringIO()
    rows = csv.writer(sink, lineterminator="\n")
    rows.writerow(["model", "measure", "length", "seed", "value", "prompts"])
    for model, columns in found.models.items():
        for (measure, length), seeds in columns.items():
            for seed, value in seeds.items():
                total = "" if value.total is None else value.total
                rows.writerow([model, measure, length, seed, f"{value.value:.6g}", total])
    write_text(path, sink.getvalue())
