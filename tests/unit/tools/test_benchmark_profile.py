# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""--profile of the benchmark's sections layer and step: a table by part for every contestant, at the last length."""

import pytest

from tools.benchmark import parser
from tools.benchmarks import layer, step
from tools.benchmarks.report import Report

LAYER = "layer --device cpu --lengths 32 48 --heads 8 --kv-groups 4 --head-dim 16 --hidden 32 --repeats 1 --profile"
STEP = (
    "step --device cpu --lengths 16 24 --whole-logits 0 --repeats 1 --layers 2 --hidden 24 --heads 4 --kv-groups 2"
    " --head-dim 8 --ffn 20"
)


def tables(report: Report) -> dict[str, Report]:
    return {
        table.title.removesuffix(" tokens, by part"): table for table in report.more if table.title.endswith("by part")
    }


def passes(table: Report, part: str) -> dict[str, float]:
    """Milliseconds of a part, once they are seen to add up."""
    rows = {row[0]: dict(zip(table.columns[1:-1], map(float, row[1:-1]), strict=True)) for row in table.rows}
    assert sum(row["all"] for name, row in rows.items() if name != "all") == pytest.approx(rows["all"]["all"], abs=0.2)
    assert f"{rows['all']['all']:.2f} ms" in table.notes
    return rows.get(part, {})


def test_of_every_block() -> None:
    found = tables(layer.run(parser().parse_args(LAYER.split())))
    assert list(found) == ["all FA (teacher), 48", "3:1, 48", "7:1, 48", "all GDN, 48"]
    for name, table in found.items():
        projections = passes(table, "projections")
        assert projections["forward"] > 0 < projections["backward"]
        assert bool(passes(table, "FA attention")) == (name != "all GDN, 48")
        assert bool(passes(table, "GDN delta rule")) == ("(teacher)" not in name)


def test_of_every_stage() -> None:
    found = tables(step.run(parser().parse_args([*STEP.split(), "--vocabulary", "96", "--profile"])))
    assert list(found) == ["align, 24", "distill, 24", "extend, 24"]
    for name, table in found.items():
        assert passes(table, "GDN delta rule")["backward"] > 0 < passes(table, "loss")["forward"]
        assert ("teacher" in table.columns) == (name != "extend, 24")
        assert (passes(table, "MLP").get("forward", 0.0) > 0) == (name != "align, 24")
