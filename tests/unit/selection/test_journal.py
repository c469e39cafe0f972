# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Finished pieces come back wherever the run was killed, and only to the run that they belong to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hydra_mcore.errors import InputError
from hydra_mcore.selection.journal import JournalWriter, Pieces, read_journal

RUN = {"teacher": "abc", "length": 64, "seed": 3, "probes": ["one", "two"], "pairs": None}


def written(folder: Path, writer: str = "replica0", run: dict[str, Any] = RUN, **pieces: Any) -> Path:
    journal = JournalWriter(folder, run, writer)
    for name, value in pieces.items():
        journal.add(name, value)
    return journal.path


PIECES: Pieces = {"one receivers 0": {"effects": [[0.1, -2e-7]], "solved": [True]}, "two": None, "wörd\nline": [1]}


def test_pieces_come_back_at_once(tmp_path: Path) -> None:
    journal, added = JournalWriter(tmp_path / "deep" / "64", RUN, "replica0"), {}
    for name, value in PIECES.items():
        journal.add(name, value)
        added[name] = value
        assert read_journal(tmp_path / "deep" / "64", RUN) == added, (
            "a piece is safe when add returns; the file is still open"
        )


def test_a_run_that_adds_nothing_leaves_no_trace(tmp_path: Path) -> None:
    JournalWriter(tmp_path / "new", RUN, "replica0")
    assert not (tmp_path / "new").exists()


def test_nothing_to_read(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "notes.txt").write_text("no journal\n")
    assert [read_journal(tmp_path / name, RUN) for name in ("missing", "empty", "others")] == [{}, {}, {}]


def test_a_last_line_cut_anywhere_is_dropped_and_written_anew(tmp_path: Path) -> None:
    whole = written(tmp_path / "whole", first={"a": 1}, second={"b": [2.5]}).read_bytes()
    start = whole.index(b'["second"')
    for cut in range(start, len(whole)):
        (folder := tmp_path / str(cut)).mkdir()
        (path := folder / "replica0.jsonl").write_bytes(whole[:cut])
        assert read_journal(folder, RUN) == {"first": {"a": 1}}
        written(folder, third=3)
        assert read_journal(folder, RUN) == {"first": {"a": 1}, "third": 3}
        run, *pieces = map(json.loads, path.read_text().splitlines())
        assert run == RUN and [piece[:2] for piece in pieces] == [["first", {"a": 1}], ["third", 3]]


def test_a_header_cut_anywhere_is_written_anew(tmp_path: Path) -> None:
    whole = written(tmp_path / "whole", first=1).read_bytes()
    header = whole.index(b"\n") + 1
    for cut in range(header + 1):  # up to a whole header without pieces
        (folder := tmp_path / str(cut)).mkdir()
        (folder / "replica0.jsonl").write_bytes(whole[:cut])
        assert read_journal(folder, RUN) == {}
        written(folder, first=1)
        assert (folder / "replica0.jsonl").read_bytes() == whole


def test_going_on_keeps_what_was_there(tmp_path: Path) -> None:
    written(tmp_path, first=1, second=2)
    path = written(tmp_path, third=3)
    assert read_journal(tmp_path, RUN) == {"first": 1, "second": 2, "third": 3}
    assert path.read_text().count("teacher") == 1, "one header a file"


def test_several_writers(tmp_path: Path) -> None:
    one, other = (JournalWriter(tmp_path, RUN, name) for name in ("replica0", "replica1"))
    for journal, name in ((one, "a"), (other, "b"), (one, "c"), (other, "d")):
        journal.add(name, name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["replica0.jsonl", "replica1.jsonl"]
    assert read_journal(tmp_path, RUN) == {name: name for name in "abcd"}
    other.path.write_bytes(other.path.read_bytes()[:-1])  # one of them was killed while it wrote
    assert read_journal(tmp_path, RUN) == {name: name for name in "abc"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 4}, "whose seed is 3, not 4;"),
        ({"teacher": "abd"}, "whose teacher is 'abc', not 'abd';"),
        ({"probes": ["one"]}, r"whose probes is \['one', 'two'\], not \['one'\];"),
        ({"method": "exact"}, "whose method is None, not 'exact';"),  # a fact that the journal does not know
        ({"length": 32, "seed": 4}, "whose length is 64, not 32;"),  # the first that differs
    ],
)
def test_pieces_of_another_run_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    written(tmp_path, first=1)
    with pytest.raises(InputError, match=message) as refused:
        read_journal(tmp_path, RUN | changes)
    assert str(tmp_path) in str(refused.value) and "\n" not in str(refused.value)


def test_prompts_of_another_generator_are_named_as_such(tmp_path: Path) -> None:
    """Before the digest of the prompts, which differs too."""
    written(tmp_path, first=1)
    with pytest.raises(InputError, match="whose generator is None, not 2; go on as it was begun"):
        read_journal(tmp_path, {"generator": 2, **RUN, "seed": 4})


def test_a_fact_that_only_the_journal_has_is_refused(tmp_path: Path) -> None:
    written(tmp_path, first=1)
    with pytest.raises(InputError, match="whose seed is 3, not None;"):
        read_journal(tmp_path, {name: value for name, value in RUN.items() if name != "seed"})


def test_every_writers_run_is_compared(tmp_path: Path) -> None:
    written(tmp_path, "replica0", a=1)
    written(tmp_path, "replica1", RUN | {"seed": 9}, b=2)
    with pytest.raises(InputError, match="whose seed is 9, not 3;"):
        read_journal(tmp_path, RUN)


def test_facts_are_compared_as_json_keeps_them(tmp_path: Path) -> None:
    """A tuple comes back as a list, a whole number as a key comes back as a text."""
    run = {"probes": ("one", "two"), "sizes": {8: 0.1}}
    written(tmp_path, run=run, first=1)
    assert read_journal(tmp_path, run) == {"first": 1}
