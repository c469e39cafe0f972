# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Which files folders and globs stand for: links, circles, hidden ones, odd names; and what is said of the others."""

from __future__ import annotations

import bz2
import gzip
import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from hydra_mcore.corpus.folders import find_files
from hydra_mcore.corpus.sources import FileSource, file_facts
from hydra_mcore.errors import InputError
from tests.support.corpora import encode_in_this_process
from tests.support.paths import TINY_TEACHER
from tools.prepare_data import main

LINE = b'{"text": "line"}\n'


def tree(folder: Path, *names: str) -> Path:
    """Files with a line of JSON each, empty folders (a slash at the end) and links (name -> target)."""
    for name in names:
        link, _, target = name.partition(" -> ")
        path = folder / link
        path.parent.mkdir(parents=True, exist_ok=True)
        if target:
            path.symlink_to(target)
        elif name.endswith("/"):
            path.mkdir(exist_ok=True)
        else:
            path.write_bytes(LINE)
    return folder


def names_of(*inputs: str | Path, below: Path) -> list[str]:
    return [str(path.relative_to(below)) for path in find_files([str(given) for given in inputs]).paths]


CASES = {
    "a linked folder": (["in/a.txt", "out/b.txt", "in/link -> ../out"], ["in/a.txt", "in/link/b.txt"], {}),
    "a linked file": (["in/a.txt", "out/b", "in/link.txt -> ../out/b"], ["in/a.txt", "in/link.txt"], {}),
    "a chain of links": (["in/l -> ../m", "m -> out", "out/b.txt"], ["in/l/b.txt"], {}),
    "a folder linked twice": (["in/l -> ../out", "in/m -> ../out", "out/b.txt"], ["in/l/b.txt"], {}),
    "a link to a folder that is there anyway": (["in/a -> z", "in/z/b.txt"], ["in/z/b.txt"], {}),
    "a link to a file that is there anyway": (["in/a.txt -> z.txt", "in/z.txt"], ["in/z.txt"], {"linked twice": 1}),
    "a link to its own folder": (["in/a.txt", "in/sub/loop -> ."], ["in/a.txt"], {"links that lead back up": 1}),
    "a link to a folder above": (["in/a.txt", "in/sub/up -> ../..", "other.txt"], ["in/a.txt"],
        {"links that lead back up": 1}),
    "two folders that link to each other": (["in/a.txt", "in/o -> ../out", "out/b.txt", "out/i -> ../in"], ["in/a.txt",
        "in/o/b.txt"], {}),
    "a link to itself": (["in/a.txt", "in/self.txt -> self.txt"], ["in/a.txt"], {"links to nowhere": 1}),
    "a link to nothing": (["in/a.txt", "in/gone.jsonl -> nothing"], ["in/a.txt"], {"links to nowhere": 1}),
    "hidden files and folders": (
        ["in/a.txt", "in/.ipynb_checkpoints/a.txt", "in/.git/x/b.txt", "in/sub/.c.txt"], ["in/a.txt"], {"hidden": 3},
    ),
    "a link to a hidden folder has a name": (["in/l -> .h", "in/.h/b.txt"], ["in/l/b.txt"], {"hidden": 1}),
    "endings in capitals": (["in/A.TXT", "in/c.jsonl.GZ", "in/d.Parquet"], ["in/A.TXT", "in/c.jsonl.GZ",
        "in/d.Parquet"], {}),
    "other endings": (
        ["in/a.txt", "in/b.json", "in/c.json.gz", "in/d.JSON.GZ", "in/README", "in/e.tar.gz", "in/f.gz",
            "in/g.txt.gz"], ["in/a.txt"],
        {".json.gz": 2, ".json": 1, "without an ending": 1, ".tar.gz": 1, ".gz": 1, ".txt.gz": 1},
    ),
    "folders without files": (["in/a.txt", "in/empty/", "in/deep/er/"], ["in/a.txt"], {}),
    "a folder called like a file": (["in/a.txt/b.txt", "in/c.parquet/"], ["in/a.txt/b.txt"], {}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_folder_stands_for(case: str, tmp_path: Path) -> None:
    names, expected, left_out = CASES[case]
    found = find_files([str(tree(tmp_path, *names) / "in")])
    assert [str(path.relative_to(tmp_path)) for path in found.paths] == expected
    assert found.left_out == Counter(left_out)


def test_a_hidden_folder_that_is_named_is_read(tmp_path: Path) -> None:
    tree(tmp_path, ".cache/a.txt", ".cache/.more/b.txt")
    assert names_of(tmp_path / ".cache", below=tmp_path) == [".cache/a.txt"]
    assert names_of(tmp_path / ".cache" / ".more" / "b.txt", below=tmp_path) == [".cache/.more/b.txt"]


def test_globs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree(
        tmp_path,
        "d/a.txt",
        "d/x/b.txt",
        "d/x/y/c.jsonl",
        "d/.h/e.txt",
        "d/x/loop -> ..",
        "d/x/again -> ../x",
        "o/f.txt",
        "d/l -> ../o",
        "n.md",
    )
    assert names_of(tmp_path / "d" / "*", below=tmp_path) == ["d/a.txt", "d/l/f.txt", "d/x/b.txt", "d/x/y/c.jsonl"]
    everything = ["d/a.txt", "d/l/f.txt", "d/x/b.txt", "d/x/y/c.jsonl"]
    assert names_of(tmp_path / "d" / "**", below=tmp_path) == everything
    assert names_of(tmp_path / "d" / "**" / "*.txt", below=tmp_path) == ["d/a.txt", "d/l/f.txt", "d/x/b.txt"]
    assert names_of(tmp_path / "*" / "**" / "y" / "*", below=tmp_path) == ["d/x/y/c.jsonl"]
    assert names_of(tmp_path / "d" / "**" / "x" / "**" / "*.jsonl", below=tmp_path) == ["d/x/y/c.jsonl"]
    monkeypatch.chdir(tmp_path)
    assert find_files(["**/*.txt"]).paths == [Path("d/a.txt"), Path("d/x/b.txt"), Path("o/f.txt")]
    assert find_files(["d/**"]).paths == [Path(name) for name in everything]
    (tmp_path / "a[1].txt").write_bytes(LINE)
    assert find_files(["a[1].txt"]).paths == [Path("a[1].txt")]
    for given in ("n.*", "*"):
        with pytest.raises(InputError, match=r"^n\.md: not a kind of file that is read"):
            find_files([given])


def test_circles_in_plenty_end(tmp_path: Path) -> None:
    """Python's own ** would go through two to the fortieth of these."""
    tree(
        tmp_path,
        "d/a/1.txt",
        *(f"d/{one}/{number} -> ../{two}" for number, (one, two) in enumerate([("a", "b"), ("b", "a")] * 8)),
    )
    assert (
        names_of(tmp_path / "d", below=tmp_path)
        == names_of(tmp_path / "d" / "**" / "*.txt", below=tmp_path)
        == ["d/a/1.txt"]
    )


def test_one_file_under_two_inputs(tmp_path: Path) -> None:
    tree(tmp_path, "a/x.txt", "b -> a", "c/y.txt -> ../a/x.txt")
    for inputs in (["a", "a"], ["a", "b"], ["a", "c"], ["a/x.txt", "a/../a/x.txt"], ["a", "a/*.txt"]):
        with pytest.raises(InputError, match=r"x\.txt twice.*; its documents would be doubled"):
            find_files([str(tmp_path / name) for name in inputs])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("in", r"no data files \(left out: \.json \(2\), hidden \(1\)\); give \.txt"),
        ("empty", "empty: no data files; give"),
        ("gone.txt", "gone.txt: a link to nowhere"),
        ("self.txt", "self.txt: a link to nowhere"),
        ("gone*", "gone.txt: a link to nowhere"),
        ("pipe.txt", "pipe.txt: a pipe or device"),
        ("in/**/*.txt", r"\*\.txt: no data files; give"),
        ("", "an empty name: no data files"),
        ("nothing" * 1000, "no data files"),
        ("nul\0", "no data files"),
    ],
)
def test_what_cannot_be_read_is_one_line(given: str, said: str, tmp_path: Path) -> None:
    tree(tmp_path, "in/a.json", "in/b.json", "in/.c.txt", "empty/", "gone.txt -> nothing", "self.txt -> self.txt")
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(InputError, match=said) as error:
        find_files([str(tmp_path / given) if given else given])
    assert "\n" not in str(error.value)


