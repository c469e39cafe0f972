# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""What a search for the base of the log-position scale found: sentences, tables, a figure, JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.ticker import ScalarFormatter

from hydra_mcore.evaluation.log_scale import Trials, name_of
from hydra_mcore.evaluation.report import table
from hydra_mcore.figures import COLORS, GREY, empty, save
from hydra_mcore.files import write_json, write_text

JSON_NAME, TABLE_NAME, FIGURE_NAME = "log_scale.json", "log_scale.md", "log_scale.png"


def write_report(
    out_dir: str | Path, trials: Trials, present: float | None, text: str, settings: dict[str, Any]
) -> None:
    """Write figure, markdown and JSON, each beside its target and then renamed; the JSON last: it marks a whole report.

    Args:
        present: the base that the model has now, None for no scale.
        text: ``markdown`` of the same trials.
        settings: how they were made, kept in the JSON.
    """
    root = Path(out_dir)
    figure(root / FIGURE_NAME, trials, present)
    said = f"# Log-position scale of {settings['checkpoint']}\n\n{text}\n![loss against a]({FIGURE_NAME})\n"
    write_text(root / TABLE_NAME, said)
    entries = []
    for base in trials.bases:
        gap, error = trials.difference(base, trials.best)
        entries.append(
            {
                "base": base,
                "loss": trials.loss(base),
                "difference": gap,
                "error": error,
                "by_position": trials.by_position(base),
            }
        )
    facts = {"present": present, "best": trials.best, "positions": trials.bins, "windows": len(trials.windows_bs)}
    write_json(root / JSON_NAME, settings | facts | {"trials": entries})


def markdown(trials: Trials, present: float | None, inside: bool) -> str:
    """The verdict, every trial, and the loss by position of those that matter."""
    best = trials.best
    rows = []
    for base in trials.bases:
        gap, error = trials.difference(base, best)
        mark = " (now)" if base == present else ""
        rows.append(
            [name_of(base) + mark, f"{trials.loss(base):.4f}", "best" if base == best else f"+{gap:.4f} +- {error:.4f}"]
        )
    shown = list(dict.fromkeys([None, present, best]))
    columns = [trials.by_position(base) for base in shown]
    positions = [
        [f"{start:,} to {end - 1:,}", *(f"{column[index]:.4f}" for column in columns)]
        for index, (start, end) in enumerate(trials.bins)
    ]
    return "\n".join([
        verdict(trials, present, inside),
        "",
        table(["scale", "nats a token", "more than the best, +- standard error"], rows),
        "",
        "Mean loss by position in the window:",
        "",
        table(["tokens", *map(name_of, shown)], positions),
        "",
    ])  # fmt: skip


def verdict(trials: Trials, present: float | None, inside: bool) -> str:
    """What was found, in sentences: the base, and what it gains over no scale and over what the model has now."""
    best = trials.best
    lines = [
        f"Least loss: {name_of(best)}, {trials.loss(best):.4f} nats a token over {len(trials.windows_bs)} windows."
    ]
    closest = min((base for base in trials.bases if base is not None), key=trials.loss)
    other, choice = (closest, "off") if best is None else (None, "on")
    sure, gain = _gain(trials, best, other)
    lines.append(
        f"The scale should be {choice}: {gain}." if sure else f"Whether the scale is on does not show: {gain}."
    )
    if best is not None and not inside:
        lines.append(
            "That base is a limit of the search, and the loss still falls there: no base to trust, look at the model"
            " first."
        )
    if best == present:
        lines.append("That is what the model has now.")
    elif {best, present} != {best, None}:
        lines.append(f"The model has {name_of(present)} now: {_gain(trials, best, present)[1]}.")
    return "\n".join(lines)


def _gain(trials: Trials, better: float | None, than: float | None) -> tuple[bool, str]:
    """Whether one setting is better than another beyond chance, and in words by how much."""
    gap, error = trials.difference(than, better)
    sure = gap > 2 * error
    judged = "more than twice its error" if sure else "less than twice its error, so it may be chance"
    return sure, f"{name_of(better)} loses {gap:.4f} +- {error:.4f} less than {name_of(than)}, {judged}"


def figure(path: Path, trials: Trials, present: float | None) -> None:
    """Loss against a on a log axis, with the error of each difference to the best, and the loss without a scale as a
    line.
    """
    bases = [base for base in trials.bases if base is not None]
    losses = [trials.loss(base) for base in bases]
    errors = [trials.difference(base, trials.best)[1] for base in bases]
    picture = empty(7, 4.2)
    axes = picture.add_subplot()
    look = {"color": COLORS[1], "marker": "o", "ms": 4, "lw": 1.2, "capsize": 2}
    axes.errorbar(bases, losses, yerr=errors, label="ln(t + a) / ln(a)", **look)
    axes.axhline(trials.loss(None), color=GREY, ls="--", lw=1.2, label="off")
    if present is not None:
        axes.axvline(present, color=GREY, ls=":", lw=1.2, label=f"now, {name_of(present)}")
    if trials.best is not None:
        look = {"color": COLORS[2], "ms": 13, "zorder": 3, "label": f"best, {name_of(trials.best)}"}
        axes.plot(trials.best, trials.loss(trials.best), "*", **look)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.set_xlabel("a (tokens)")
    axes.set_ylabel("loss (nats a token)")
    length = trials.windows_bs.shape[1]
    axes.set_title(
        f"{len(trials.windows_bs)} windows of {length:,} tokens; bars: standard error of the difference to the best",
        fontsize=9,
    )
    axes.legend(frameon=False, fontsize=9)
    save(picture, path)
