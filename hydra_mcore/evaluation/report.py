# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Results of several models side by side: JSON for machines, a markdown table and a figure for people."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hydra_mcore.evaluation.evaluate import Results
from hydra_mcore.evaluation.scoring import TASK_GROUPS, Score
from hydra_mcore.heads import InputError, write_json
from hydra_mcore.selection.needles import TASKS

RESULTS_FORMAT = 1
RESULTS_NAME, TABLE_NAME, FIGURE_NAME = "results.json", "report.md", "accuracy.png"
COLORS = ("#222222", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31")
MARKERS = "osD^vPX*"


def check_out_dir(out_dir: str | Path) -> None:
    """Raise InputError when a report cannot or must not be written here, before anything has been done."""
    root = Path(out_dir)
    if (root / RESULTS_NAME).exists():
        raise InputError(f"{root}: already holds {RESULTS_NAME}; choose another folder or remove it")
    above = next(path for path in (root, *root.absolute().parents) if path.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise InputError(f"{root}: cannot be written, {above} is not a writable folder")


def write_report(out_dir: str | Path, models: dict[str, Results], settings: dict[str, Any]) -> None:
    """Write figure, table and JSON, each beside its target and then renamed; the JSON last: it marks a whole report.

    Args:
        models: results by name, in the order of rows.
        settings: how the exam was made, kept in the JSON.

    Raises:
        ValueError: no models, or they did not take the same exam.
    """
    if len({results.exam for results in models.values()}) != 1:
        raise ValueError("a report needs models that took one and the same exam")
    root = Path(out_dir)
    root.mkdir(parents=True, exist_ok=True)
    accuracy_figure(root / FIGURE_NAME, models)
    beside = root / (TABLE_NAME + ".partial")
    beside.write_text(markdown(models), encoding="utf-8")
    beside.replace(root / TABLE_NAME)
    entries = {name: results_json(results) for name, results in models.items()}
    write_json(root / RESULTS_NAME, {"format": RESULTS_FORMAT, "settings": settings, "models": entries})


def results_json(results: Results) -> dict[str, Any]:
    """One model's results as JSON values; accuracies are shares, losses in nats a token."""
    facts = ("fingerprint", "stage", "strategy", "num_fa", "num_heads", "native_length", "exam", "seed")
    groups = {(name, length): results.group(name, length) for length in results.lengths for name in TASK_GROUPS}
    return {
        **{name: getattr(results, name) for name in facts},
        "tasks": [{"task": key[0], "length": key[1], **_score_json(score)} for key, score in results.needles.items()],
        "groups": [{"group": key[0], "length": key[1], **_score_json(score)} for key, score in groups.items()],
        "text": [
            {"length": text.length, "tokens": text.tokens, "nll": text.nll, "perplexity": text.perplexity} for text in results.text.values()
        ],
    }


def _score_json(score: Score) -> dict[str, Any]:
    facts = {"correct": score.correct, "total": score.total, "accuracy": score.accuracy}
    return {**facts, "interval": list(score.interval)}


def markdown(models: dict[str, Results]) -> str:
    """The tables: task groups and perplexity by length, then every task by itself."""
    some = next(iter(models.values()))
    lengths, prompts = sorted(some.lengths), next(iter(some.needles.values())).total
    columns = [(name, length) for length in lengths for name in TASK_GROUPS]
    titles = [f"{name} @{length}" for name, length in columns] + [f"perplexity @{length}" for length in lengths]
    summary = _table(
        ["model", "FA heads", *titles],
        (
            [name, f"{results.num_fa} of {results.num_heads}"]
            + [_percent(results.group(*column)) for column in columns]
            + [f"{results.text[length].perplexity:.2f}" for length in lengths]
            for name, results in models.items()
        ),
    )
    tasks = [(task, length) for length in lengths for task in TASKS]
    details = _table(
        ["task", "tokens", *models],
        ([key[0], str(key[1]), *(_percent(results.needles[key]) for results in models.values())] for key in tasks),
    )
    return (
        f"# Evaluation\n\n{summary}\n"
        f"Exact match in percent on needle prompts, {prompts} a task and length, with 95% binomial (Wilson) intervals; "
        f"columns are task groups at a length in tokens. Native length: {_native_lengths(models)} tokens. All models "
        f"answered the same prompts (seed {some.seed}, sha256 {some.exam[:12]}).\n\n"
        f"![accuracy against length]({FIGURE_NAME})\n\n## Every task\n\n{details}"
    )


def _table(header: list[str], rows: Iterable[list[str]]) -> str:
    lines = [header, [":--"] + ["--:"] * (len(header) - 1), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |\n" for line in lines)


def _percent(score: Score) -> str:
    low, high = score.interval
    return f"{100 * score.accuracy:.1f} ({100 * low:.1f}-{100 * high:.1f})"


def _native_lengths(models: dict[str, Results]) -> str:
    return ", ".join(str(length) for length in sorted({results.native_length for results in models.values()}))


def accuracy_figure(path: str | Path, models: dict[str, Results]) -> None:
    """Write a PNG: accuracy against length, one panel for each task group, a line for each model."""
    rows = len(models) // 3 + 1  # of the legend, the native length included
    figure = Figure(figsize=(10, 4.0 + 0.26 * rows), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(TASK_GROUPS), sharey=True)
    for axes, group in zip(panels, TASK_GROUPS, strict=True):
        _panel(axes, group, models)
    panels[0].set_ylabel("exact match (%)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(3, len(labels)), frameon=False, fontsize=9)
    title = "Needle tasks: exact match against prompt length"
    figure.suptitle(title, fontsize=12, fontweight="bold", x=0.02, ha="left")
    beside = Path(path).with_name(Path(path).name + ".partial")
    figure.savefig(beside, format="png")
    beside.replace(path)


def _panel(axes: Axes, group: str, models: dict[str, Results]) -> None:
    """One task group; models stand a little beside each other at a length, so that their intervals can be read."""
    lengths = sorted({length for results in models.values() for length in results.lengths})
    for index, (name, results) in enumerate(models.items()):
        step = 1.0 + 0.025 * (index - (len(models) - 1) / 2)
        scores = [results.group(group, length) for length in sorted(results.lengths)]
        below = [100 * (score.accuracy - score.interval[0]) for score in scores]
        above = [100 * (score.interval[1] - score.accuracy) for score in scores]
        axes.errorbar(
            [length * step for length in sorted(results.lengths)],
            [100 * score.accuracy for score in scores],
            yerr=(below, above),
            label=f"{name} ({results.num_fa} of {results.num_heads} FA)",
            color=COLORS[index % len(COLORS)],
            marker=MARKERS[(index + index // len(COLORS)) % len(MARKERS)],
            markersize=5,
            linewidth=1.6,
            elinewidth=1.0,
            capsize=2.5,
        )
    axes.set_xscale("log", base=2)
    axes.set_xlim(lengths[0] / 1.3, lengths[-1] * 1.3)
    axes.set_xticks(lengths, [_short(length) for length in lengths])
    axes.set_xticks([], minor=True)
    axes.set_ylim(-4, 108)
    axes.set_yticks(range(0, 101, 20))
    for native in sorted({results.native_length for results in models.values()}):
        if lengths[0] / 1.3 <= native <= lengths[-1] * 1.3:
            dashes = {"color": "#888888", "linestyle": (0, (4, 3)), "linewidth": 1.2, "zorder": 0}
            axes.axvline(native, label=f"native length ({_short(native)})", **dashes)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(f"{group} ({len(TASK_GROUPS[group])} tasks)", fontsize=10, loc="left")
    axes.set_xlabel("prompt length (tokens)")


def _short(length: int) -> str:
    return f"{length // 1024}K" if length % 1024 == 0 and length >= 8192 else str(length)