def test_pipes_in_a_folder_are_counted(tmp_path: Path) -> None:
    os.mkfifo(tree(tmp_path, "a.txt") / "pipe.txt")
    found = find_files([str(tmp_path)])
    assert names_of(tmp_path, below=tmp_path) == ["a.txt"] and found.left_out == {"pipes or devices": 1}


def test_json_lines_under_json_are_read_where_they_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(LINE)
    (tmp_path / "b.JSON.gz").write_bytes(gzip.compress(LINE))
    for given in ([str(tmp_path / "a.json"), str(tmp_path / "b.JSON.gz")], [str(tmp_path / "*.[jJ]*")]):
        assert [document.text for document, _ in FileSource(given, "text").documents(None)] == ["line"] * 2


def test_names_that_are_not_utf8_or_have_a_newline(tmp_path: Path) -> None:
    parquet = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({"text": ["row"]}), parquet)
    contents = {b"t\xff\n.txt": b"text", b"l\xff\n.jsonl": LINE, b"p\xff.parquet": parquet.getvalue().to_pybytes()}
    contents |= {b"g\xff.jsonl.GZ": gzip.compress(LINE), b"b\xff.jsonl.bz2": bz2.compress(LINE)}
    contents[b"z\xff.jsonl.zst"] = pyarrow.compress(LINE, "zstd", asbytes=True)
    for name, content in contents.items():
        Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), name))).write_bytes(content)
    source = FileSource([str(tmp_path)], "text")
    assert sorted(document.text for document, _ in source.documents(None)) == ["line"] * 4 + ["row", "text"]
    assert source.facts()["files"][0]["path"].endswith("b\\xff.jsonl.bz2")
    json.dumps(source.facts(), ensure_ascii=False).encode()  # so it can be read again


