# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The report on all that an output folder records: JSON for machines, markdown and two figures for people."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from datetime import date
from pathlib import Path

from hydra_mcore.errors import InputError
from hydra_mcore.evaluation.figures import accuracy_figure, loss_figure
from hydra_mcore.evaluation.perplexity import TextLoss
from hydra_mcore.evaluation.records import Piece, Records
from hydra_mcore.evaluation.results import Results, answered, comparable, groups_of, lengths_of, to_json, uneven
from hydra_mcore.evaluation.scoring import Score
from hydra_mcore.figures import short
from hydra_mcore.files import read_json, shown, write_text

RESULTS_FORMAT = 2
RESULTS_NAME, TABLE_NAME, ACCURACY_NAME, LOSS_NAME = "results.json", "report.md", "accuracy.png", "loss.png"
NONE = "-"


def check_report(out: Path) -> None:
    """Raise InputError where another version of this package left a report, which would be lost."""
    path = out / RESULTS_NAME
    if not path.exists():
        return
    raw = read_json(path)
    found = raw.get("format") if isinstance(raw, dict) else None
    if found != RESULTS_FORMAT:
        raise InputError(
            f"{path}: no report that this version can add to (format {shown(found)}); choose another --out"
        )


def write_report(out: Path, reference: str | None) -> str:
    """Write the report anew from all records of a folder, and give its tables of accuracy; the JSON comes last.

    Args:
        reference: name of the model that the others' likeliest tokens are compared with; None: the first one.

    Raises:
        InputError: no model of that name has a record.
    """
    records = Records(out)
    if not (results := comparable(records.rows())):
        raise InputError(f"{out}: holds no finished piece to report")
    named = {line.name: line for line in results}
    if reference is not None and reference not in named:
        raise InputError(f"--reference {reference}: no such model; there are {', '.join(named)}")
    compared = results[0] if reference is None else named[reference]
    if lengths_of(results):
        accuracy_figure(out / ACCURACY_NAME, results)
    if any(line.text for line in results):
        loss_figure(out / LOSS_NAME, results)
    day = records.day
    write_text(out / TABLE_NAME, markdown(results, compared, day))
    said_of_day = None if day is None else str(day)
    found = {"format": RESULTS_FORMAT, "date": said_of_day, "models": to_json(results, compared)}
    write_text(out / RESULTS_NAME, json.dumps(found, indent=1) + "\n")  # as text: several jobs may write it at once
    return accuracy_tables(results)


