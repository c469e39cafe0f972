# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Datasets, tokenizers and models of the hub: asked late, with an end, and every error of it one line."""

from __future__ import annotations

import http.server
import json
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import fsspec.exceptions
import huggingface_hub
import pytest
import requests
from datasets.exceptions import DatasetGenerationError
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import filter_repo_objects

from hydra_mcore.corpus import hub, sources, tokenize
from hydra_mcore.corpus.hub import model_folder
from hydra_mcore.corpus.manifest import Manifest
from hydra_mcore.corpus.sources import DatasetSource
from hydra_mcore.corpus.tokenize import load_fast_tokenizer
from hydra_mcore.errors import InputError
from tests.support.corpora import encode_in_this_process, make_texts, write_lines
from tests.support.paths import TINY_TEACHER
from tools.prepare_data import main

HTTP_ERROR = HfHubHTTPError.__mro__[1]  # of the library that this huggingface_hub takes: httpx, then httpx2
ERRORS = [
    HTTP_ERROR("refused"), HTTP_ERROR("two\nlines"), requests.ConnectionError("refused"),
    aiohttp.ClientPayloadError("cut off"),
    TimeoutError(), fsspec.exceptions.FSTimeoutError(), OSError(5, "broken"), DatasetGenerationError("broken"),
    KeyError("id"), TypeError("NoneType"), RuntimeError("the client has been closed"), json.JSONDecodeError("x", "", 0),
]  # fmt: skip
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The hub's client as users have it, with an empty cache; tests have it offline."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def never_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked() -> str:
        raise AssertionError("the hub was asked")

    for module in (hub, sources, tokenize):
        monkeypatch.setattr(module, "unreachable", asked)


def use_endpoint(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix(constants.ENDPOINT)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + path)
    monkeypatch.setattr(constants, "ENDPOINT", url)


