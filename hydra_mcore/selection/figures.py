# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The pictures of a head selection. Each function writes one PNG, beside the target, then renames it."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colorbar import Colorbar
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle

from hydra_mcore.figures import GREY, LIGHT, empty, plain, save, short
from hydra_mcore.heads import HeadMap
from hydra_mcore.kinds import FA, KINDS
from hydra_mcore.selection.choose import STRATEGIES, linear_kinds
from hydra_mcore.selection.evidence import Evidence, KnockOut, LikenessSpread, Spread, role_effects
from hydra_mcore.selection.score import CRITICAL, HeadScores

MAP, FRAME, BLUE = "Blues", KINDS[FA].colour, "#2a6f9e"
SURE = 0.95  # chance of being kept from which a head counts as sure


def heat_map(path: str | Path, head_map: HeadMap, scores: HeadScores | None, model_name: str) -> None:
    """Scores, layers downward and heads across, the kept heads framed; without scores only the kept heads show,
    filled. Linear heads of a second or further kind carry a dot.
    """
    layers, heads = head_map.num_layers, head_map.num_heads
    mark, meaning = "filled" if scores is None else "framed", STRATEGIES.get(head_map.strategy, "made elsewhere")
    dotted = [kind for kind in linear_kinds() if head_map.heads_of(kind)][1:]
    title = f"{model_name}: {head_map.num_fa} of {layers * heads} heads keep full attention"
    cell_w, cell_h = min(0.38, 14 / heads), min(0.3, 12 / layers)
    size = max(6.5, 2.6 + cell_w * heads), max(2.8, 1.3 + cell_h * layers)
    figure = _figure(*size, title, f"{mark} = kept; {head_map.strategy}: {meaning}")
    axes = figure.add_subplot()
    image = _cells(axes, np.zeros((layers, heads)) if scores is None else scores.scores_lh)
    _dots(axes, dotted, head_map, 14)
    if dotted:
        figure.legend(loc="outside lower left", ncols=len(dotted), frameon=False, fontsize=9)
    for layer_idx, layer in enumerate(head_map.layers):
        for head_idx in layer[FA]:
            corner = (head_idx - 0.42, layer_idx - 0.42)
            axes.add_patch(
                Rectangle(corner, 0.84, 0.84, fill=scores is None, color=FRAME, lw=1.8 if cell_w > 0.25 else 1.1)
            )
        axes.text(
            heads - 0.35,
            layer_idx,
            f"{len(layer[FA])}",
            va="center",
            ha="left",
            fontsize=9 if cell_h > 0.2 else 7,
            color=FRAME,
        )
    axes.text(heads - 0.35, -0.62, "FA", va="bottom", ha="left", fontsize=9, color=FRAME, fontweight="bold")
    axes.set_xlabel("head")
    axes.set_ylabel("layer")
    if scores is not None:
        names = ", ".join(scores.by_capability)
        bar = _bar(figure, image, axes, pad=0.6 / size[0])
        bar.set_label(f"score of the head: {scores.score}\n({names})", fontsize=9, parse_math=False)
    save(figure, path)


def statistic_maps(path: str | Path, title: str, values: Mapping[str, np.ndarray], head_map: HeadMap) -> None:
    """A panel for each statistic of the heads, [layers, heads] with NaN where a head has none.

    Heads carry a dot in the colour of their kind, but those of the commonest kind.
    """
    layers, heads = head_map.num_layers, head_map.num_heads
    panel = max(2.6, 1.2 + min(0.13 * heads, 6)), max(1.9, 0.7 + min(0.1 * layers, 6))
    counts = {kind: len(head_map.heads_of(kind)) for kind in KINDS}
    dotted = [kind for kind, count in counts.items() if 0 < count < max(counts.values())] or [FA]
    meaning = ", ".join(KINDS[kind].title for kind in dotted)
    title_below = f"dot = {meaning}; grey = a head without such a value"
    figure = _figure(panel[0] * len(values), panel[1], title, title_below)
    for axes, (name, values_lh) in zip(figure.subplots(1, len(values), squeeze=False)[0], values.items(), strict=True):
        image = _cells(axes, np.ma.masked_invalid(values_lh), grid=False)
        axes.set_facecolor(LIGHT)
        _dots(axes, dotted, head_map, 6)
        axes.set_title(name, fontsize=9, loc="left", parse_math=False)
        axes.set_xlabel("head", fontsize=8)
        axes.set_ylabel("layer", fontsize=8)
        axes.tick_params(labelsize=7)
        _bar(figure, image, axes, pad=0.03)
    save(figure, path)


