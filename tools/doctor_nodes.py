# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Several nodes: where this process stands, how they meet, and what only holds between them.

The first node asks, the others answer: lines of JSON over one connection each, which the others open.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import socket
import tempfile
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools import doctor_files, doctor_network
from tools.doctor_lines import Check, Line, answer_of, examine, fail, ok, one_line, warn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

TOPIC = "nodes"
SAME_TOPICS = ("packages", "GPU")
PORTS = 16  # below the range that systems hand out by themselves
FIRST_PORT, LAST_PORT = 20000, 32000
MAX_OFFSET_S = 1.0
ANSWER_S = 5.0  # on top of what the other node may take
PATIENCE = 40  # checks that may come to their limit on the first node, before another one stops waiting for it


@dataclass(frozen=True)
class Place:
    """Where this process stands among the nodes.

    Attributes:
        node, num_nodes: of this process.
        speaks: it is the one process of its node that does the checks.
        address: of the first node.
        names: of all nodes, as far as the launcher tells.
        token: the same on all nodes of this launch, and on no others.
    """

    node: int = 0
    num_nodes: int = 1
    speaks: bool = True
    address: str = "127.0.0.1"
    names: tuple[str, ...] = ()
    token: str = ""

    @property
    def far(self) -> bool:
        """Whether other machines take part: several nodes that meet at a loopback address are one machine."""
        return self.num_nodes > 1 and not self.address.startswith(("127.", "localhost", "::1"))

    def name(self, node: int) -> str:
        return self.names[node] if node < len(self.names) else f"node {node}"


