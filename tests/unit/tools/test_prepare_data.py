# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""tools/prepare_data.py: killed, given what it cannot use, as documented."""

import gzip
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hydra_mcore.corpus.manifest import Manifest
from tests.support.corpora import encode_in_this_process, make_texts, write_lines, written
from tests.support.paths import ROOT, TINY_TEACHER
from tools.benchmark import main as benchmark
from tools.prepare_data import main, parser

BROKEN = {
    "not JSON": b'{"text": "cut off',
    "not UTF-8": b'{"text": "\xff\xfe"}',
    "no text under 'text'": b'{"txt": "x"}',
    "half of a surrogate pair": b'{"text": "\\ud800"}',
    "empty": b'{"text": " "}',
}


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return make_texts()


@pytest.fixture
def serial(monkeypatch: pytest.MonkeyPatch) -> None:
    encode_in_this_process(monkeypatch)


def test_kill_9_of_the_command_ends_its_workers_and_it_goes_on(tmp_path: Path, texts: list[str]) -> None:
    write_lines(tmp_path / "in.jsonl", [text * 40 for text in texts] * 4)
    flags = [
        "--input",
        str(tmp_path / "in.jsonl"),
        "--tokenizer",
        str(TINY_TEACHER),
        "--shard-tokens",
        "2e5",
        "--tokens",
        "1e6",
    ]
    main([*flags, "--workers", "2", "--out", str(tmp_path / "out-whole")])
    (tmp_path / "cut").mkdir()
    command = [
        sys.executable,
        "tools/prepare_data.py",
        *flags,
        "--workers",
        "1",
        "--out",
        str(tmp_path / "cut" / "out-whole"),
    ]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL) as process:
        while len(list((tmp_path / "cut").glob("*.idx"))) < 2:
            assert process.poll() is None
            time.sleep(0.01)
        workers = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
        process.kill()
    assert workers
    deadline = time.monotonic() + 20
    while any(
        Path(f"/proc/{pid}").exists() and "(zombie)" not in Path(f"/proc/{pid}/status").read_text() for pid in workers
    ):
        assert time.monotonic() < deadline, "a worker outlives the command"
        time.sleep(0.05)
    assert (tmp_path / "cut" / "out-whole.unfinished.json").exists()
    main([*flags, "--workers", "2", "--out", str(tmp_path / "cut" / "out-whole")])
    assert written(tmp_path / "cut") == written(tmp_path)


@pytest.mark.parametrize("fault", BROKEN)
def test_broken_lines_are_named_and_skipped_only_when_asked(
    fault: str, tmp_path: Path, serial: None, capsys: pytest.CaptureFixture[str]
) -> None:
    good = b'{"text": "a good line"}\n'
    (tmp_path / "in.jsonl").write_bytes(b"\xef\xbb\xbf" + good + BROKEN[fault] + b"\n" + good + BROKEN[fault])
    flags = [
        "--input",
        str(tmp_path / "in.jsonl"),
        "--tokenizer",
        str(TINY_TEACHER),
        "--out",
        str(tmp_path / "out"),
        "--workers",
        "1",
    ]
    assert (
        refusal(capsys, *flags)
        == f"prepare_data: {tmp_path / 'in.jsonl'}, line 2: {fault}; fix it, or leave such documents out with"
        " --skip-broken"
    )
    assert not list(tmp_path.glob("out*.json"))
    main([*flags, "--skip-broken"])
    manifest = Manifest.load(tmp_path / "out.json")
    assert (manifest.documents, manifest.skipped) == (2, {fault: 2})
    assert f"2 left out: {fault}" in capsys.readouterr().out


