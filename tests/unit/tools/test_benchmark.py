# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The benchmark: what it measures comes out alike as table, JSON and figure; no test looks at how long anything
took.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from hydra_mcore.kinds import KINDS
from tools.benchmark import main
from tools.benchmarks.delta_rule import ATTENTION, OURS, Rules
from tools.benchmarks.kinds import CORES as CORES_OF
from tools.benchmarks.kinds import MEGATRON, make_inputs, references
from tools.benchmarks.layer import TEACHER, crossing
from tools.benchmarks.measure import in_turn, measured, peak_bytes
from tools.benchmarks.report import Report, markdown
from tools.benchmarks.sections import SECTIONS

RULE = (
    "delta-rule --lengths 96 160 --heads 2 --head-dim 16 --batch 2 --repeats 3 --slow-limit 160 --chunk-sizes 32 64"
    " --accuracy-length 70"
)
CORES = "kinds --lengths 64 128 --heads 2 --head-dim 16 --repeats 3 --slow-limit 64"
LAYER = "layer --lengths 64 128 --heads 8 --kv-groups 4 --head-dim 16 --hidden 32 --repeats 2"
DECODE = (
    "decode --lengths 24 40 --steps 3 --layers 1 --hidden 32 --heads 4 --kv-groups 2 --head-dim 8 --ffn 16 --vocabulary"
    " 32 --fa-heads 1"
)