def _dots(axes: Axes, kinds: Iterable[str], head_map: HeadMap, size: int) -> None:
    for kind in kinds:
        heads = np.array(head_map.heads_of(kind)).reshape(-1, 2)
        axes.scatter(heads[:, 1], heads[:, 0], s=size, color=KINDS[kind].colour, lw=0, label=KINDS[kind].title)


def role_maps(path: str | Path, scores: HeadScores, critical_lh: np.ndarray) -> None:
    """The size of the effect as receiver and as sender, a panel for each role and capability, each with its own
    scale.
    """
    roles = role_effects(scores)
    names, (layers, heads) = list(scores.by_capability), scores.scores_lh.shape
    title = (
        f"{critical_lh.sum()} of {layers * heads} heads ({critical_lh.mean():.1%}) are critical: an effect of"
        f" {CRITICAL} or more"
    )
    panel = max(3.3, 1.4 + min(0.13 * heads, 6)), max(1.9, 0.7 + min(0.1 * layers, 6))
    figure = _figure(
        max(5.6, panel[0] * len(names)),
        panel[1] * len(roles),
        title,
        "share of the answer's logit difference that one head moves",
    )
    panels = figure.subplots(len(roles), len(names), squeeze=False)
    for row, (role, by_name) in zip(panels, roles.items(), strict=True):
        for axes, name in zip(row, names, strict=True):
            image = _cells(axes, by_name[name], grid=False, least=5 * CRITICAL)
            reached = int((by_name[name] >= CRITICAL).sum())
            axes.set_title(f"{name}, {role}: {reached} reach {CRITICAL}", fontsize=9, loc="left", parse_math=False)
            axes.set_xlabel("head", fontsize=8)
            axes.set_ylabel("layer", fontsize=8)
            axes.tick_params(labelsize=7)
            _bar(figure, image, axes, pad=0.03)
    save(figure, path)


