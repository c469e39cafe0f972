# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Small files: what is read is JSON that can be written again, what is written is whole, values have the types of their
fields.
"""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import pytest

from hydra_mcore.errors import InputError
from hydra_mcore.files import from_fields, parse_json, read_json, replacing, write_json


class OwnError(InputError):
    pass


@dataclasses.dataclass(frozen=True)
class Facts:
    count: int
    rate: float = 1.0
    name: str = ""
    on: bool = False
    kind: Literal["a", "b", 1] = "a"
    pair: tuple[int, str] = (1, "x")
    many: tuple[float, ...] = ()
    lists: list[list[int]] = dataclasses.field(default_factory=list)
    table: dict[str, int] | None = None
    anything: Any = None


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": ' * 100_000, "nested too deeply"),
        (b'"\\ud800"', "half of a surrogate pair"),
        (b'{"\\uDFFF": 1}', "half of a surrogate pair"),
        (b"9" * 5000, "not JSON"),
    ],
)
def test_a_broken_file_is_one_line(tmp_path: Path, content: bytes, problem: str) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(OwnError, match=problem) as caught:
        read_json(tmp_path / "x.json", OwnError, "thing")
    assert str(caught.value).startswith(f"thing {tmp_path}/x.json: ")
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_folder_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        read_json(tmp_path / "none")
    with pytest.raises(InputError, match="Is a directory"):
        read_json(tmp_path)


def test_a_whole_surrogate_pair_is_text() -> None:
    assert parse_json('"\\ud83d\\ude00"', "x") == "\U0001f600"


def test_what_cannot_be_written_leaves_the_old_file(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "x.json", {"a": object()})
    with pytest.raises(RuntimeError), replacing(tmp_path / "x.json") as beside:
        beside.write_text("half")
        raise RuntimeError
    assert read_json(tmp_path / "x.json") == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_values_take_the_types_of_their_fields() -> None:
    facts = from_fields(
        Facts,
        {"count": 3.0, "rate": 2, "pair": [4, "y"], "many": [1, 2.5], "lists": [[1], []], "table": {"a": 2}},
        "facts",
    )
    assert facts == Facts(3, 2.0, pair=(4, "y"), many=(1.0, 2.5), lists=[[1], []], table={"a": 2})
    assert [type(facts.count), type(facts.rate)] == [int, float]
    assert from_fields(Facts, {"count": 1, "table": None, "kind": 1}, "facts").kind == 1


@pytest.mark.parametrize(
    "raw",
    [
        None,
        [],
        "text",
        {},
        {"count": 1, "other": 2},
        *(
            {"count": value}
            for value in (True, "3", None, [3], 1.5, float("nan"), float("inf"), 10**19, 10**400, 1e300)
        ),
        *({"count": 1, "rate": value} for value in (True, "1", float("nan"), -float("inf"), [], {})),
        *({"count": 1, "name": value} for value in (1, None, ["x"])),
        *({"count": 1, "on": value} for value in (1, 0, "true", None)),
        *({"count": 1, "kind": value} for value in ("c", True, 2, [], {})),
        *({"count": 1, "pair": value} for value in ([1], [1, "x", 2], ["x", 1], "1x")),
        *({"count": 1, "many": value} for value in (1, ["x"], {"a": 1})),
        *({"count": 1, "lists": value} for value in ([1], [[1.5]], {})),
        *({"count": 1, "table": value} for value in ({"a": "x"}, [], 0, False)),
    ],
)
def test_other_values_are_one_line(raw: Any) -> None:
    with pytest.raises(OwnError, match=r"^facts[:\[ ]") as caught:
        from_fields(Facts, raw, "facts", OwnError)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200