def test_a_file_that_vanishes_meanwhile(tmp_path: Path) -> None:
    source = FileSource([str(tree(tmp_path, "a.txt", "b.jsonl"))], "text")
    documents = source.documents(None)
    assert next(documents)
    (tmp_path / "b.jsonl").unlink()
    with pytest.raises(InputError, match=r"b\.jsonl: cannot be read"):
        next(documents)
    with pytest.raises(InputError, match=r"b\.jsonl: cannot be read \(No such file"):
        source.facts()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_a_folder_that_may_not_be_listed(tmp_path: Path) -> None:
    tree(tmp_path, "in/a.txt", "in/closed/b.txt")
    code = (
        "import os, sys; from hydra_mcore.corpus.folders import find_files; os.setuid(12345)\n"
        "try: find_files([sys.argv[1]])\nexcept Exception as error: print(type(error).__name__, error)"
    )
    for path in (tmp_path, *tmp_path.parents[:-2]):
        path.chmod(0o755)
    (tmp_path / "in" / "closed").chmod(0)
    run = subprocess.run([sys.executable, "-c", code, tmp_path / "in"], capture_output=True, text=True, check=True)
    assert (
        run.stdout.strip()
        == f"InputError {tmp_path / 'in' / 'closed'}: cannot be listed (Permission denied); make it readable, or leave"
        " it out"
    )


def test_random_trees_with_links_have_every_file_once(tmp_path: Path) -> None:
    """Against a search without any shortcut: through links, by real paths."""
    rng = random.Random(3)
    for number in range(40):
        top = tmp_path / str(number)
        folders = [top, top / "a", top / "b", top / "a" / "c", top / "b" / ".d"]
        for folder in folders:
            folder.mkdir()
        for file in range(6):
            (rng.choice(folders) / f"{rng.choice(['', '.'])}{file}.txt").write_bytes(LINE)
        for link in range(6):
            target = rng.choice([*folders, *top.rglob("*.txt")])
            (
                rng.choice(folders) / f"{rng.choice(['', '.'])}l{link}{target.suffix if target.is_file() else ''}"
            ).symlink_to(target)
        expected: set[str] = set()
        entered, todo = set(), [top]
        while todo:
            here = todo.pop()
            if (real := os.path.realpath(here)) in entered:
                continue
            entered.add(real)
            for path in here.iterdir():
                if not path.name.startswith("."):
                    todo += [path] if path.is_dir() else []
                    expected |= {os.path.realpath(path)} if path.is_file() else set()
        paths = find_files([str(top)]).paths if expected else []
        assert sorted(os.path.realpath(path) for path in paths) == sorted(expected)


@pytest.mark.slow
def test_a_hundred_thousand_files(tmp_path: Path) -> None:
    for number in range(100_000):
        path = tmp_path / str(number % 100) / f"{number}.{'txt' if number % 2 else 'json'}"
        path.parent.mkdir(exist_ok=True)
        path.touch()
    found = find_files([str(tmp_path)])
    assert len(found.paths) == 50_000 and found.paths == sorted(found.paths) and found.left_out == {".json": 50_000}


def test_the_command_says_what_it_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the facts of files without oddities are those of ever, so that data goes on being valid."""
    encode_in_this_process(monkeypatch)
    tree(tmp_path, "in/b.jsonl", "in/a-b/c.jsonl", "in/a/d.jsonl", "in/x.json", "in/.git/e.jsonl")
    flags = ["--tokenizer", str(TINY_TEACHER), "--out", str(tmp_path / "out"), "--workers", "1"]
    main(["--input", str(tmp_path / "in"), *flags])
    said = capsys.readouterr().out
    assert "left out of the folders: .json (1), hidden (1)\n" in said and "3 documents" in said
    files = json.loads((tmp_path / "out.json").read_text())["run"]["source"]["files"]
    as_ever = [path for path in sorted((tmp_path / "in").rglob("*.jsonl")) if ".git" not in path.parts]
    assert files == [{**file_facts(path), "path": str(path)} for path in as_ever]


def test_a_name_with_a_newline_does_not_break_the_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder := tmp_path / "a\nb\x1b[31m\udcff").mkdir()
    with pytest.raises(SystemExit) as stop:
        main(["--input", str(folder), "--tokenizer", str(TINY_TEACHER), "--out", str(tmp_path / "out")])
    assert stop.value.code == 2
    assert (
        capsys.readouterr().err
        == f"prepare_data: {tmp_path}/a\\nb\\x1b[31m\\udcff: no data files; give "
        + ".txt, .jsonl, .jsonl.gz, .jsonl.zst, .jsonl.bz2, .parquet files, globs or folders\n"
    )
