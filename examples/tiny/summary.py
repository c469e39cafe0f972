# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""What several runs (seeds) of one study scored, as tables and lines: the mean and each run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from hydra_mcore import figures
from hydra_mcore.evaluation.report import RESULTS_NAME, table
from hydra_mcore.figures import short
from hydra_mcore.files import read_json

Values = dict[str, dict[int, list[float]]]  # model -> length -> the value of each run


def read_accuracies(evaluations: Iterable[Path]) -> dict[str, Values]:
    """Percent by task group, from folders of finished evaluations."""
    found: dict[str, Values] = {}
    for model, entry in _models(evaluations):
        for score in entry["groups"]:
            by_length = found.setdefault(score["group"], {}).setdefault(model, {})
            by_length.setdefault(score["length"], []).append(100 * score["accuracy"])
    return found


def read_perplexities(evaluations: Iterable[Path]) -> Values:
    """Perplexity of held-out text, from folders of finished evaluations."""
    found: Values = {}
    for model, entry in _models(evaluations):
        for text in entry["text"]:
            found.setdefault(model, {}).setdefault(text["length"], []).append(text["perplexity"])
    return found


def _models(evaluations: Iterable[Path]) -> Iterator[tuple[str, dict[str, Any]]]:
    for evaluation in evaluations:
        yield from read_json(evaluation / RESULTS_NAME)["models"].items()


def means_table(name: str, values: Values, digits: int = 0) -> str:
    """Markdown: a row for each model, mean over runs (each run)."""
    lengths = sorted(next(iter(values.values())))
    rows = []
    for model, by_length in values.items():
        runs = (by_length[length] for length in lengths)
        rows.append([model, *(_mean_and_each(run, digits) for run in runs)])
    return table([name, *map(short, lengths)], rows)


def _mean_and_each(runs: list[float], digits: int) -> str:
    return f"{sum(runs) / len(runs):.{digits}f} ({', '.join(f'{each:.{digits}f}' for each in runs)})"


def accuracy_lines(axes: Axes, values: Values) -> None:
    """A line through each model's means over runs, a small mark for every run, in percent against length."""
    for index, (model, by_length) in enumerate(values.items()):
        lengths, style = sorted(by_length), figures.style(index)
        places = [length * (1 + 0.03 * (index - (len(values) - 1) / 2)) for length in lengths]
        means = [sum(by_length[length]) / len(by_length[length]) for length in lengths]
        dashes = "--" if "YaRN" in model else "-"
        axes.plot(places, means, label=model, linewidth=1.7, markersize=6, linestyle=dashes, **style)
        for place, length in zip(places, lengths, strict=True):
            axes.plot(
                [place] * len(by_length[length]), by_length[length], linestyle="", markersize=3, alpha=0.5, **style
            )
    axes.axvline(512, color="#888888", linestyle=":", linewidth=1.2, zorder=0, label="native length (512)")
    figures.length_axis(axes, lengths)
    axes.set_ylim(-4, 104)
    figures.plain(axes)
