# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""tools/doctor.py on several nodes: processes under the variables that torchrun sets, one for each node."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from tools.doctor import meeting, nodes
from tools.doctor.lines import Line, ok
from tools.doctor.meeting import Peer, Place


def start(
    node: int, num_nodes: int, port: int, *flags: str, ranks_per_node: int = 1, local_rank: int = 0, **env: str
) -> subprocess.Popen[str]:
    """One process of a launch, as torchrun would start it; ``port`` tells launches apart."""
    variables = {
        "RANK": node * ranks_per_node + local_rank,
        "WORLD_SIZE": num_nodes * ranks_per_node,
        "LOCAL_RANK": local_rank,
        "LOCAL_WORLD_SIZE": ranks_per_node,
        "GROUP_RANK": node,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": 1,
    }
    return subprocess.Popen(
        [sys.executable, str(ROOT / "tools" / "doctor.py"), *flags],
        env={**os.environ, **{name: str(value) for name, value in variables.items()}, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(*processes: subprocess.Popen[str]) -> list[tuple[int, str, str]]:
    """Exit status, output and errors of each."""
    said = [process.communicate(timeout=100) for process in processes]
    return [(process.returncode, *texts) for process, texts in zip(processes, said, strict=True)]


def lines_of(report: Path, topic: str) -> dict[str, tuple[str, str]]:
    return {
        line["what"]: (line["verdict"], line["found"])
        for line in json.loads(report.read_text())["lines"]
        if line["topic"] == topic
    }


@pytest.fixture
def port() -> Iterator[int]:
    """A number that no other launch has at the same time."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_two_nodes_meet_though_a_port_is_taken(tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # which the run folder is unless given
    report = tmp_path / "report.json"
    flags = ("--only", "machine", "nodes", "--limit", "60", "--json", str(report))
    token = f"127.0.0.1:{port}:"
    with socket.create_server(("", meeting.candidates(token)[0])):  # a stranger, who says nothing
        first, second, idle = ended(
            start(0, 2, port, *flags, ranks_per_node=2),
            start(1, 2, port, *flags, ranks_per_node=2),
            start(1, 2, port, *flags, ranks_per_node=2, local_rank=1),
        )
    assert (first[0], second, idle) == (0, (0, "", ""), (0, "", "")), first
    found = lines_of(report, "nodes")
    assert list(found) == ["nodes", "shared filesystem", "locks between nodes", "all-reduce"]
    assert {verdict for verdict, _ in found.values()} == {"ok"}
    assert found["nodes"][1] == f"all 2 met at 127.0.0.1:{meeting.candidates(token)[1]}"
    assert found["all-reduce"][1].startswith("gloo, 2 processes")
    assert first[1].splitlines()[-1] == "CPU only on each of 2 nodes: the tiny example and the tests; no GPU"
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


@pytest.mark.slow
def test_nodes_that_differ(tmp_path: Path, port: int) -> None:
    report, own, other, bin_folder = (tmp_path / name for name in ("report.json", "own", "other", "bin"))
    for folder in (own, other, bin_folder):
        folder.mkdir()
    (bin_folder / "nvidia-smi").write_text("#!/bin/sh\necho NVIDIA H200, 9.0, 580.65, 143771, 4, 0\n")
    (bin_folder / "nvidia-smi").chmod(0o755)
    flags = ("--only", "GPU", "nodes", "--limit", "16", "--json", str(report))
    first, second = ended(
        start(0, 2, port, *flags, "--run-dir", str(own)),
        start(1, 2, port, *flags, "--run-dir", str(other), PATH=f"{bin_folder}:{os.environ['PATH']}"),
    )
    assert (first[0], second[0]) == (1, 0), (first, second)
    found = lines_of(report, "nodes")
    verdict, text = found["same everywhere"]
    assert verdict == "fail" and "GPUs: none on node 0, 1 x NVIDIA H200, 140 GiB" in text
    verdict, text = found["shared filesystem"]
    assert verdict == "fail" and "node 1 (No such file or directory" in text
    verdict, text = lines_of(report, "GPU")["torch"]  # on the node without GPUs it is as it should be
    assert verdict == "fail" and text.startswith("node 1: ") and "sees no GPU: CUDA_VISIBLE_DEVICES is empty" in text


def test_a_node_that_does_not_come_is_named(tmp_path: Path, port: int) -> None:
    begun = time.monotonic()
    first, third = ended(
        *(
            start(node, 3, port, "--only", "machine", "--limit", "6", "--json", str(tmp_path / "report.json"))
            for node in (0, 2)
        )
    )
    assert (first[0], third[0]) == (1, 0) and time.monotonic() - begun < 60
    assert lines_of(tmp_path / "report.json", "nodes") == {"nodes": ("fail", "no answer within 6 s from node 1")}


def test_a_first_node_that_does_not_come(port: int) -> None:
    ((status, output, errors),) = ended(start(1, 2, port, "--limit", "1"))
    assert (status, output, errors) == (1, "", "doctor: node 1 cannot reach the first node at 127.0.0.1\n")


def other_end(sock: socket.socket, *answers: object) -> None:
    peer = Peer(sock)
    for value in answers:
        if peer.receive(5) is None:
            return
        peer.send(value() if callable(value) else value)
    sock.close()


def test_a_node_that_dies_during_its_report() -> None:
    here, there = socket.socketpair()
    line = {"verdict": "ok", "what": "CPUs", "found": "8", "fix": ""}
    threading.Thread(target=other_end, args=(there, {"topic": "machine", "line": line}), daemon=True).start()
    peer = Peer(here)
    peer.send({"ask": "report"})
    first, broken = nodes.reported(peer, 5)
    assert first == ("machine", ok("CPUs", "8"))
    assert (broken[1].verdict, broken[1].what) == ("fail", "report")
    between = nodes.between({1: peer}, Place(num_nodes=2), Path("/none"), {}, "gloo", 5)
    assert [check.name for check in between] == ["same everywhere"]  # nothing more is asked of it


def test_versions_of_nodes() -> None:
    def reports(*versions: str) -> dict[int, list[tuple[str, Line]]]:
        return {
            node: [("packages", ok("torch", version)), ("machine", ok("CPUs", str(node)))]
            for node, version in enumerate(versions)
        }

    place = Place(num_nodes=3, names=("a", "b", "c"))
    (same,) = nodes.same_everywhere(reports("2.15", "2.15", "2.15"), place)
    (differ,) = nodes.same_everywhere(reports("2.15", "2.14", "2.15"), place)
    assert same.verdict == "ok"
    assert (differ.verdict, differ.found) == ("fail", "torch: 2.15 on a c, 2.14 on b")


def test_places() -> None:
    assert meeting.find_place({}) == Place() and not Place().far
    assert (
        meeting.find_place({"SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_PROCID": "0"}) == Place()
    )  # a batch script, no srun
    torchrun = {
        "RANK": "9",
        "WORLD_SIZE": "16",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "8",
        "MASTER_ADDR": "n1",
        "MASTER_PORT": "1",
    }
    place = meeting.find_place(torchrun)
    assert (place.node, place.num_nodes, place.speaks, place.address, place.far) == (1, 2, False, "n1", True)
    alone = {
        "SLURM_STEP_NUM_NODES": "1",
        "SLURM_PROCID": "0",
        "SLURM_NODEID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_STEP_NODELIST": "n1",
    }
    assert meeting.find_place(alone).num_nodes == 1


def test_places_under_srun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(
        '#!/bin/sh\n[ $2 = hostnames ] && echo n1 && echo n2 || echo "NodeName=$3 NodeAddr=10.0.0.1 NodeHostName=n1"\n'
    )
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    step = {
        "SLURM_STEP_NUM_NODES": "2",
        "SLURM_STEP_NODELIST": "n[1-2]",
        "SLURM_PROCID": "8",
        "SLURM_NODEID": "1",
        "SLURM_LOCALID": "0",
    }
    place = meeting.find_place({**step, "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0"})
    assert place == Place(1, 2, True, "10.0.0.1", ("n1", "n2"), "7.0")
    assert meeting.find_place({**step, "MASTER_ADDR": "ib0-n1"}).address == "ib0-n1"
    assert place.name(1) == "n2"
