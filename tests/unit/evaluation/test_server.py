# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Addresses where no server of vLLM is; one that is stands in serving/tests/test_server.py."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch

from hydra_mcore.evaluation.loading import describe
from hydra_mcore.evaluation.models import repeat_stop
from hydra_mcore.evaluation.server import ServerError


@pytest.fixture
def other_software() -> Iterator[tuple[str, list[bytes]]]:
    """An address, and what it answers everything with."""
    answers = [b""]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(answers[0])

        def log_message(self, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/v1", answers
        server.shutdown()
        thread.join()


def test_nobody_there() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(ServerError, match=rf"^{url}: no answer \(.*\); is the server up\?$"):
        describe(url)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b"<html>", "answers with something else than JSON"),
        (b"[1]", "answers with a list"),
        (b"{}", "names no model"),
        (b'{"data": [{"id": "m", "root": "/no/such/folder"}]}', "serves '/no/such/folder', which is no folder here"),
    ],
)
def test_other_software(other_software: tuple[str, list[bytes]], answer: bytes, said: str) -> None:
    url, answers = other_software
    answers[0] = answer
    with pytest.raises(ServerError) as refused:
        describe(url)
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_a_server_says_which_folder_it_serves(
    other_software: tuple[str, list[bytes]], tiny_teacher: Path, tmp_path: Path
) -> None:
    """Its model is another than the folder's own, since another engine answers."""
    url, answers = other_software
    answers[0] = f'{{"data": [{{"id": "m", "root": "{tiny_teacher}"}}]}}'.encode()
    here, there = describe(tiny_teacher), describe(url)
    assert there.url == url and here.url == "" and there.vocab_size == here.vocab_size
    assert there.fingerprint != here.fingerprint and there.folder == here.folder
    with pytest.raises(ServerError, match="leave --yarn out"):
        describe(url, 2.0)


def test_behind_a_stop_it_is_repeated() -> None:
    found = repeat_stop(torch.tensor([[5, 2, 7, 3], [4, 4, 4, 4]]), frozenset({2, 3}))
    assert found.tolist() == [[5, 2, 2, 2], [4, 4, 4, 4]]
