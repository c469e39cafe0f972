# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""What only holds between nodes: the same versions, a shared filesystem with its locks, an all-reduce."""

import contextlib
import fcntl
import itertools
import os
import socket
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from tools.doctor import files, network
from tools.doctor.lines import Check, Line, examine, fail, ok, one_line, warn
from tools.doctor.meeting import Peer, Place, ask_all

TOPIC = "nodes"
SAME_TOPICS = ("packages", "GPU")
ANSWER_S = 5.0  # on top of what the other node may take
PATIENCE = 40  # checks that may come to their limit on the first node, before another one stops waiting for it

Entry = tuple[str, Line]  # topic, line


def answer(peer: Peer, place: Place, run_dir: Path, report: Callable[[], Iterator[Entry]], limit_s: float) -> None:
    """On another node: do what the first one asks, until it closes the connection or says nothing for very long."""
    while (asked := peer.receive(PATIENCE * limit_s)) is not None:
        if asked["ask"] == "report":
            for topic, line in report():
                peer.send({"topic": topic, "line": asdict(line)})
            peer.send({"topic": None})
        else:
            check = Check(TOPIC, asked["ask"], partial(_answer_to, asked, place, run_dir, limit_s))
            peer.send([asdict(line) for line in examine(check, limit_s)])


def _answer_to(asked: dict[str, Any], place: Place, run_dir: Path, limit_s: float) -> Iterator[Line]:
    """What one question finds out here."""
    if asked["ask"] == "look":
        yield _look(run_dir / asked["path"], asked["content"], limit_s / 2)
    elif asked["ask"] == "lock":
        entered = [kind for kind in asked["kinds"] if files.try_lock(run_dir / asked["path"], files.LOCKS[kind])]
        yield fail("lock", " and ".join(entered), "") if entered else ok("lock", "refused")
    else:
        yield from _sum(place, asked, limit_s)


def reported(peer: Peer, limit_s: float) -> Iterator[Entry]:
    """On the first node: the lines of another one, and one more if it falls silent for longer than a check may take."""
    while True:
        said = peer.receive(limit_s + ANSWER_S)
        if said is None:
            yield TOPIC, fail("report", "broke off", "run the doctor there alone")
        if said is None or said["topic"] is None:
            return
        yield said["topic"], Line(**said["line"])


def _look(path: Path, content: str, limit_s: float) -> Line:
    """Seconds until a file of the first node's is seen here with its newest content, or what was seen instead."""
    start, seen = time.monotonic(), ""
    while seen != content and time.monotonic() - start < limit_s:
        time.sleep(0.02)
        try:
            seen = path.read_text()
        except OSError as error:
            seen = one_line(error)
    return ok("look", f"{time.monotonic() - start:.1f}") if seen == content else fail("look", seen, "")


def _sum(place: Place, asked: dict[str, Any], limit_s: float) -> Iterator[Line]:
    where = place.node, place.num_nodes, place.address, asked["port"]
    yield from network.all_reduce(asked["backend"], *where, 0.8 * limit_s)


def between(
    peers: dict[int, Peer], place: Place, run_dir: Path, reports: dict[int, list[Entry]], backend: str, limit_s: float
) -> Iterator[Check]:
    """The checks of what holds between the nodes that came, for the first one, after the reports."""
    peers = {node: peer for node, peer in peers.items() if not peer.lost}
    yield Check(TOPIC, "same everywhere", lambda: same_everywhere(reports, place))
    if files.usable(run_dir):
        yield Check(TOPIC, "shared filesystem", lambda: shared_files(peers, place, run_dir, limit_s))
    if len(peers) == place.num_nodes - 1:
        yield Check(TOPIC, "all-reduce", lambda: sum_over_nodes(peers, place, backend, limit_s))


def arrivals(peers: dict[int, Peer], place: Place, port: int, limit_s: float) -> Line:
    """Which nodes answered."""
    absent = [place.name(node) for node in range(1, place.num_nodes) if node not in peers]
    where = f"{place.address}:{port}"
    if absent:
        fix = f"are they up, can they reach {where}? MASTER_ADDR=ADDRESS names another way"
        return fail("nodes", f"no answer within {limit_s:g} s from {', '.join(absent)}", fix)
    return ok("nodes", f"all {place.num_nodes} met at {where}")


