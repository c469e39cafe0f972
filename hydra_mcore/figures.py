# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""What the pictures of all packages share: colours, empty figures, plain axes, axes of lengths, legends, saving."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hydra_mcore.files import replacing

# Told apart in grey and by colour-blind readers too, with their markers.
COLORS = ("#222222", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31")
MARKERS = "osD^vPX*"
GREY, LIGHT = "#8a8a8a", "#e6e6e6"


def empty(width: float, height: float, dpi: int = 150) -> Figure:
    """A figure of this size in inches without anything on it; needs no display."""
    figure = Figure(figsize=(width, height), dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: str | Path) -> None:
    """Write a PNG, whole or not at all."""
    with replacing(path) as beside:
        figure.savefig(beside, format="png")


def style(index: int) -> dict[str, Any]:
    """Colour and marker of line number ``index`` of a plot; pairs repeat after 64 lines."""
    return {
        "color": COLORS[index % len(COLORS)],
        "marker": MARKERS[(index + index // len(COLORS)) % len(MARKERS)],
    }


def plain(axes: Axes, grid: str = "y") -> Axes:
    """Two spines, and a light grid behind the lines."""
    axes.grid(axis=grid, color=LIGHT, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def training_curve(axes: Axes, steps: Sequence[int], values: Sequence[float], **look: Any) -> None:
    """A mean over about a twentieth of the steps around each, and the values themselves, pale, behind it."""
    half = len(values) // 40
    around = (values[max(0, at - half) : at + half + 1] for at in range(len(values)))
    (line,) = axes.plot(steps, [sum(near) / len(near) for near in around], linewidth=1.6, **look)
    axes.plot(steps, values, linewidth=0.8, alpha=0.3, color=line.get_color(), zorder=line.get_zorder() - 1)


def length_axis(axes: Axes, lengths: Sequence[int], fontsize: float | None = None) -> None:
    """A log axis of tokens with these ticks."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [short(length) for length in lengths], fontsize=fontsize)
    axes.set_xticks([], minor=True)


def short(length: int) -> str:
    """A length in few characters: 512, 4K, 128K, 1M."""
    for size, unit in ((2**20, "M"), (2**10, "K")):
        if length >= size and length % size == 0:
            return f"{length // size}{unit}"
    return str(length)


def legend_below(figure: Figure, handles: Mapping[str, Any], columns: int, fontsize: float = 9) -> None:
    """A legend of these lines, by their labels, under all panels."""
    look = {"ncols": columns, "frameon": False, "fontsize": fontsize}
    figure.legend(handles.values(), handles, loc="outside lower center", **look)
