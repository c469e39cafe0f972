# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Draw the figure of a benchmark's report: time and memory against length."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from hydra_mcore import figures
from tools.benchmarks.measure import Point
from tools.benchmarks.report import Report

DASHES = (0, (5, 3))


def save_figure(path: Path, report: Report) -> None:
    """Write a PNG: for every table with points time against length, and memory beside it where it was measured."""
    tables = [table for table in report.tables if table.points]
    points = itertools.chain.from_iterable(table.points for table in tables)
    names = dict.fromkeys(point.name for point in points)
    styles = {name: figures.style(index) for index, name in enumerate(names)}
    lines = math.ceil((len(names) + 1) / 4)
    figure = figures.empty(11, 4.0 * len(tables) + 0.4 + 0.24 * lines, dpi=110)
    panels = figure.subplots(len(tables), 2, squeeze=False)
    for table, (time_axes, memory_axes) in zip(tables, panels, strict=True):
        _time_panel(time_axes, table, styles)
        if any(point.peak_bytes for point in table.points):
            _memory_panel(memory_axes, table, styles)
        else:
            memory_axes.remove()
    entries: dict[str, Any] = {}
    for axes in panels[:, 0]:
        handles, labels = axes.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    ordered = {name: entries[name] for name in names if name in entries}
    if any(table.limits for table in tables):
        ordered["limit"] = Line2D([], [], color="#888888", ls=DASHES, lw=1.2)
    figures.legend_below(figure, ordered, 4)
    figures.save(figure, path)


def _time_panel(axes: Axes, table: Report, styles: Mapping[str, dict[str, Any]]) -> None:
    for name, style in styles.items():
        own = [point for point in table.points if point.name == name]
        if own:
            below, above = [p.median - min(p.seconds) for p in own], [max(p.seconds) - p.median for p in own]
            lengths, medians = [p.length for p in own], [p.median for p in own]
            axes.errorbar(
                lengths, medians, (below, above), label=name, markersize=5, lw=1.6, elinewidth=1.0, capsize=2.5, **style
            )
    for name, seconds in table.limits.items():
        axes.plot(list(seconds), list(seconds.values()), color=styles[name]["color"], ls=DASHES, lw=1.2)
    _axes(axes, table.points, f"{table.title}: seconds (median, range)")


def _memory_panel(axes: Axes, table: Report, styles: Mapping[str, dict[str, Any]]) -> None:
    for index, (name, style) in enumerate(styles.items()):
        own = [point for point in table.points if point.name == name and point.peak_bytes]
        # Lines may lie on each other: open markers, each smaller than the last.
        size = max(4, 10 - 1.5 * index)
        axes.plot(
            [p.length for p in own], [p.peak_bytes / 2**20 for p in own], mfc="none", markersize=size, lw=1.2, **style
        )
    _axes(axes, table.points, f"{table.memory}, MiB")


def _axes(axes: Axes, points: Sequence[Point], title: str) -> None:
    figures.length_axis(axes, sorted({point.length for point in points}))
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    figures.plain(axes)
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel("tokens")