def same_everywhere(reports: dict[int, list[Entry]], place: Place) -> Iterator[Line]:
    """Versions and GPUs of all nodes against those of the first."""
    nodes_with: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    entries = itertools.chain.from_iterable(reports.values())
    names = {line.what for topic, line in entries if topic in SAME_TOPICS}
    for node, lines in reports.items():
        found = {line.what: line.found for topic, line in lines if topic in SAME_TOPICS}
        for what in names:
            nodes_with[what][found.get(what, "not there")].append(place.name(node))
    differing = [
        f"{what}: " + ", ".join(f"{value} on {' '.join(nodes[:3])}" for value, nodes in values.items())
        for what, values in sorted(nodes_with.items())
        if len(values) > 1
    ]
    if differing:
        more = f"; and {len(differing) - 3} more" if len(differing) > 3 else ""
        fix = "use one environment, on a shared filesystem or in one container"
        yield fail("same everywhere", "; ".join(differing[:3]) + more, fix)
    elif names:
        yield ok("same everywhere", "packages and GPUs are the same on all nodes")


def shared_files(peers: dict[int, Peer], place: Place, run_dir: Path, limit_s: float) -> Iterator[Line]:
    """The run folder is one and the same on all nodes, changes are seen soon, and locks hold between them."""
    with files.scratch_in(run_dir) as scratch:
        path, beside = Path(scratch, "seen"), Path(scratch, "beside")
        question = {"path": f"{Path(scratch).name}/{path.name}"}
        answers: dict[int, Any] = {}
        for content in ("old", "new"):
            beside.write_text(content)
            os.replace(beside, path)
            answers = ask_all(peers, {"ask": "look", "content": content, **question}, limit_s)
            if blind := _objections(answers, place):
                fix = "give all nodes the same --run-dir, on NFS, Lustre or another shared filesystem"
                yield fail("shared filesystem", f"{run_dir} of this node is not seen on {blind}", fix)
                return
        slowest = max((float(lines[0]["found"]) for lines in answers.values()), default=0.0)
        yield ok("shared filesystem", f"a renamed file is seen everywhere within {slowest:.1f} s")
        with open(path, "r+") as held:
            kinds = []
            for kind, lock in files.LOCKS.items():
                with contextlib.suppress(OSError):  # not to be had at all, which is said under files
                    lock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    kinds.append(kind)
            entered = _objections(ask_all(peers, {"ask": "lock", "kinds": kinds, **question}, limit_s), place)
        if entered:
            fix = "one run a folder is not kept; HF_HOME on a local disk of each node; for Lustre: mount -o flock"
            yield warn("locks between nodes", f"do not hold for {entered}", fix)
        elif kinds:
            yield ok("locks between nodes", "hold")


def sum_over_nodes(peers: dict[int, Peer], place: Place, backend: str, limit_s: float) -> Iterator[Line]:
    """An all-reduce of one process a node."""
    with socket.socket() as free:
        free.bind(("", 0))
        question = {"ask": "all-reduce", "backend": backend, "port": free.getsockname()[1]}
    for peer in peers.values():
        peer.send(question)
    own = list(_sum(place, question, limit_s))
    yield from own
    if own and all(line.verdict == "ok" for line in own):
        failed = _objections({node: peer.receive(limit_s) for node, peer in peers.items()}, place)
        if failed:
            yield fail("all-reduce", f"failed on {failed}", "run the doctor on these nodes alone")


def _objections(answers: dict[int, Any], place: Place) -> str:
    """The nodes whose answer is not ok, with what they found."""
    found = {
        node: [line["found"] for line in lines if line["verdict"] != "ok"] if lines else ["silent"]
        for node, lines in answers.items()
    }
    return ", ".join(f"{place.name(node)} ({texts[0]})" for node, texts in found.items() if texts)