def refusal(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    """The one line of a command that must end with exit status 2; a progress bar may stand before it."""
    with pytest.raises(SystemExit) as stop:
        main(list(flags))
    said = [
        line
        for line in capsys.readouterr().err.replace("\r", "\n").splitlines()
        if line and not line.startswith("prepare: ")
    ]
    assert stop.value.code == 2 and len(said) == 1, said
    return said[0]


@pytest.mark.parametrize(
    ("files", "flags", "said"),
    [
        ({}, "--input {}/nowhere", "nowhere: No such file"),
        ({"empty/x.csv": b"1"}, "--input {}/empty", "empty: no data files"),
        ({"a.csv": b"1"}, "--input {}/a.csv", "a.csv: not a kind of file that is read"),
        ({"a.txt": b"1"}, "--input {}/a.txt {}/*.txt", "a.txt twice"),
        ({"a.txt": b""}, "--input {}/a.txt", "a.txt: empty; fix it"),
        ({"a.txt": b"x\xff"}, "--input {}/a.txt", "a.txt: not UTF-8; fix it"),
        ({"a.txt": b""}, "--input {}/a.txt --skip-broken", "out/data: skipped: {'empty': 1}"),
        ({"a.txt": b"1"}, "--input {}/a.txt --held-out 9", "out/data: the first 9 are held out (--held-out)"),
        ({"a.parquet": b"PAR1"}, "--input {}/a.parquet", "a.parquet: cannot be read"),
        ({"a.jsonl.gz": gzip.compress(b"{}" * 99)[:20]}, "--input {}/a.jsonl.gz", "a.jsonl.gz: cannot be read"),
        ({"a.txt": b"x"}, "--input {}/a.txt --tokenizer {}", "tokenizer"),
        ({"a.txt": b"x"}, "--input {}/a.txt --eod nonsense", "'nonsense' is"),
        (
            {"a.txt": b"x", "config.json": b'{"vocab_size": 1000}'},
            "--input {}/a.txt --model {}",
            "the tokenizer has 1024 words, model",
        ),
        ({"a.txt": b"x"}, "--input {}/a.txt --model {}", "no model.json and no config.json"),
        ({"a.txt": b"x"}, "--input {}/a.txt --min-tokens 9 --max-tokens 8", "--max-tokens 8 is below --min-tokens 9"),
        ({"a.txt": b"x"}, "--input {}/a.txt --dataset-config x", "belong to --dataset"),
        ({"a.txt": b"x"}, "--input {}/a.txt --out {}/a.txt/out", "a.txt: File exists; fix that"),
        (
            {},
            "--dataset nobody/nothing",
            "dataset nobody/nothing: no such folder, and the hub is not asked (HF_HUB_OFFLINE",
        ),
        ({"set/a.parquet": b"PAR1"}, "--dataset {}/set", "set: "),
        ({"set/a.jsonl": b'{"text": "x"}\n{"te'}, "--dataset {}/set", "set: the stream broke off"),
        ({"set/a.jsonl": b'{"txt": "x"}\n'}, "--dataset {}/set", "set, split train, document 1: no text under 'text'"),
        ({"set/a.jsonl": b'{"text": "x"}\n'}, "--dataset {}/set --split test", "set: cannot be opened"),
        (
            {"recipe.yaml": b"prepare: {inptu: x}"},
            "--config {}/recipe.yaml",
            "unknown key 'inptu'; did you mean 'input'?",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_is_one_line(
    files: dict[str, bytes], flags: str, said: str, tmp_path: Path, serial: None, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    given = flags.replace("{}", str(tmp_path)).split()
    defaults = {"--tokenizer": str(TINY_TEACHER), "--out": str(tmp_path / "out" / "data"), "--workers": "1"}
    line = refusal(
        capsys, *given, *(word for flag, value in defaults.items() if flag not in given for word in (flag, value))
    )
    assert line.startswith("prepare_data: ") and said in line
    assert not list((tmp_path / "out").glob("*.json"))


def test_dry_run_writes_nothing(tmp_path: Path, texts: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    write_lines(tmp_path / "in.jsonl", texts)
    (tmp_path / "recipe.yaml").write_text(
        f"prepare: {{input: [{tmp_path / 'in.jsonl'}], tokenizer: {TINY_TEACHER}, out: {tmp_path / 'x' / 'out'}, "
        "tokens: 15e9}\n"
    )
    main(["--config", str(tmp_path / "recipe.yaml"), "--model", str(TINY_TEACHER), "--dry-run"])
    said = capsys.readouterr().out
    assert "1024 words, end of document 0, stored as uint16" in said and "1.5e+10 tokens, 0 of them done" in said
    assert not (tmp_path / "x").exists()


def test_documented_commands(tmp_path: Path) -> None:
    """The tiny example runs as written; the commands that need a network have flags that exist."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", (ROOT / "docs" / "data.md").read_text(), re.DOTALL | re.MULTILINE)
    commands = [block.replace("\\\n", " ") for language, block in blocks if not language]
    assert len(commands) == 3 and all("tools/prepare_data.py" in command for command in commands)
    for command in commands[1:]:
        assert parser().parse_args(shlex.split(command)[2:]).dataset == "HuggingFaceFW/fineweb-edu"
    here = commands[0].replace("python ", f"{sys.executable} ").replace("runs/data", str(tmp_path))
    subprocess.run(
        ["bash", "-ec", here], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True, timeout=200
    )
    assert 10**6 <= Manifest.load(tmp_path / "python.json").tokens < 1.2 * 10**6


@pytest.mark.slow
def test_benchmark_measures_speed_and_memory(capsys: pytest.CaptureFixture[str]) -> None:
    benchmark(["data", "--megabytes", "1", "--repeats", "1", "--workers", "1", "--tokenizers", str(TINY_TEACHER)])
    cells = [cell.strip() for cell in capsys.readouterr().out.splitlines()[-1].strip("|").split("|")]
    assert cells[0] == "1024" and int(cells[1]) > 10**6
    assert int(cells[4].removesuffix("%")) > 40  # a machine with other work; docs/data.md has what a quiet one gives
    assert int(cells[6]) - int(cells[5]) < 30, "memory grows with the corpus"
