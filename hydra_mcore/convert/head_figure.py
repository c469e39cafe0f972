# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The picture of a head map in the model card of an export."""

from __future__ import annotations

from pathlib import Path

from matplotlib.colors import to_rgb
from matplotlib.patches import Patch

from hydra_mcore.figures import empty, save
from hydra_mcore.heads import HeadMap
from hydra_mcore.kinds import KINDS


def head_figure(path: str | Path, head_map: HeadMap) -> None:
    """Write a PNG of layers downward and heads across, each head in the colour of its kind."""
    layers, heads = head_map.num_layers, head_map.num_heads
    counts = {kind: len(head_map.heads_of(kind)) for kind in KINDS}
    colours_lhc = [[(1.0, 1.0, 1.0)] * heads for _ in range(layers)]
    for kind in KINDS:
        for layer_idx, head_idx in head_map.heads_of(kind):
            colours_lhc[layer_idx][head_idx] = to_rgb(KINDS[kind].colour)
    figure = empty(max(4.5, 1.2 + min(0.22 * heads, 9)), max(2.0, 1.2 + min(0.18 * layers, 9)))
    axes = figure.add_subplot()
    axes.imshow(colours_lhc, aspect="auto", interpolation="nearest")
    axes.set_xticks([head_idx - 0.5 for head_idx in range(1, heads)], minor=True)
    axes.set_yticks([layer_idx - 0.5 for layer_idx in range(1, layers)], minor=True)
    axes.grid(which="minor", color="white", linewidth=0.8)
    axes.tick_params(which="both", length=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("head")
    axes.set_ylabel("layer")
    used = {kind: count for kind, count in counts.items() if count}
    shown = [Patch(color=KINDS[kind].colour, label=f"{KINDS[kind].title}: {count}") for kind, count in used.items()]
    figure.legend(handles=shown, loc="outside upper center", ncols=2, frameon=False, fontsize=9)
    save(figure, path)