def markdown(results: Sequence[Results], reference: Results, day: date | None = None) -> str:
    """The whole report: accuracy by task group, loss, the short-context check, every task by itself."""
    parts = ["# Evaluation", _finding(results)]
    if lengths_of(results):
        parts += [_how_scored(results, day), accuracy_tables(results), f"![accuracy against length]({ACCURACY_NAME})"]
    if any(line.text for line in results):
        parts += _losses(results) + _short_context(results, reference)
    if lengths_of(results):
        parts += ["## Every task", _every_task(results)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _finding(results: Sequence[Results]) -> str:
    """What each model scores, a line a task group and one of text, over the lengths that all models took."""
    lines = []
    for group, tasks in groups_of(results).items():
        scores = {length: [line.group(tasks, length) for line in results] for length in lengths_of(results)}
        if taken := [length for length, each in scores.items() if None not in each]:
            shares = (
                sum(score.correct for score in each) / sum(score.total for score in each)
                for each in zip(*(scores[length] for length in taken), strict=True)
            )
            said = (f"{line.name} {100 * share:.0f}%" for line, share in zip(results, shares, strict=True))
            lines.append(f"- **{group}**, {_span(taken)}: {', '.join(said)}")
    if common := set.intersection(*(set(line.text) for line in results)):
        said = (f"{line.name} {line.text[max(common)].perplexity:.1f}" for line in results)
        lines.append(f"- **perplexity**, windows of {short(max(common))} tokens: {', '.join(said)}")
    return "\n".join(lines)


def _span(lengths: Sequence[int]) -> str:
    ends = short(lengths[0]) if len(lengths) == 1 else f"{short(lengths[0])} to {short(lengths[-1])}"
    return f"prompts of {ends} tokens"


def accuracy_tables(results: Sequence[Results]) -> str:
    """A table for each task group: models by prompt length."""
    lengths, tables = lengths_of(results), []
    for group, tasks in groups_of(results).items():
        cells = {line.name: [_percent(line.group(tasks, length)) for length in lengths] for line in results}
        rows = (
            [line.name, _heads(line), short(line.contestant.facts.native_length), *cells[line.name]] for line in results
        )
        tables.append(
            f"{group} ({', '.join(tasks)}):\n\n" + table(["model", "FA heads", "native", *map(short, lengths)], rows)
        )
    return "\n\n".join(tables)


def _how_scored(results: Sequence[Results], day: date | None) -> str:
    pieces: list[Piece] = []
    for line in results:
        pieces += [line.pieces[key] for key in line.scores]
    counts, seeds = (sorted({getattr(piece, name) for piece in pieces}) for name in ("count", "seed"))
    generated = sorted({piece.task for piece in pieces if piece.scoring == "generation"})
    said = (
        "Share of prompts answered, in percent, with 95% intervals (Wilson); columns are prompt lengths in tokens."
        f" {_joined(counts)} prompts a task and length, seed {_joined(seeds)}, worded as"
        f" {_joined(sorted({p.wording for p in pieces}))}."
        f" {'Scored by greedy decoding: ' + ', '.join(generated) + '; the others' if generated else 'Scored'} by"
        " teacher forcing, which gives what greedy decoding would where one text alone is right."
    )
    if day is not None:
        said += f" The chat template says that today is {day}."
    if unlike := uneven(results):
        said += (
            " Not all models answered the same questions:"
            f" {', '.join(f'{task} @{short(length)}' for task, length in unlike)}; ask them in one call with the same"
            " --prompts and --seed."
        )
    if len(_tokenizers(results)) > 1:
        said += (
            " The models have different tokenizers, each with prompts and text windows of its own of the same lengths"
            " in tokens: "
            + "; ".join(f"{', '.join(names)} ({tokenizer[:8]})" for tokenizer, names in _tokenizers(results).items())
            + ". Their perplexities cannot be compared, bits per byte can."
        )
    return said


def _losses(results: Sequence[Results]) -> list[str]:
    """Perplexity by window length, and up to where context helps."""
    parts = ["## Held-out text", "Perplexity by window length in tokens, each window read from its own beginning:"]
    parts.append(_by_window(results, lambda line, length: f"{line.text[length].perplexity:.2f}"))
    if len(_tokenizers(results)) > 1:
        parts += ["Bits per byte:", _by_window(results, lambda line, length: f"{line.text[length].bits_per_byte:.3f}")]
    said = (
        "Does loss keep falling with context? Nats a token by the number of tokens before, differences with one"
        " standard error:"
    )
    lines = [f"- {line.name}: {_trend(line.text[max(line.text)])}" for line in results if line.text]
    return [*parts, f"![loss against position]({LOSS_NAME})", said, "\n".join(lines)]


def _trend(text: TextLoss) -> str:
    """Where in its windows a model's loss is lowest, and how sure that is."""
    bins = text.by_position
    last = len(bins) - 1
    lowest = min(range(len(bins)), key=lambda place: bins[place].nll)
    at = [f"{part.nll:.3f} at {short(part.start)}-{short(part.end)}" for part in bins]
    windows = f"{len(text.by_window)} window{'s' if len(text.by_window) > 1 else ''} of {short(text.length)}"
    if last == 0:
        return f"{at[0]} ({windows})"
    rise, error = text.rise(last, last - 1) if lowest == last else text.rise(lowest, last)
    said = f"{rise:.3f}" + ("" if error is None else f" +- {error:.3f}")
    if lowest == last:
        return f"falls to the end, {at[last]}, {said} below the bin before ({windows})"
    return f"lowest, {at[lowest]}; at the end, {at[last]}, {said} above that ({windows})"


def _short_context(results: Sequence[Results], reference: Results) -> list[str]:
    """What the transfer cost where the reference is at home."""
    lengths = sorted(reference.likeliest)
    if not lengths or len(results) < 2:
        return []
    cells = {
        line.name: [
            NONE if (share := line.agreement(reference, length)) is None else f"{100 * share:.1f}" for length in lengths
        ]
        for line in results
    }
    said = (
        f"Tokens of the held-out text where a model thinks the same next token the likeliest as {reference.name} does,"
        " in percent, by window length up to the native one:"
    )
    return [
        "## Short context",
        said,
        table(["model", *map(short, lengths)], ([name, *row] for name, row in cells.items())),
    ]


def _every_task(results: Sequence[Results]) -> str:
    tasks = _tasks(results)
    keys = sorted(answered(results), key=lambda key: (key[1], tasks.index(key[0])))
    rows = (
        [task, short(length), *(_percent(line.scores.get((task, length))) for line in results)] for task, length in keys
    )
    return table(["task", "tokens", *(line.name for line in results)], rows)


def _tasks(results: Sequence[Results]) -> list[str]:
    return list(itertools.chain.from_iterable(groups_of(results).values()))


def _by_window(results: Sequence[Results], cell: Callable[[Results, int], str]) -> str:
    lengths = sorted(set(itertools.chain.from_iterable(line.text for line in results)))
    rows = (
        [line.name, *(cell(line, length) if length in line.text else NONE for length in lengths)] for line in results
    )
    return table(["model", *map(short, lengths)], rows)


def _tokenizers(results: Sequence[Results]) -> dict[str, list[str]]:
    """Names of the models of each tokenizer."""
    found: dict[str, list[str]] = {}
    for line in results:
        found.setdefault(line.contestant.tokenizer, []).append(line.name)
    return found


def table(header: list[str], rows: Iterable[list[str]]) -> str:
    """Markdown, the first column to the left, the others to the right; no newline at the end."""
    lines = [header, [":--"] + ["--:"] * (len(header) - 1), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def _percent(score: Score | None) -> str:
    if score is None:
        return NONE
    low, high = score.interval
    return f"{100 * score.accuracy:.1f} ({100 * low:.1f}-{100 * high:.1f})"


def _heads(line: Results) -> str:
    facts = line.contestant.facts
    return NONE if facts.num_fa is None else f"{facts.num_fa} of {facts.num_heads}"


def _joined(values: Sequence[object]) -> str:
    return ", ".join(map(str, values))