def find_place(env: Mapping[str, str]) -> Place:
    """Read torchrun's variables, or else those of srun; without either there is one node.

    Raises:
        OSError: scontrol, which knows the first node's address, does not work.
    """
    if "RANK" in env and "WORLD_SIZE" in env:
        local, size = int(env.get("LOCAL_WORLD_SIZE", "1")), int(env["WORLD_SIZE"])
        node = int(env.get("GROUP_RANK", int(env["RANK"]) // local))
        address = env.get("MASTER_ADDR", "127.0.0.1")
        token = f"{address}:{env.get('MASTER_PORT', '')}:{env.get('TORCHELASTIC_RUN_ID', '')}"
        return Place(node, size // local, env.get("LOCAL_RANK", "0") == "0", address, (), token)
    if "SLURM_STEP_NUM_NODES" in env and "SLURM_PROCID" in env:  # set by srun; a batch script alone has not the first
        nodes = int(env["SLURM_STEP_NUM_NODES"])
        names = (
            tuple(answer_of("scontrol", "show", "hostnames", env["SLURM_STEP_NODELIST"]).split()) if nodes > 1 else ()
        )
        address = env.get("MASTER_ADDR") or (_address_of(names[0]) if names else "127.0.0.1")
        token = f"{env.get('SLURM_JOB_ID')}.{env.get('SLURM_STEP_ID')}"
        return Place(int(env["SLURM_NODEID"]), nodes, env["SLURM_LOCALID"] == "0", address, names, token)
    return Place()


def _address_of(node: str) -> str:
    """The address by which SLURM itself reaches a node, whose name need not resolve."""
    fields = dict(
        field.partition("=")[::2] for field in answer_of("scontrol", "show", "node", node).split() if "=" in field
    )
    return fields.get("NodeAddr", node)


class Peer:
    """A connection to another node; one that was late or closed stays silent."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection, self.file, self.lost = connection, connection.makefile("rwb"), False

    def send(self, message: Any) -> None:
        with contextlib.suppress(OSError, ValueError):  # receive() will tell
            self.file.write(json.dumps(message).encode() + b"\n")
            self.file.flush()

    def receive(self, limit_s: float) -> Any:
        """The next message, or None when none comes within ``limit_s`` seconds."""
        self.connection.settimeout(max(0.01, limit_s))
        try:
            return json.loads(self.file.readline())
        except (OSError, ValueError):
            self.lost = True
            with contextlib.suppress(OSError):
                self.connection.shutdown(
                    socket.SHUT_RDWR
                )  # a late answer must not be taken for that to the next question
            return None


def ask_all(peers: Mapping[int, Peer], question: dict[str, Any], limit_s: float) -> dict[int, Any]:
    """Ask all nodes at once; returns what each answers, None for one that does not within ``limit_s`` seconds."""
    for peer in peers.values():
        peer.send(question)
    deadline = time.monotonic() + limit_s
    return {node: peer.receive(deadline - time.monotonic()) for node, peer in peers.items()}


def candidates(token: str) -> list[int]:
    """The ports at which the nodes of a launch look for each other: several, as some may be taken."""
    start = int.from_bytes(hashlib.sha256(token.encode()).digest()[:4], "big")
    return [FIRST_PORT + (start + 97 * index) % (LAST_PORT - FIRST_PORT) for index in range(PORTS)]


def meet(place: Place, limit_s: float) -> tuple[dict[int, Peer], int]:
    """On the first node: wait for the others; returns those that came, and the port."""
    server = None
    for port in candidates(place.token):
        try:
            server = socket.create_server(("", port))
            break
        except OSError:
            continue
    if server is None:
        return {}, 0
    peers: dict[int, Peer] = {}
    deadline = time.monotonic() + limit_s
    with server:
        while len(peers) < place.num_nodes - 1 and time.monotonic() < deadline:
            server.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                peer = Peer(server.accept()[0])
            except OSError:
                break
            hello = peer.receive(2)
            if isinstance(hello, dict) and hello.get("token") == place.token:
                peer.send({"token": place.token})
                peers[hello["node"]] = peer
    return peers, port


def join(place: Place, limit_s: float) -> Peer | None:
    """On another node: find the first one, or None when it is not to be found within ``limit_s`` seconds."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        for port in candidates(place.token):
            try:
                peer = Peer(socket.create_connection((place.address, port), timeout=2))
            except OSError:
                continue
            peer.send({"token": place.token, "node": place.node})
            if peer.receive(2) == {"token": place.token}:
                return peer
        time.sleep(0.2)
    return None


def answer(
    peer: Peer, place: Place, run_dir: Path, report: Callable[[], Iterator[tuple[str, Line]]], limit_s: float
) -> None:
    """On another node: do what the first one asks, until it closes the connection or says nothing for very long."""
    while (asked := peer.receive(PATIENCE * limit_s)) is not None:
        if asked["ask"] == "report":
            for topic, line in report():
                peer.send({"topic": topic, "line": asdict(line)})
            peer.send({"topic": None})
        elif asked["ask"] == "time":
            peer.send(time.time())
        else:
            check = Check(TOPIC, asked["ask"], functools.partial(_answer_to, asked, place, run_dir, limit_s))
            peer.send([asdict(line) for line in examine(check, limit_s)])


def _answer_to(asked: dict[str, Any], place: Place, run_dir: Path, limit_s: float) -> Iterator[Line]:
    """What one question finds out here."""
    if asked["ask"] == "look":
        yield _look(run_dir / asked["path"], asked["content"], limit_s / 2)
    elif asked["ask"] == "lock":
        entered = [
            kind for kind in asked["kinds"] if doctor_files.try_lock(run_dir / asked["path"], doctor_files.LOCKS[kind])
        ]
        yield fail("lock", " and ".join(entered), "") if entered else ok("lock", "refused")
    else:
        yield from _sum(place, asked, limit_s)


def reported(peer: Peer, limit_s: float) -> Iterator[tuple[str, Line]]:
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
    what, size = "all-reduce", place.num_nodes
    yield from doctor_network.all_reduce(
        what, asked["backend"], place.node, size, place.address, asked["port"], 0.8 * limit_s
    )


def between(
    peers: dict[int, Peer], place: Place, run_dir: Path, reports: dict[int, list], backend: str, limit_s: float
) -> Iterator[Check]:
    """The checks of what holds between the nodes that came, for the first one, after the reports."""
    peers = {node: peer for node, peer in peers.items() if not peer.lost}
    yield Check(TOPIC, "clocks", lambda: clocks(peers, place))
    yield Check(TOPIC, "same everywhere", lambda: same_everywhere(reports, place))
    if doctor_files.usable(run_dir):
        yield Check(TOPIC, "shared filesystem", lambda: shared_files(peers, place, run_dir, limit_s))
    if len(peers) == place.num_nodes - 1:
        yield Check(TOPIC, "all-reduce", lambda: sum_over_nodes(peers, place, backend, limit_s))


def arrivals(peers: dict[int, Peer], place: Place, port: int, limit_s: float) -> Line:
    """Which nodes answered."""
    absent = [place.name(node) for node in range(1, place.num_nodes) if node not in peers]
    where = f"{place.address}:{port}"
    if absent:
        found = f"no answer within {limit_s:g} s from {', '.join(absent)}"
        return fail("nodes", found, f"are they up, can they reach {where}? MASTER_ADDR=ADDRESS names another way")
    return ok("nodes", f"all {place.num_nodes} met at {where}")


def clocks(peers: dict[int, Peer], place: Place) -> Iterator[Line]:
    """How far the clocks are apart: half of a question's way there and back is taken off."""
    offsets = {}
    for node, peer in peers.items():
        for _ in range(3):
            start = time.time()
            peer.send({"ask": "time"})
            there = peer.receive(ANSWER_S)
            if there is not None:
                delay = time.time() - start
                offsets[node] = min(offsets.get(node, (9e9, 0.0)), (delay, there - start - delay / 2))
    if not offsets:
        return
    node, (_, worst) = max(offsets.items(), key=lambda item: abs(item[1][1]))
    if abs(worst) > MAX_OFFSET_S:
        yield warn(
            "clocks",
            f"{place.name(node)} is {worst:+.1f} s off",
            "have its time synchronised: logs and file times mislead",
        )
    else:
        yield ok("clocks", f"within {abs(worst):.3f} s")


def same_everywhere(reports: dict[int, list[tuple[str, Line]]], place: Place) -> Iterator[Line]:
    """Versions and GPUs of all nodes against those of the first."""
    versions = {
        node: {line.what: line.found for topic, line in lines if topic in SAME_TOPICS}
        for node, lines in reports.items()
    }
    differing = []
    for what in sorted(set().union(*versions.values())):
        values = defaultdict(list)
        for node, found in versions.items():
            values[found.get(what, "not there")].append(place.name(node))
        if len(values) > 1:
            differing.append(
                f"{what}: " + ", ".join(f"{value} on {' '.join(names[:3])}" for value, names in values.items())
            )
    if differing:
        more = f"; and {len(differing) - 3} more" if len(differing) > 3 else ""
        yield fail(
            "same everywhere",
            "; ".join(differing[:3]) + more,
            "use one environment, on a shared filesystem or in one container",
        )
    elif any(versions.values()):
        yield ok("same everywhere", "packages and GPUs are the same on all nodes")


def shared_files(peers: dict[int, Peer], place: Place, run_dir: Path, limit_s: float) -> Iterator[Line]:
    """The run folder is one and the same on all nodes, changes are seen soon, and locks hold between them."""
    with tempfile.TemporaryDirectory(prefix=".doctor_", dir=run_dir) as scratch:
        path, beside = Path(scratch, "seen"), Path(scratch, "beside")
        question = {"path": f"{Path(scratch).name}/{path.name}"}
        answers: dict[int, Any] = {}
        for content in ("old", "new"):
            beside.write_text(content)
            os.replace(beside, path)
            answers = ask_all(peers, {"ask": "look", "content": content, **question}, limit_s)
            if blind := _objections(answers, place):
                mend = "give all nodes the same --run-dir, on NFS, Lustre or another shared filesystem"
                yield fail("shared filesystem", f"{run_dir} of this node is not seen on {blind}", mend)
                return
        slowest = max((float(lines[0]["found"]) for lines in answers.values()), default=0.0)
        yield ok("shared filesystem", f"a renamed file is seen everywhere within {slowest:.1f} s")
        with open(path, "r+") as held:
            kinds = []
            for kind, lock in doctor_files.LOCKS.items():
                with contextlib.suppress(OSError):  # not to be had at all, which is said under files
                    lock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    kinds.append(kind)
            entered = _objections(ask_all(peers, {"ask": "lock", "kinds": kinds, **question}, limit_s), place)
        if entered:
            mend = "HF_HOME on a local disk of each node; for Lustre: mount -o flock"
            yield warn("locks between nodes", f"do not hold for {entered}", mend)
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