def answering(status: int, body: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub that answers everything alike."""

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    use_endpoint(f"http://127.0.0.1:{server.server_port}", monkeypatch)


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A port that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as port:
        use_endpoint(f"http://127.0.0.1:{port.getsockname()[1]}", monkeypatch)
        monkeypatch.setattr(hub, "ANSWER", 0.5)
        yield


def refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as port:
        use_endpoint(f"http://127.0.0.1:{port.getsockname()[1]}", monkeypatch)


def complaint(*flags: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        main([*flags, "--workers", "1"])
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("prepare_data: ")]
    assert stop.value.code == 2 and len(said) == 1
    return said[0]


MISSING = [
    "./gone",
    "../gone",
    "/gone",
    "/gone/x",
    "~/gone",
    "a/b/c",
    "a/",
    "runs\\gone",
    "",
    "a b",
    "x" * 5000,
    "a\nb",
    "a..b/c",
    "-a",
]


@pytest.mark.parametrize("name", MISSING)
def test_a_folder_that_is_missing_is_said_at_once(name: str, never_asked: None) -> None:
    for load in (
        lambda: DatasetSource(name, None, "train", None, "text"),
        lambda: load_fast_tokenizer(name),
        lambda: model_folder(name),
    ):
        with pytest.raises(InputError, match="no such folder, and no name on the hub"):
            load()


def test_a_file_is_no_dataset(tmp_path: Path, never_asked: None) -> None:
    (tmp_path / "a.jsonl").write_text("{}")
    with pytest.raises(InputError, match=r"a\.jsonl: is a file; give its folder"):
        DatasetSource(str(tmp_path / "a.jsonl"), None, "train", None, "text")


@pytest.mark.parametrize("way", ["refused", "silent", "offline", "no such host"])
def test_without_a_network_the_line_comes_within_seconds(
    way: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "a.txt").write_text("x")
    said = "the hub does not answer"
    if way == "offline":
        said = "the hub is not asked (HF_HUB_OFFLINE is set)"
    else:
        request.getfixturevalue("online")
        monkeypatch.setattr(hub, "ANSWER", 2)
    if way == "silent":
        request.getfixturevalue("silent")
    elif way == "refused":
        refused(monkeypatch)
    elif way == "no such host":
        use_endpoint("http://nowhere.invalid", monkeypatch)
    out = ("--out", str(tmp_path / "out"))
    start = time.monotonic()
    assert said in complaint("--dataset", "nobody/nothing", "--tokenizer", str(TINY_TEACHER), *out, capsys=capsys)
    line = complaint("--input", str(tmp_path / "a.txt"), "--tokenizer", "nobody/nothing", *out, capsys=capsys)
    assert said in line and line.endswith("give a folder with its files")
    assert time.monotonic() - start < 30
    assert not list(tmp_path.glob("out*.json"))


ANSWERS = [
    (401, b"{}"),
    (403, b"{}"),
    (404, b"{}"),
    (429, b"{}"),
    (500, b"oops"),
    (503, b""),
    (200, b"<html>log in</html>"),
    (200, b"{}"),
    (200, b"[]"),
]


@pytest.mark.parametrize(("status", "body"), ANSWERS)
def test_whatever_a_hub_answers_is_one_line(
    status: int,
    body: bytes,
    online: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    answering(status, body, monkeypatch)
    flags = ("--dataset", "nobody/nothing", "--tokenizer", str(TINY_TEACHER), "--out", str(tmp_path / "out"))
    assert "dataset nobody/nothing: cannot be opened (" in complaint(*flags, capsys=capsys)


@pytest.mark.parametrize(
    ("status", "body"),
    [pytest.param(*answer, marks=[] if answer[0] == 401 else pytest.mark.slow) for answer in ANSWERS],
)
def test_whatever_a_hub_answers_for_a_tokenizer_is_one_line(
    status: int, body: bytes, online: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answering(status, body, monkeypatch)
    with pytest.raises(InputError, match=r"tokenizer nobody/nothing: does not load \(.*\); give a folder") as error:
        load_fast_tokenizer("nobody/nothing")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__module__ + "." + type(error).__name__)
def test_every_librarys_error_is_one_line(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    class Breaking:
        def state_dict(self) -> dict:
            return {}

        def __iter__(self) -> Iterator[dict[str, str]]:
            yield {"text": "one"}
            raise error

    def raising(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(sources, "unreachable", lambda: "")
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", raising)
    monkeypatch.setattr("datasets.load_dataset", raising)
    source = DatasetSource("nobody/nothing", None, "train", None, "text")
    for act in (source.facts, lambda: next(source.documents(None))):
        with pytest.raises(InputError, match="dataset nobody/nothing: cannot be opened") as said:
            act()
        assert "\n" not in str(said.value)
    source.__dict__["_stream"] = Breaking()
    documents = source.documents(None)
    assert next(documents)[0].text == "one"
    with pytest.raises(InputError, match="dataset nobody/nothing: the stream broke off") as said:
        next(documents)
    assert "\n" not in str(said.value)


def begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command of finished data whose manifest says that it is of the hub."""
    encode_in_this_process(monkeypatch)
    (tmp_path / "set").mkdir()
    write_lines(tmp_path / "set" / "a.jsonl", make_texts())
    rest = [
        "--tokenizer",
        str(TINY_TEACHER),
        "--out",
        str(tmp_path / "out"),
        "--workers",
        "1",
        "--shard-tokens",
        "3000",
    ]
    main(["--dataset", str(tmp_path / "set"), *rest])
    manifest = Manifest.load(tmp_path / "out.json")
    manifest.run["source"] = {
        "dataset": "nobody/nothing",
        "config": None,
        "split": "train",
        "revision": COMMIT,
        "text_key": "text",
    }
    manifest.save(tmp_path / "out.json")
    return ["--dataset", "nobody/nothing", *rest]


def test_finished_data_needs_no_hub(
    tmp_path: Path, never_asked: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = begun(tmp_path, monkeypatch)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("out*")}
    capsys.readouterr()
    for more in ([], ["--revision", COMMIT]):
        main([*command, *more])
        assert capsys.readouterr().out.startswith(f"{tmp_path / 'out'}.json: ")
    assert {path.name: path.read_bytes() for path in tmp_path.glob("out*")} == before
    for more, said in [
        (["--split", "test"], "source.split is 'train' there, 'test' here"),
        (["--revision", COMMIT[::-1]], "source.revision is"),
        (["--tokens", "9"], "limits.tokens is None there, 9 here"),
    ]:
        assert said in complaint(*command, *more, capsys=capsys)
    (tmp_path / "out-00001.bin").write_bytes(b"")
    assert "out-00001.bin: has 0 bytes" in complaint(*command, capsys=capsys)


def test_finished_data_from_elsewhere_are_taken_as_they_are(
    tmp_path: Path, never_asked: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With --skip-existing: a tokenizer that nobody has here, a dataset of the hub, or text that is not here."""
    command = [*begun(tmp_path, monkeypatch), "--tokenizer", "nobody/tokenizer", "--skip-existing"]
    capsys.readouterr()
    main(command)
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'out'}.json: is there already, ")
    for more, said in [
        (["--dataset-config", "other"], "source.config is None there, 'other' here"),
        (["--revision", COMMIT[::-1]], "source.revision is"),
        (["--tokens", "9"], "limits.tokens is None there, 9 here"),
    ]:
        assert said in complaint(*command, *more, capsys=capsys)
    (tmp_path / "out-00001.bin").write_bytes(b"")
    assert "out-00001.bin: has 0 bytes" in complaint(*command, capsys=capsys)


def test_data_that_was_begun_goes_on_at_its_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the hub has moved on meanwhile: it is asked for documents of the commit that is noted, and for no other."""
    command = begun(tmp_path, monkeypatch)
    (tmp_path / "out.json").rename(tmp_path / "out.unfinished.json")
    asked = []
    monkeypatch.setattr(sources, "unreachable", lambda: "")
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: asked.append(kwargs["revision"]) or [])
    main(command)
    assert asked == [COMMIT]


def cached(name: str, cache: Path, *left_out: str) -> Path:
    """The tiny teacher in a cache, as huggingface_hub lays a model out; returns its folder."""
    here = cache / f"models--nobody--{name}"
    (here / "refs").mkdir(parents=True)
    (here / "refs" / "main").write_text(COMMIT)
    return shutil.copytree(TINY_TEACHER, here / "snapshots" / COMMIT, ignore=shutil.ignore_patterns(*left_out))


def test_a_model_is_a_folder_or_in_the_cache(
    online: None, silent: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = cached("model", tmp_path / "cache")
    cached("tokenizer", tmp_path / "cache", "*.safetensors")
    assert model_folder(TINY_TEACHER) == TINY_TEACHER
    start = time.monotonic()
    assert model_folder("nobody/model") == here
    for name in ("nobody/nothing", "nobody/tokenizer"):
        with pytest.raises(InputError, match=f"^model {name}: neither a folder nor in the cache, and the hub") as e:
            model_folder(name)
        assert str(e.value).endswith("give a local directory") and "\n" not in str(e.value)
    assert time.monotonic() - start < 20
    answering(401, b"{}", monkeypatch)
    with pytest.raises(InputError, match=r"model nobody/nothing: cannot be downloaded \(.*\); give a local directory"):
        model_folder("nobody/nothing")


def test_a_model_of_the_hub_comes_without_code(online: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library is asked for weights, settings and tokenizer alone."""
    asked: dict[str, object] = {}
    monkeypatch.setattr(hub, "unreachable", lambda: "")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **rest: asked.update(rest) or str(tmp_path))
    assert model_folder("nobody/model") == tmp_path and not asked["local_files_only"]
    names = ["model-1-of-2.safetensors", "config.json", "tokenizer.json", "modeling.py", "pytorch_model.bin"]
    assert [*filter_repo_objects(names, allow_patterns=asked["allow_patterns"])] == names[:3]


def test_a_tokenizer_in_the_cache_needs_no_hub(online: None, silent: None, tmp_path: Path) -> None:
    cached("tokenizer", tmp_path / "cache", "*.safetensors")
    start = time.monotonic()
    assert load_fast_tokenizer("nobody/tokenizer").get_vocab() == load_fast_tokenizer(TINY_TEACHER).get_vocab()
    assert time.monotonic() - start < 20


def test_linked_folders_that_datasets_does_not_read_are_said(tmp_path: Path, never_asked: None) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "more").mkdir()
    (tmp_path / "set" / "link").symlink_to("../more")
    found = DatasetSource(str(tmp_path / "set"), None, "train", None, "text").left_out
    assert found == {"linked folders, which datasets does not follow": 1}