def knock_out_curves(path: str | Path, knock_out: KnockOut) -> None:
    """Accuracy against the number of heads removed, a line for each order; the band of random is its least and largest
    draw.
    """
    place = np.arange(len(knock_out.heads))
    figure = _figure(
        7.2, 3.4, knock_out_finding(knock_out), f"exact match of the teacher on {knock_out.prompts} prompts"
    )
    axes = _plain(figure.add_subplot())
    styles = {"best first": (FRAME, "o"), "worst first": (BLUE, "s"), "random": (GREY, "D")}
    for order, draws in knock_out.accuracy.items():
        (color, marker), (mean, low, high) = styles.get(order, (GREY, "v")), 100 * knock_out.spread(order)
        label = order if len(draws) == 1 else f"{order} (mean and\nrange of {len(draws)} draws)"
        axes.plot(place, mean, color=color, marker=marker, markersize=4.5, lw=1.8, label=label)
        if len(draws) > 1:
            axes.fill_between(place, low, high, color=color, alpha=0.2, lw=0)
    shown = place[:: max(1, -(-len(place) // 12))]
    axes.set_xticks(shown, [f"{knock_out.heads[at]}\n{100 * knock_out.fractions[at]:.3g}%" for at in shown])
    axes.set_xlabel("heads removed (number, and share of all heads)")
    axes.set_ylabel("accuracy (%)")
    axes.set_ylim(-4, 104)
    axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    save(figure, path)


def knock_out_finding(knock_out: KnockOut) -> str:
    """One sentence: the number of heads at which removing by score differs most from removing at random."""
    if not {"best first", "random"} <= knock_out.accuracy.keys():
        return "Accuracy as heads are removed"
    best, random = knock_out.spread("best first")[0], knock_out.spread("random")[0]
    at = int(np.argmax(random - best))
    if random[at] <= best[at]:
        return "Removing the best heads first hurts no more than removing random heads"
    removed = "1 head" if knock_out.heads[at] == 1 else f"{knock_out.heads[at]} heads"
    return f"Accuracy with {removed} removed: {best[at]:.0%} best first, {random[at]:.0%} at random"


def stability(path: str | Path, evidence: Evidence) -> None:
    """Agreement of scorings by pairs a probe and, where there are several, by prompt length: Spearman and overlap of
    the best.
    """
    title = "One usable pair a probe: how stable the ranking is cannot be told"
    if evidence.halves:
        count, last = list(evidence.halves.items())[-1]
        title = (
            f"Overlap of the {evidence.budget} best heads from two disjoint sets of {count} pairs a probe:"
            f" {last.overlap.mean:.2f}"
        )
        title += f" (chance: {evidence.random_overlap:.2f})"
    rows = 1 + bool(evidence.by_length)
    figure = _figure(8.6, 3.0 * rows, title, "1 = same order; bands hold nine tenths of the draws")
    panels = figure.subplots(rows, 2, squeeze=False, sharey="col")
    labels = ("rank correlation of all heads (Spearman)", f"overlap of the {evidence.budget} best heads (Jaccard)")
    for column, (name, label) in enumerate(zip(("spearman", "overlap"), labels, strict=True)):
        chance: Spread = getattr(evidence.control, name)
        for axes in panels[:, column]:
            _plain(axes).axhline(
                chance.high, color=GREY, lw=1.2, linestyle=(0, (4, 3)), label="shuffled heads, 95th percentile"
            )
            axes.set_ylim(min(-0.04, chance.low), 1.04)
        panels[0, column].set_title(label, fontsize=10, loc="left")
        counts = sorted({*evidence.by_pairs, *evidence.halves})
        _band(panels[0, column], counts, evidence.by_pairs, name, BLUE, "o", "a part against all pairs")
        if evidence.halves:
            _band(panels[0, column], counts, evidence.halves, name, FRAME, "s", "two disjoint parts")
        panels[0, column].set_xticks(range(len(counts)), counts)
        panels[0, column].set_xlabel("pairs a probe")
        if evidence.by_length:
            lengths = list(evidence.by_length)
            values = [getattr(evidence.by_length[length], name) for length in lengths]
            axes, place = panels[1, column], range(len(lengths))
            axes.plot(
                place, values, color=BLUE, marker="o", markersize=4.5, lw=1.8, label="that length against the chosen"
            )
            axes.set_xticks(place, [short(length) for length in lengths])
            axes.margins(x=0.15)
            axes.set_xlabel("prompt length (tokens)")
    for row in panels:
        row[1].legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    save(figure, path)


def _band(
    axes: Axes,
    counts: list[int],
    by_count: Mapping[int, LikenessSpread],
    name: str,
    color: str,
    marker: str,
    label: str,
) -> None:
    place = [counts.index(count) for count in by_count]
    spreads = [getattr(agreement, name) for agreement in by_count.values()]
    axes.plot(
        place, [spread.mean for spread in spreads], color=color, marker=marker, markersize=4.5, lw=1.8, label=label
    )
    axes.fill_between(
        place, [spread.low for spread in spreads], [spread.high for spread in spreads], color=color, alpha=0.2, lw=0
    )


def intervals(path: str | Path, scores: HeadScores, evidence: Evidence) -> None:
    """The best 2 K heads in order: 90% interval of the score, and the chance of being among the best K; the cut stands
    at K.
    """
    budget, order = evidence.budget, scores.ranking()[: max(2 * evidence.budget, 8)]
    boot, index = evidence.bootstrap, tuple(np.array(order).T)
    value, low, high, chance = (
        table_lh[index] for table_lh in (scores.scores_lh, boot.low_lh, boot.high_lh, boot.chosen_lh)
    )
    sure, near = sure_heads(scores, evidence)
    title = f"{sure} of the {budget} best heads are sure; {near} below the cut could have been among them"
    if not evidence.halves:
        title = "One usable pair a probe: how certain a head is cannot be told"
    meaning = f"sure = among the {budget} best in {SURE:.0%} of the draws, could = in more than {1 - SURE:.0%}"
    subtitle = f"pairs drawn anew with replacement; {meaning}"
    place, width = np.arange(1, len(order) + 1), min(10.5, max(7.5, 1.5 + 0.2 * len(order)))
    figure = _figure(width, 4.2, title, subtitle)
    top, bottom = (_plain(axes) for axes in figure.subplots(2, 1, sharex=True, height_ratios=(3, 1.3)))
    color = np.where(place <= budget, BLUE, GREY)
    gap = 72 * (width - 1.2) / len(order)  # points from head to head
    top.vlines(place, low, high, color=color, lw=min(5.0, max(0.8, 0.5 * gap)), alpha=0.45)
    top.scatter(place, value, s=min(22.0, max(2.0, 2.8 * gap)), c=color, zorder=3, lw=0)
    bottom.bar(place, 100 * chance, width=0.8 if len(order) < 100 else 1.0, color=color, lw=0)
    for axes in (top, bottom):
        axes.axvline(budget + 0.5, color=FRAME, lw=1.4)
    top.text(
        budget + 0.5,
        1.0,
        f" cut: {budget} heads",
        color=FRAME,
        fontsize=9,
        va="top",
        transform=top.get_xaxis_transform(),
    )
    top.set_ylabel("score, 90% interval")
    top.set_ylim(np.array([-0.03, 1.06]) * max(high.max(), value.max(), 0.01))
    bottom.set_ylabel(f"among the\n{budget} best (%)")
    bottom.set_ylim(0, 104)
    bottom.set_yticks((0, 50, 100))
    margin = max(0.8, 0.01 * len(order))
    bottom.set_xlim(1 - margin, len(order) + margin)
    if len(order) <= 64:
        bottom.set_xticks(place, [f"{layer}.{head}" for layer, head in order], rotation=90, fontsize=7)
        bottom.set_xlabel("layer.head, best first")
    else:
        bottom.set_xlabel("rank of the head, best first")
    save(figure, path)


def sure_heads(scores: HeadScores, evidence: Evidence) -> tuple[int, int]:
    """How many of the best K heads are nearly always among them, and how many others are so now and then."""
    best_lh = np.zeros(scores.scores_lh.shape, dtype=bool)
    for at in scores.ranking()[: evidence.budget]:
        best_lh[at] = True
    chosen_lh = evidence.bootstrap.chosen_lh
    return int((best_lh & (chosen_lh >= SURE)).sum()), int((~best_lh & (chosen_lh > 1 - SURE)).sum())


def layers(path: str | Path, evidence: Evidence) -> None:
    """Layer by layer: how unevenly the score lies within it (Gini), and its share of the whole score."""
    count = len(evidence.gini_l)
    half = half_of(evidence.share_l)
    title = f"Mean Gini within layers {evidence.gini_l.mean():.2f}; {half} of {count} layers hold half of the score"
    height = max(2.4, 0.9 + min(0.16 * count, 7))
    figure = _figure(7.6, height, title, "Gini: 0 = all heads of the layer alike, near 1 = one head has it all")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, values, label in (
        (left, evidence.gini_l, "Gini coefficient within the layer"),
        (right, 100 * evidence.share_l, "share of the whole score (%)"),
    ):
        _plain(axes, grid="x").barh(range(count), values, color=BLUE, height=0.72)
        axes.set_xlabel(label)
    left.set_xlim(0, 1)
    left.set_ylim(count - 0.4, -0.6)
    left.set_yticks(_ticks(count))
    left.set_ylabel("layer")
    save(figure, path)


def half_of(share: np.ndarray) -> int:
    """How many of the largest shares make up half of the whole."""
    return int(np.searchsorted(np.sort(share)[::-1].cumsum(), 0.5 * share.sum()) + 1) if share.any() else 0


def budgets(path: str | Path, evidence: Evidence) -> None:
    """Score kept, KV cache left and FA heads, by the ratio of linear to FA heads."""
    costs, total = evidence.costs, evidence.critical_lh.size
    near = min(costs, key=lambda cost: abs(cost.num_fa - evidence.budget))
    title = (
        f"At {near.ratio} the best heads hold {near.kept:.0%} of the score and need {near.kv_fraction:.0%} of the KV"
        " cache"
    )
    figure = _figure(7.2, 3.2, title, "the best heads of the whole model at each ratio (strategy global)")
    axes, place = _plain(figure.add_subplot()), range(len(costs))
    lines = (
        ("score kept", [cost.kept for cost in costs], BLUE, "o"),
        ("KV cache left", [cost.kv_fraction for cost in costs], FRAME, "s"),
        ("heads kept", [cost.num_fa / total for cost in costs], GREY, "D"),
    )
    for label, values, color, marker in lines:
        axes.plot(
            place, [100 * value for value in values], color=color, marker=marker, markersize=5, lw=1.8, label=label
        )
    axes.set_xticks(place, [f"{cost.ratio}\n{cost.num_fa}" for cost in costs])
    axes.set_xlabel("linear heads to FA heads, and number of FA heads")
    axes.set_ylabel("share of the teacher's (%)")
    axes.set_ylim(0, 104)
    axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    save(figure, path)


def _figure(width: float, height: float, title: str, subtitle: str) -> Figure:
    """An empty figure of this size in inches, title and subtitle on top of it, wrapped to the width."""
    heading, below = _wrap(title, int(9.2 * width)), _wrap(subtitle, int(14.5 * width))
    top = 0.2 + 0.22 * len(heading) + 0.17 * len(below)
    figure = empty(width, height + top)
    inch = 1 / (height + top)
    figure.get_layout_engine().set(rect=(0, 0, 1, 1 - top * inch))
    # Names of models may hold a dollar sign: no formulas in titles.
    figure.text(
        0.1 / width, 1 - 0.08 * inch, "\n".join(heading), va="top", fontsize=12, fontweight="bold", parse_math=False
    )
    at = 1 - (0.12 + 0.22 * len(heading)) * inch
    figure.text(0.1 / width, at, "\n".join(below), va="top", fontsize=9, color="#444444", parse_math=False)
    return figure


def _wrap(text: str, width: int) -> list[str]:
    """Lines of at most ``width`` letters, of about the same length."""
    lines = textwrap.wrap(text, width)
    even = textwrap.wrap(text, min(width, len(text) // max(1, len(lines)) + 8))
    return even if len(even) == len(lines) else lines


def _cells(axes: Axes, values_lh: np.ndarray, grid: bool = True, least: float = 0.0) -> AxesImage:
    """A table of numbers as coloured cells, layers downward; the darkest colour is the largest number, or ``least``."""
    layers, heads = values_lh.shape
    image = axes.imshow(
        values_lh, cmap=MAP, vmin=0.0, vmax=max(values_lh.max(), least) or 1.0, aspect="auto", interpolation="nearest"
    )
    axes.set_xticks(_ticks(heads))
    axes.set_yticks(_ticks(layers))
    axes.tick_params(length=0, labelsize=9)
    if grid:
        axes.set_xticks(np.arange(heads + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(layers + 1) - 0.5, minor=True)
        axes.grid(which="minor", color="#d0d0d0", lw=0.6)
        axes.tick_params(which="minor", length=0)
    axes.spines[:].set_visible(not grid)
    axes.spines[:].set_color("#d0d0d0")
    return image


def _bar(figure: Figure, image: AxesImage, axes: Axes, pad: float) -> Colorbar:
    bar = figure.colorbar(
        image, ax=axes, pad=pad, fraction=0.05, aspect=18, shrink=min(1.0, 4 / figure.get_figheight())
    )
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)
    return bar


def _ticks(count: int) -> range:
    return range(0, count, 1 if count <= 32 else 4)


def _plain(axes: Axes, grid: str = "y") -> Axes:
    plain(axes, grid).tick_params(labelsize=9)
    return axes
