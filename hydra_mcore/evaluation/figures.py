# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The pictures of an evaluation: accuracy against length, loss against position.

Each function writes one PNG, atomically.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hydra_mcore.evaluation.results import Results, groups_of, lengths_of
from hydra_mcore.figures import empty, legend_below, length_axis, plain, save, short, style

PANELS_A_ROW = 3
NATIVE = "native length"
HIGHEST = 1.3  # times the loss without context, where the picture of losses ends


def accuracy_figure(path: Path, results: Sequence[Results]) -> None:
    """Accuracy against prompt length with 95% intervals: a panel for each task group, a line for each model."""
    groups, lengths = groups_of(results), lengths_of(results)
    columns = min(PANELS_A_ROW, len(groups))
    rows = math.ceil(len(groups) / columns)
    figure = _figure(5.0 * columns if columns > 1 else 7.0, 3.4 * rows, len(results))
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False).flatten()
    for axes, (group, tasks) in zip(panels, groups.items(), strict=False):
        for index, line in enumerate(results):
            scores = {length: score for length in lengths if (score := line.group(tasks, length)) is not None}
            # models stand a little beside each other at a length, so that their intervals can be read
            places = [length * (1.0 + 0.02 * (index - (len(results) - 1) / 2)) for length in scores]
            accuracies = [100 * score.accuracy for score in scores.values()]
            below = [100 * (score.accuracy - score.interval[0]) for score in scores.values()]
            above = [100 * (score.interval[1] - score.accuracy) for score in scores.values()]
            axes.errorbar(places, accuracies, yerr=(below, above), elinewidth=0.9, capsize=2.0, **_style(index, line))
        axes.set_title(f"{group} ({len(tasks)} task{'s' if len(tasks) > 1 else ''})", fontsize=10, loc="left")
        axes.set_ylim(-4, 104)
        axes.set_yticks(range(0, 101, 20))
        _length_axis(axes, lengths, results)
        axes.set_xlabel("prompt length (tokens)")
    for axes in panels[::columns]:
        axes.set_ylabel("accuracy (%)")
    for axes in panels[len(groups) :]:
        axes.set_visible(False)
    _finish(figure, path, "RULER: accuracy against prompt length", panels[0])


def loss_figure(path: Path, results: Sequence[Results]) -> None:
    """Loss against position in each model's longest windows, with a band of one standard error."""
    figure = _figure(8.4, 4.4, len(results))
    axes = figure.subplots()
    longest = max(itertools.chain.from_iterable(line.text for line in results))
    for index, line in enumerate(results):
        if not line.text:
            continue
        bins = line.text[max(line.text)].by_position
        ends, losses = [part.end for part in bins], [part.nll for part in bins]
        look = _style(index, line)
        axes.plot(ends, losses, **look)
        if all(part.error is not None for part in bins):
            low, high = ([part.nll + sign * part.error for part in bins] for sign in (-1, 1))
            axes.fill_between(ends, low, high, color=look["color"], alpha=0.15, linewidth=0)
    first_bins = [line.text[max(line.text)].by_position[0] for line in results if line.text]
    highest = max(part.nll for part in first_bins)
    axes.set_ylim(
        top=min(axes.get_ylim()[1], HIGHEST * highest)
    )  # a model lost beyond its native length would flatten the others
    shortest = min(part.end for part in first_bins)
    ticks = [shortest * 2**power for power in range(int(math.log2(longest / shortest)) + 1)]
    _length_axis(axes, ticks, results)
    axes.set_xlabel("tokens before the predicted one (upper edge of each bin)")
    axes.set_ylabel("loss (nats a token)")
    _finish(figure, path, "Held-out text: loss against position", axes)


def _style(index: int, line: Results) -> dict[str, Any]:
    """Models by colour and marker, YaRN by dashes."""
    return {
        **style(index),
        "label": line.name.replace("$", r"\$"),  # which would begin a formula
        "markersize": 5,
        "linewidth": 1.6,
        "linestyle": "-" if line.contestant.facts.yarn is None else (0, (5, 2)),
    }


def _length_axis(axes: Axes, lengths: Sequence[int], results: Sequence[Results]) -> None:
    """A log axis with these ticks and the native lengths."""
    low, high = lengths[0] / 1.3, lengths[-1] * 1.3
    length_axis(axes, lengths, fontsize=9 if len(lengths) < 9 else 7)
    axes.set_xlim(low, high)
    natives = sorted({line.contestant.facts.native_length for line in results})
    look = {"color": "#888888", "linestyle": (0, (2, 2)), "linewidth": 1.2, "zorder": 0}
    for native in natives:
        if low <= native <= high:
            axes.axvline(native, label=f"{NATIVE} ({short(native)})", **look)
    plain(axes)


def _figure(width: float, height: float, models: int) -> Figure:
    """An empty figure with room for a legend of the models below."""
    return empty(width, height + 0.6 + 0.24 * math.ceil((models + 1) / 3))


def _finish(figure: Figure, path: Path, title: str, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    each_once = dict(zip(labels, handles, strict=True))
    models_first = dict(sorted(each_once.items(), key=lambda item: item[0].startswith(NATIVE)))
    legend_below(figure, models_first, min(3, len(models_first)))
    figure.suptitle(title, fontsize=12, fontweight="bold", x=0.02, ha="left")
    save(figure, path)
