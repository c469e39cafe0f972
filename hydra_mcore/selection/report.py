# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""A picture of a head map: scores as a heat map, the kept heads framed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from hydra_mcore.heads import HeadMap
from hydra_mcore.selection.choose import STRATEGIES
from hydra_mcore.selection.score import HeadScores

FRAME = "#d1495b"


def heat_map(path: str | Path, head_map: HeadMap, scores: HeadScores | None, model_name: str) -> None:
    """Write a PNG, layers downward and heads across; without scores (random and fixed maps) only the kept heads show.

    The picture is written beside the target, then renamed.
    """
    layers, heads = head_map.num_layers, head_map.num_heads
    values_lh = np.zeros((layers, heads)) if scores is None else np.array(scores.scores)
    figure = Figure(figsize=(max(6.5, 2.6 + 0.38 * heads), max(3.4, 1.9 + 0.3 * layers)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    image = axes.imshow(values_lh, cmap="Blues", vmin=0.0, vmax=max(values_lh.max(), 1e-9), aspect="auto")
    for layer_idx, layer in enumerate(head_map.layers):
        for head_idx in layer.fa:
            axes.add_patch(Rectangle((head_idx - 0.42, layer_idx - 0.42), 0.84, 0.84, fill=scores is None, color=FRAME, lw=1.8))
        axes.text(heads - 0.35, layer_idx, f"{len(layer.fa)}", va="center", ha="left", fontsize=9, color=FRAME)
    axes.text(heads - 0.35, -0.62, "FA", va="bottom", ha="left", fontsize=9, color=FRAME, fontweight="bold")
    axes.set_xticks(range(heads))
    axes.set_yticks(range(layers))
    axes.tick_params(length=0, labelsize=9)
    axes.set_xticks(np.arange(heads + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(layers + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="#d0d0d0", lw=0.6)
    axes.tick_params(which="minor", length=0)
    axes.set_xlabel("head")
    axes.set_ylabel("layer")
    axes.spines[:].set_visible(False)
    mark, meaning = "filled" if scores is None else "framed", STRATEGIES.get(head_map.strategy, "made elsewhere")
    subtitle = f"{mark} = kept; {head_map.strategy}: {meaning}"
    inch = 1 / figure.get_figheight()
    figure.get_layout_engine().set(rect=(0, 0, 1, 1 - 0.55 * inch))
    title = f"{model_name}: {head_map.num_fa} of {layers * heads} heads keep full attention"
    figure.text(0.02, 1 - 0.1 * inch, title, va="top", fontsize=12, fontweight="bold")
    figure.text(0.02, 1 - 0.35 * inch, subtitle, va="top", fontsize=9)
    if scores is not None:
        bar = figure.colorbar(image, ax=axes, pad=0.09, fraction=0.05)
        bar.set_label("receiver score (share of the answer's\nlogit difference carried by the head)", fontsize=9)
        bar.ax.tick_params(labelsize=8)
        bar.outline.set_visible(False)
    beside = Path(path).with_name(Path(path).name + ".partial")
    figure.savefig(beside, format="png")
    beside.replace(path)
