# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Write the demo's report: the table, the heat map of heads, the curves of the stages.

example: several runs (seeds) as one table
  python -m examples.tiny.report runs/seed0 runs/seed1 runs/seed2
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from examples.tiny.students import EVALUATION_SEED


def seeds_table(runs: Sequence[Path]) -> str:
    """Markdown: a row for each model and run, then the model's mean over runs; percent, Wilson 95% intervals."""
    results = [json.loads((run / "evaluation" / "results.json").read_text())["models"] for run in runs]
    columns = [(entry["group"], entry["length"]) for entry in next(iter(results[0].values()))["groups"]]
    header = ["model", "FA heads", "seed", *(f"{group} @{length}" for group, length in columns)]
    lines = [header, [":--"] + ["--:"] * (len(header) - 1)]
    for model in results[0]:
        entries = [result[model] for result in results]
        heads = f"{entries[0]['num_fa']} of {entries[0]['num_heads']}"
        for entry in entries:
            cells = (
                f"{100 * g['accuracy']:.1f} ({100 * g['interval'][0]:.0f}-{100 * g['interval'][1]:.0f})"
                for g in entry["groups"]
            )
            lines.append([model, heads, str(entry["tasks"][0]["seed"] - EVALUATION_SEED), *cells])
        means = (
            sum(entry["groups"][index]["accuracy"] for entry in entries) / len(entries) for index in range(len(columns))
        )
        lines.append([f"**{model}**", heads, "mean", *(f"**{100 * mean:.1f}**" for mean in means)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run of the demo")
    print(seeds_table(parser.parse_args().runs), end="")


if __name__ == "__main__":
    main()
