# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C, sent to a command's whole process group as a terminal does: one line, exit status 130, no lock and nothing
half-written.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from hydra_mcore.config import ModelCard
from hydra_mcore.heads import HeadMap
from tests.support.corpora import make_texts, write_lines
from tests.support.paths import ROOT, TINY_TEACHER

IMPORT = ("tools/convert.py", "import", "--hf", str(TINY_TEACHER), "--out", "OUT/teacher")


def begin(tmp_path: Path, *command: str) -> subprocess.Popen:
    words = [word.replace("OUT", str(tmp_path)) for word in command]
    heard = partial(signal.signal, signal.SIGINT, signal.default_int_handler)  # where a suite runs in the background
    with (tmp_path / "said").open("w") as said:
        return subprocess.Popen(
            [sys.executable, *words], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True, preexec_fn=heard,
        )  # fmt: skip


def wait(process: subprocess.Popen, come: Callable[[], object], tmp_path: Path) -> None:
    deadline = time.monotonic() + 250
    while not come():
        assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "said").read_text()[-3000:]
        time.sleep(0.005)


def interrupt(process: subprocess.Popen, tmp_path: Path, name: str, left: set[str] = frozenset()) -> None:
    os.killpg(process.pid, signal.SIGINT)
    status = process.wait(250)
    said = (tmp_path / "said").read_text()
    assert status == 130 and "Traceback" not in said and "KeyboardInterrupt" not in said, said[-3000:]
    assert [line for line in said.splitlines() if line.startswith(f"{name}: ")] == [f"{name}: stopped by Ctrl-C"]
    assert {path.name for path in tmp_path.iterdir()} - {"said"} == left


def loads(process: subprocess.Popen, library: str) -> bool:
    return library in Path(f"/proc/{process.pid}/maps").read_text()


TRAIN = ("-m", "hydra_mcore.train", "--stage", "align", "--run-dir", "OUT/run", "--teacher", "OUT/teacher")
VERIFY = ("tools/verify.py", "OUT/teacher")
SELECT = ("tools/select_heads.py", "--teacher", "OUT/teacher", "--out", "OUT/heads")
EVALUATE = (
    "tools/evaluate.py",
    "--models",
    "teacher=OUT/teacher",
    "--lengths",
    "64",
    "--no-text-loss",
    "--out",
    "OUT/evaluation",
)
pytestmark = pytest.mark.slow  # tests/unit/test_commands.py has the quick part


@pytest.mark.parametrize(
    ("name", "command"),
    [("train", TRAIN), ("convert", IMPORT), ("verify", VERIFY), ("select_heads", SELECT)],
)
@pytest.mark.parametrize("library", ["libtorch_cpu", "_multiarray_umath", "libarrow"])
def test_while_it_imports(tmp_path: Path, name: str, command: tuple[str, ...], library: str) -> None:
    process = begin(tmp_path, *command)
    try:
        wait(process, lambda: loads(process, library), tmp_path)
    except AssertionError:
        pytest.skip(f"{name} ends before it loads {library}")
    interrupt(process, tmp_path, name)


@pytest.mark.parametrize("moment", ["workers start", "work"])
def test_prepare_data_with_workers(tmp_path: Path, moment: str) -> None:
    write_lines(tmp_path / "in.jsonl", [text * 40 for text in make_texts()] * 20)
    command = (
        "tools/prepare_data.py",
        "--input",
        "OUT/in.jsonl",
        "--tokenizer",
        str(TINY_TEACHER),
        "--workers",
        "2",
        "--out",
        "OUT/out",
    )
    process = begin(tmp_path, *command, "--shard-tokens", "1e5")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    wait(
        process,
        lambda: len(children.read_text().split()) > 1 if moment == "workers start" else list(tmp_path.glob("*.idx")),
        tmp_path,
    )
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(250) == 130
    said = (tmp_path / "said").read_text()
    assert "Traceback" not in said and said.count("prepare_data: stopped by Ctrl-C") == 1, said[-3000:]
    left = {path.name for path in tmp_path.iterdir()}
    assert not {name for name in left if name.endswith((".lock", ".partial"))}, left


def test_convert_while_it_writes(tmp_path: Path) -> None:
    process = begin(tmp_path, *IMPORT)
    wait(process, lambda: (tmp_path / "teacher.lock").exists(), tmp_path)
    interrupt(process, tmp_path, "convert")


FIT = (
    "tools/convert.py",
    "hybridize",
    "--teacher",
    "OUT/teacher",
    "--head-map",
    "OUT/map.json",
    "--out",
    "OUT/student",
)
FIT += ("--start", "fitted", "--text", "OUT/text")
AT_WORK = {  # what a command has said when it is at work
    "select_heads": ((*SELECT, "--ratio", "3:1"), "receivers: "),
    "convert": (FIT, "fit: "),
    "verify": ((*VERIFY, "--hf", str(TINY_TEACHER)), "pass "),
}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", AT_WORK)
def test_while_it_works(tmp_path: Path, name: str) -> None:
    """What a command keeps, to go on with it, is whole."""
    assert begin(tmp_path, *IMPORT).wait(250) == 0
    card = ModelCard.load(tmp_path / "teacher").shape
    pairs = [(layer_idx, 0) for layer_idx in range(card.num_layers)]
    HeadMap.from_fa(pairs, card.num_layers, card.num_heads, card.num_kv_groups).save(tmp_path / "map.json")
    (tmp_path / "text").write_text("\n".join(make_texts() * 400))
    command, said = AT_WORK[name]
    process = begin(tmp_path, *command)
    wait(process, lambda: said in (tmp_path / "said").read_text(), tmp_path)
    interrupt(
        process, tmp_path, name, {"teacher", "map.json", "text"} | ({"heads"} if name == "select_heads" else set())
    )
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith((".lock", ".partial"))]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("ranks", [1, 2])
def test_evaluation_on_several_ranks(tmp_path: Path, ranks: int) -> None:
    assert begin(tmp_path, *IMPORT).wait(250) == 0
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)) if ranks > 1 else ()
    process = begin(tmp_path, *launcher, *EVALUATE)
    wait(process, lambda: (tmp_path / "evaluation").exists() and list((tmp_path / "evaluation").iterdir()), tmp_path)
    os.killpg(process.pid, signal.SIGINT)
    status = process.wait(250)
    said = (tmp_path / "said").read_text()
    assert said.count("evaluate: stopped by Ctrl-C") == 1 and (status == 130 or ranks > 1), said[-3000:]
    traces = [
        block
        for block in said.split("Traceback (most recent call last):")[1:]
        if "torch/distributed/run.py" not in block
    ]
    assert not traces, said[-3000:]  # torchrun shows its own