def run_command(command: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The JSON of a section, having checked that the tables on stdout are those in it, and that the figure is a
    picture.
    """
    main([*command.split(), "--json", str(folder / "out.json"), "--figure", str(folder / "out.png")])
    found = json.loads((folder / "out.json").read_text())
    printed = [cells(line) for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert printed == [row for table in found["tables"] for row in (table["columns"], *table["rows"])]
    assert (folder / "out.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in folder.iterdir()) == ["out.json", "out.png"]
    assert (
        found["command"][: len(command.split())] == command.split() and found["machine"]["torch"] == torch.__version__
    )
    return found


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def medians(table: dict[str, Any]) -> dict[tuple[int, str], float]:
    """(length, name) -> the middle of an odd number of seconds, or the mean of the two in the middle."""
    found = {}
    for point in table["points"]:
        ordered = sorted(point["seconds"])
        found[point["length"], point["name"]] = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
    return found


def column(table: dict[str, Any], name: str) -> list[str]:
    return [row[table["columns"].index(name)] for row in table["rows"]]


@pytest.mark.parametrize("section", SECTIONS)
def test_every_section_has_examples_and_the_common_flags(section: str, capsys: pytest.CaptureFixture[str]) -> None:
    name = section.replace("_", "-")
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    said = capsys.readouterr().out
    assert stop.value.code == 0 and f"python tools/benchmark.py {name}" in said.split("examples:")[1]
    assert "--json FILE" in said and ("--figure FILE" in said) == SECTIONS[section].figure


def test_delta_rule(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tools.benchmarks.delta_rule.SLOW_TURNS", 100)
    found = run_command(RULE, tmp_path, capsys)
    trained, forward, kept, sweep, errors = found["tables"]
    contestants = [(n, name) for n in (96, 160) for name in (OURS, ATTENTION, "Megatron-Core", "transformers")]
    for table in (trained, forward, kept):
        seconds = medians(table)
        assert list(seconds) == contestants
        assert column(table, "times ours") == [f"{seconds[n, name] / seconds[n, OURS]:.3g}" for n, name in contestants]
        assert column(table, "times attention") == [
            f"{seconds[n, name] / seconds[n, ATTENTION]:.3g}" for n, name in contestants
        ]
        assert [len(point["seconds"]) for point in table["points"]] == [3, 3, 3, 3, 3, 3, 1, 1]
        limit = table["limits"][ATTENTION]["160"]
        assert column(table, "of the limit")[5] == f"{100 * limit / seconds[160, ATTENTION]:.0f}%"
        gflop = [float(cell) for cell in column(table, "GFLOP")]
        assert gflop[0] == gflop[2] == gflop[3] != gflop[1]  # all delta rules do the same work
    # Two rows of two heads of 96 tokens: q k^T and the product with v over (n + 1) / 2 keys, and twice that backward.
    assert float(column(trained, "GFLOP")[1]) == pytest.approx(3 * 2 * 2 * 2 * 96 * 16 * 97 / 2 * 2 / 1e9, rel=0.01)
    assert [row[:2] for row in sweep["rows"]] == [["96", "32"], ["96", "64"], ["160", "32"], ["160", "64"]]
    assert [row[0] for row in errors["rows"]] == [OURS, "Megatron-Core", "transformers"]
    assert all(0 < float(cell) < 1e-5 for row in errors["rows"] for cell in row[1:])


def test_a_wrong_rule_has_an_error() -> None:
    rules = Rules(1, 2, 16, "cpu", "float32")
    right, *_ = rules.errors(70)
    ours = rules.fast[OURS]
    rules.fast[OURS] = lambda q, k, v, log_decay, write: ours(q, k, v, 1.01 * log_decay, write)
    wrong, *others = rules.errors(70)
    assert all(float(b) > 100 * float(a) for a, b in zip(right[1:], wrong[1:], strict=True))
    assert all(float(cell) < 1e-5 for other in others for cell in other[1:])


def test_kinds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, growth = run_command(CORES, tmp_path, capsys)["tables"]
    labels, seconds = [kind.label for kind in KINDS.values()], medians(table)
    names = [*labels, *(name for name, _ in references().values())]
    assert list(seconds) == [(64, name) for name in names] + [(128, name) for name in labels]
    assert column(table, "times GDN") == [f"{taken / seconds[n, 'GDN']:.3g}" for (n, _), taken in seconds.items()]
    assert column(table, "times attention") == [f"{taken / seconds[n, 'FA']:.3g}" for (n, _), taken in seconds.items()]
    assert column(table, "times its kind")[len(labels)] == f"{seconds[64, MEGATRON] / seconds[64, 'GDN']:.3g}"
    assert [row[0] for row in growth["rows"]] == labels
    assert column(growth, "operations") == ["3.97", "2.00", "2.00", "2.00"]  # attention: 128 * 129 over 64 * 65
    # By hand, of a row: products of 64 x 16 and 16 x 16 forward, twice as many backward; the inverse of GDN.
    gdn, lightning = 3 * (4 * 2 * 64 * 16 + 3 * 2 * 256) + 64 * 64, 3 * (2 * 2 * 64 * 16 + 2 * 2 * 256)
    assert column(table, "operations, times GDN")[3] == f"{lightning / gdn:.3g}"


def test_every_kind_has_a_core_and_references_compute_the_same() -> None:
    assert list(CORES_OF) == list(KINDS)
    inputs = make_inputs(1, 128, 2, 16, "cpu", "float32")
    for kind, (name, reference) in references().items():
        torch.testing.assert_close(reference(inputs), CORES_OF[kind](inputs), rtol=1e-4, atol=1e-5, msg=name)


def test_layer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, where = run_command(LAYER, tmp_path, capsys)["tables"]
    names, seconds = [TEACHER, "3:1", "7:1", "all GDN"], medians(table)
    assert list(seconds) == [(n, name) for n in (64, 128) for name in names]
    assert column(table, "of all FA") == [f"{taken / seconds[n, TEACHER]:.3f}" for (n, _), taken in seconds.items()]
    assert list(table["limits"]) == names[1:] == [row[0] for row in where["rows"]]
    # FLOPs of the limit without FA heads: nothing in it was measured but the speed of matrix products, so it is linear.
    assert table["limits"]["all GDN"]["128"] == pytest.approx(2 * table["limits"]["all GDN"]["64"])
    assert table["limits"]["3:1"]["128"] > table["limits"]["7:1"]["128"] > table["limits"]["all GDN"]["128"]


@pytest.mark.parametrize(
    ("contestant", "words"),
    [
        ({1024: 0.9, 4096: 0.1}, "below 1024"),
        ({1024: 2.0, 4096: 1.0}, "above 4096"),
        ({1024: 2.0, 4096: 0.5}, "2048"),  # half way between both logarithms
        ({1024: 0.5, 4096: 2.0, 16384: 0.5}, "8192"),  # the last time
    ],
)
def test_crossing(contestant: dict[int, float], words: str) -> None:
    assert crossing(dict.fromkeys(contestant, 1.0), contestant) == words


def test_decode_with_prefill(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    decoded, prompts = run_command(DECODE, tmp_path, capsys)["tables"]
    students, seconds = ["25% FA in 50% of kv groups" + kind for kind in ("", ", KDA", ", Lightning")], medians(prompts)
    assert list(seconds) == [(n, name) for n in (24, 40) for name in ("teacher", *students)]
    faster = [f"{seconds[n, 'teacher'] / seconds[n, name]:.2f}" for n, name in seconds]
    assert column(prompts, "times faster than the teacher") == faster
    teacher_cache = {point["length"]: point["peak_bytes"] for point in decoded["points"] if point["name"] == "teacher"}
    assert teacher_cache == {
        n: 2 * 2 * 8 * 4 * n for n in (24, 40)
    }  # keys and values of two groups of 8 float32 channels


def test_contestants_take_turns() -> None:
    calls: list[str] = []
    contestants = {name: lambda name=name: calls.append(name) for name in "abc"}
    seconds = in_turn(contestants, 2, "cpu")
    assert "".join(calls) == "abc" + "abc" + "abc"  # the first round warms up
    assert [len(seconds[name]) for name in "abc"] == [2, 2, 2]
    in_turn(contestants, 1, "cpu", warm_up=False)
    assert "".join(calls) == 4 * "abc"


def test_peak_is_what_lives_at_once() -> None:
    x = torch.ones(256)  # there before, so not counted

    def call() -> None:
        y = x + 1
        del y
        z = torch.cat([x, x])
        z.mul_(2)

    assert peak_bytes(call, "cpu") == 2 * 256 * 4
    (point,) = measured({"sum": call}, 256, 3, "cpu")
    assert (point.name, point.length, len(point.seconds), point.peak_bytes) == ("sum", 256, 3, 2048)


def test_tables_stand_one_after_the_other() -> None:
    second = Report("second", "with notes", ("c",), [])
    report = Report("first", "", ("a", "b"), [[1, 2]], more=[second])
    assert (
        markdown(report) == "**first**\n\n| a | b |\n|---|---:|\n| 1 | 2 |\n\n**second**\n\nwith notes\n\n| c |\n|---|"
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["delta-rule", "--device", "cuda"], "--device cuda: torch sees no GPU"),
        (["layer", "--json", "nowhere/out.json"], "--json nowhere/out.json: no such folder"),
        (["delta-rule", "--figure", "nowhere/out.png"], "--figure nowhere/out.png: no such folder"),
        (["communication", "--figure", "out.png"], "unrecognized arguments: --figure"),
    ],
)
def test_bad_input_is_one_line(flags: Sequence[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(list(flags))
    assert stop.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]
