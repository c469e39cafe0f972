# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Draw what a study found: curves against length, or differences to the base where there are too many curves."""

from __future__ import annotations

import itertools
from pathlib import Path
from statistics import mean

from matplotlib.figure import Figure

from hydra_mcore import figures
from hydra_mcore.figures import short
from tools.studies.table import PERPLEXITY, Found, compared

MOST_CURVES = 10  # more cannot be told apart


def write_figure(path: Path, found: Found) -> None:
    """Write the figure as a PNG."""
    figures.save(drawn(found), path)


def drawn(found: Found) -> Figure:
    """Curves, or differences to the base where there are many models and the base is one of them."""
    differences = len(found.models) > MOST_CURVES and found.study.base in found.models
    return _differences(found) if differences else _curves(found)


def _curves(found: Found) -> Figure:
    """A panel for each measure: means over seeds against length, a small mark for every seed."""
    measures = found.measures
    if any(len(lengths) > 1 for lengths in measures.values()):  # a single length is no curve
        measures = {name: lengths for name, lengths in measures.items() if len(lengths) > 1}
    figure = figures.empty(4.6 * len(measures), 4.4)
    for axes, (measure, lengths) in zip(
        figure.subplots(1, len(measures), squeeze=False)[0], measures.items(), strict=True
    ):
        for index, (name, columns) in enumerate(found.models.items()):
            own = [length for length in lengths if (measure, length) in columns]
            each = [[value.value for value in columns[measure, length].values()] for length in own]
            look, dashes = figures.style(index), "--" if "YaRN" in name else "-"
            axes.plot(own, list(map(mean, each)), label=name, linewidth=1.7, markersize=6, linestyle=dashes, **look)
            for length, values in zip(own, each, strict=True):
                if len(values) > 1:
                    axes.plot([length] * len(values), values, linestyle="", markersize=3, alpha=0.5, **look)
        axes.set(title=measure if measure == PERPLEXITY else f"{measure} (%)", xlabel="length (tokens)")
        if measure == PERPLEXITY:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:.0f}")
            axes.yaxis.set_minor_formatter("{x:.0f}")
        else:
            axes.set_ylim(-4, 104)
        figures.length_axis(axes, lengths)
        figures.plain(axes)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figures.legend_below(figure, dict(zip(labels, handles, strict=True)), min(4, len(labels)))
    return figure


def _differences(found: Found) -> Figure:
    """A panel for each measure: every variant's difference to the base, with its 95% interval, by length."""
    base, own = found.models[found.study.base], {variant.name for variant in found.study.variants}
    names = [name for name in found.models if name in own and name != found.study.base]
    lengths = sorted(set().union(*found.measures.values()))
    figure = figures.empty(2.2 + 3.1 * len(found.measures), 1.6 + 0.34 * len(names))
    panels = figure.subplots(1, len(found.measures), sharey=True, squeeze=False)[0]
    for axes, measure in zip(panels, found.measures, strict=True):
        for place, length in enumerate(lengths):
            shift, look = 0.22 * (place - (len(lengths) - 1) / 2), figures.style(place)
            for row, name in enumerate(names):
                known = compared(found.models[name].get((measure, length)), base.get((measure, length)))
                if known is not None:
                    middle, interval = known
                    label = {"label": f"{short(length)} tokens"}
                    axes.plot(interval or (middle, middle), [row + shift] * 2, linewidth=1.4, color=look["color"])
                    axes.plot(middle, row + shift, linestyle="", markersize=5, **label, **look)
        axes.axvline(0, color=figures.GREY, linewidth=0.8, zorder=0)
        axes.set(title=measure, xlabel="difference" if measure == PERPLEXITY else "difference in points")
        figures.plain(axes, grid="x")
    panels[0].set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()
    drawn_lengths = (zip(*reversed(axes.get_legend_handles_labels()), strict=True) for axes in panels)
    handles = dict(itertools.chain.from_iterable(drawn_lengths))
    figures.legend_below(figure, handles, len(lengths))
    figure.suptitle(f"difference to {found.study.base!r}, 95% intervals")
    return figure
