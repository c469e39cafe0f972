# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Write what a section of the benchmark found, as markdown tables and as JSON."""

from __future__ import annotations

import dataclasses
import datetime
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hydra_mcore.files import write_json
from tools.benchmarks.measure import Point


@dataclass(frozen=True)
class Report:
    """One table, and what is behind it.

    Attributes:
        title: a line above the table.
        notes: what the reader must know about the columns; paragraphs, may be empty.
        columns, rows: of the table; cells as they are printed.
        points: what the figure shows, a line for each name.
        limits: name of a contestant -> length -> the seconds that it needs at least, drawn as dashed lines in its
            colour.
        memory: what the points' ``peak_bytes`` are, for the figure.
        more: further tables of the same run.
        failure: why the command ends with exit status 1; empty if it does not.
    """

    title: str
    notes: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    points: Sequence[Point] = ()
    limits: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    memory: str = "peak memory"
    more: Sequence[Report] = ()
    failure: str = ""

    @property
    def tables(self) -> Iterator[Report]:
        """This report and all reports that follow it."""
        yield self
        for report in self.more:
            yield from report.tables


def markdown(report: Report) -> str:
    """All tables of a report with their titles and notes."""
    parts: list[str] = []
    for table in report.tables:
        parts += [f"**{table.title}**", table.notes, _table(table)]
    return "\n\n".join(filter(None, parts))


def save_json(path: Path, command: Sequence[str], report: Report) -> None:
    """Write what was found, on which machine and when: cells as printed, seconds of every repeat, bytes."""
    tables = [
        {
            "title": table.title,
            "notes": table.notes,
            "columns": list(table.columns),
            "rows": [list(map(str, row)) for row in table.rows],
            "points": [dataclasses.asdict(point) for point in table.points],
            "limits": table.limits,
        }
        for table in report.tables
    ]
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    write_json(path, {"command": list(command), "date": now, "machine": machine(), "tables": tables})


def machine() -> dict[str, Any]:
    """The processors and the versions that a time depends on."""
    on_gpu = torch.cuda.is_available()
    return {
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if on_gpu else None,
        "torch": torch.__version__,
    }


def _processor() -> str:
    """What Linux calls it, else the architecture."""
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _table(report: Report) -> str:
    head, *rows = ("| " + " | ".join(map(str, cells)) + " |" for cells in (report.columns, *report.rows))
    return "\n".join([head, "|---|" + "---:|" * (len(report.columns) - 1), *rows])
