# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The OpenAI server with a tokenizer: a client of it, and the project's own evaluation and proofs through it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
TINY = Path(__file__).parent / "references" / "tiny"
PROJECT = REPOSITORY / ".venv" / "bin" / "python"
WAIT_S = 240


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(TINY / "export", tmp_path_factory.mktemp("server") / "log.txt") as address:
        yield address


@contextmanager
def serving(export: Path, log: Path) -> Iterator[str]:
    """The address of a server of an export, in float32."""
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(export)]
    command += ["--dtype", "float32", "--host", "127.0.0.1", "--port", str(port), "--enforce-eager"]
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with log.open("w") as sink:
        server = subprocess.Popen(command, env=environment, stdout=sink, stderr=sink)
    address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + WAIT_S
    try:
        while not healthy(address):
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.5)
        yield f"{address}/v1"
    finally:
        server.terminate()
        server.wait(60)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def healthy(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


def complete(url: str, **asked: Any) -> dict[str, Any]:
    body = {"model": str(TINY / "export"), "temperature": 0, "max_tokens": 12, **asked}
    request = urllib.request.Request(
        f"{url}/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)["choices"][0]


def project(*words: object) -> subprocess.CompletedProcess:
    """One of the project's own commands, in its own environment: importing vLLM sets variables of torch."""
    environment = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR", "LANG") if name in os.environ}
    call = [str(PROJECT), *map(str, words)]
    return subprocess.run(call, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=400)


def test_a_client_gets_what_it_asks_for(url: str) -> None:
    greedy = complete(url, prompt="The value of", logprobs=2)
    assert greedy["finish_reason"] == "length" and len(greedy["logprobs"]["tokens"]) == 12
    assert all(len(best) >= 2 for best in greedy["logprobs"]["top_logprobs"])
    end = greedy["text"][4:7]
    stopped = complete(url, prompt="The value of", stop=[end])
    assert (
        stopped["finish_reason"] == "stop" and greedy["text"].startswith(stopped["text"]) and end not in stopped["text"]
    )
    sampled = [complete(url, prompt="The value of", temperature=1.5, seed=seed)["text"] for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]


def test_evaluation_through_the_server_is_evaluation_of_the_export(url: str, tmp_path: Path) -> None:
    text = " ".join(path.read_text() for path in sorted((REPOSITORY / "docs").glob("*.md")))
    (tmp_path / "text.txt").write_text(text[:40_000])
    models = [f"direct={TINY / 'export'}", f"served={url}", f"teacher={TINY / 'teacher'}"]
    asked = ["--tasks", "niah_single_1", "niah_multivalue", "--lengths", 192, "--prompts", 6]
    to = ["--text", tmp_path / "text.txt", "--out", tmp_path / "report"]
    done = project("tools/evaluate.py", "--models", *models, *asked, *to)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "report" / "results.json").read_text())["models"]
    scores = [[task["correct"] for task in found[name]["tasks"]] for name in ("direct", "served")]
    assert scores[0] == scores[1]
    direct, served = (found[name]["text"][0] for name in ("direct", "served"))
    assert served["nll"] == pytest.approx(direct["nll"], rel=1e-5)
    assert served["agreement"]["share"] > 0.999
    again = project("tools/evaluate.py", "--models", models[1], *asked, *to, "--dry-run")
    assert "0 of 3 pieces to run" in again.stdout, again.stdout + again.stderr


def test_the_server_is_proven_to_serve_the_export(url: str) -> None:
    proof = ["--export", TINY / "export", "--served", url, "--only", "served", "--length", 96]
    done = project("tools/verify.py", TINY / "student", *proof)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "64 of 64 greedy tokens" in done.stdout and "1 passed, 0 failed" in done.stdout


@pytest.mark.parametrize(
    ("checkpoint", "export"),
    [("demo/selected-3to1/extend", "demo/selected-3to1/hf"), ("smollm2/align", "smollm2/export")],
    ids=["make demo", "make real"],
)
def test_trained_students_are_served_as_they_are(checkpoint: str, export: str, tmp_path: Path) -> None:
    """Of those runs that are here."""
    runs = REPOSITORY / "runs"
    if not (runs / export / "config.json").exists():
        pytest.skip(f"runs/{export} is not there")
    with serving(runs / export, tmp_path / "log.txt") as address:
        proof = ["--export", runs / export, "--served", address, "--only", "served"]
        done = project("tools/verify.py", runs / checkpoint, *proof)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "64 of 64 greedy tokens" in done.stdout


def test_what_a_server_cannot_do_is_one_line(url: str, tmp_path: Path) -> None:
    asked = ["--tasks", "niah_single_1", "--lengths", 192, "--prompts", 2, "--no-text-loss"]
    asked += ["--out", tmp_path / "report"]
    for words, said in (
        ([f"served={url}", "--yarn", "served=2"], "a server's model is as it is; leave --yarn out"),
        ([url], "give the server's model a name, as in NAME=http://"),
        ([f"served={url.replace('/v1', '/v2')}"], "the server refuses (404:"),
    ):
        done = project("tools/evaluate.py", "--models", *words, *asked)
        assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1, done.stderr
