# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Records made comparable: for each model, task and length the one result that stands in the report."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hydra_mcore.evaluation.perplexity import TextLoss
from hydra_mcore.evaluation.records import TEXT, Contestant, Piece, Row
from hydra_mcore.evaluation.scoring import Score
from hydra_mcore.ruler.prompts import TASK_GROUPS, TASKS


@dataclass(frozen=True)
class Results:
    """One model's line of the report; pieces by task and length say what each number rests on."""

    contestant: Contestant
    pieces: dict[tuple[str, int], Piece]
    scores: dict[tuple[str, int], Score]
    text: dict[int, TextLoss]
    likeliest: dict[int, Path]

    @property
    def name(self) -> str:
        return self.contestant.name

    def group(self, tasks: Sequence[str], length: int) -> Score | None:
        """Tasks together: with equal prompts a task, their average.

        None unless the model took them all at this length.
        """
        scores = [self.scores.get((task, length)) for task in tasks]
        return None if None in scores else sum(scores, Score(0, 0))

    def agreement(self, reference: Results, length: int) -> float | None:
        """The share of a text's tokens where both models think the same next token the likeliest; None of different
        texts.
        """
        key = (TEXT, length)
        both_known = length in self.likeliest and length in reference.likeliest
        if not both_known or self.pieces[key].digest != reference.pieces[key].digest:
            return None
        return float(
            np.mean(
                np.load(self.likeliest[length], mmap_mode="r") == np.load(reference.likeliest[length], mmap_mode="r")
            )
        )


def comparable(rows: Sequence[Row]) -> list[Results]:
    """What each model shows: of several sets for a task and length the one that most models took, then the largest."""
    takers = Counter(itertools.chain.from_iterable((*row.scores, *row.text) for row in rows))

    def weight(piece: Piece) -> tuple[Any, ...]:
        return takers[piece], piece.count, piece.scoring, piece.seed, piece.digest

    results = []
    for row in rows:
        pieces = {
            (piece.task, piece.length): piece for piece in sorted((*row.scores, *row.text), key=weight)
        }  # the last one stays
        order = (*TASKS, TEXT)
        pieces = {key: pieces[key] for key in sorted(pieces, key=lambda key: (key[1], order.index(key[0])))}
        scores = {key: row.scores[piece] for key, piece in pieces.items() if key[0] != TEXT}
        windows = {length: piece for (task, length), piece in pieces.items() if task == TEXT}
        likeliest = {length: row.likeliest[piece] for length, piece in windows.items() if piece in row.likeliest}
        text = {length: row.text[piece] for length, piece in windows.items()}
        results.append(Results(row.contestant, pieces, scores, text, likeliest))
    return results


def answered(results: Sequence[Results]) -> set[tuple[str, int]]:
    """The (task, length) of all prompts that some model took."""
    return set(itertools.chain.from_iterable(line.scores for line in results))


def lengths_of(results: Sequence[Results]) -> list[int]:
    """The lengths at which some model answered prompts, in tokens, shortest first."""
    return sorted({length for _, length in answered(results)})


def groups_of(results: Sequence[Results]) -> dict[str, tuple[str, ...]]:
    """The task groups with at least one task that some model answered, each with these tasks."""
    taken = {task for task, _ in answered(results)}
    groups = {group: tuple(task for task in tasks if task in taken) for group, tasks in TASK_GROUPS.items()}
    return {group: tasks for group, tasks in groups.items() if tasks}


def uneven(results: Sequence[Results]) -> list[tuple[str, int]]:
    """The tasks and lengths where models of one tokenizer show different prompts or text."""
    asked: dict[tuple[str, str, int], set[str]] = {}
    for line in results:
        for (task, length), piece in line.pieces.items():
            asked.setdefault((piece.tokenizer, task, length), set()).add(piece.digest)
    return sorted(
        {(task, length) for (_, task, length), digests in asked.items() if len(digests) > 1},
        key=lambda key: (key[1], key[0]),
    )


def to_json(results: Sequence[Results], reference: Results) -> dict[str, Any]:
    """All results as JSON values by model name; accuracies are shares, losses in nats a token."""
    return {line.name: _entry(line, reference, groups_of(results)) for line in results}


def _entry(line: Results, reference: Results, groups: dict[str, tuple[str, ...]]) -> dict[str, Any]:
    facts, contestant = line.contestant.facts, line.contestant
    lengths = lengths_of([line])
    by_group = {}
    for length in lengths:
        by_group |= {(group, length): line.group(tasks, length) for group, tasks in groups.items()}
    names = (
        "fingerprint",
        "lineage",
        "stage",
        "strategy",
        "num_fa",
        "num_heads",
        "native_length",
        "vocab_size",
        "yarn",
    )
    return {
        "folder": str(facts.folder),
        **{name: getattr(facts, name) for name in names},
        "dtype": contestant.dtype,
        "tokenizer": contestant.tokenizer,
        "tasks": [{**_asked(line.pieces[key]), **_score(score)} for key, score in line.scores.items()],
        "groups": [
            {"group": key[0], "length": key[1], **_score(score)} for key, score in by_group.items() if score is not None
        ],
        "text": [
            {
                "length": length,
                "windows": len(text.by_window),
                "digest": line.pieces[TEXT, length].digest,
                "tokens": text.tokens,
                "nll": text.nll,
                "perplexity": text.perplexity,
                "bits_per_byte": text.bits_per_byte,
                "agreement": {"with": reference.name, "share": line.agreement(reference, length)},
                "by_position": [
                    {"start": b.start, "end": b.end, "nll": b.nll, "error": b.error} for b in text.by_position
                ],
            }
            for length, text in line.text.items()
        ],
    }


def _asked(piece: Piece) -> dict[str, Any]:
    return {name: getattr(piece, name) for name in ("task", "length", "scoring", "wording", "seed", "digest")}


def _score(score: Score) -> dict[str, Any]:
    return {
        "correct": score.correct,
        "total": score.total,
        "accuracy": score.accuracy,
        "interval": list(score.interval),
    }
