# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Several nodes: where this process stands, and how they meet.

The first node asks and the others answer. Each of them opens one connection to the first, over which lines of JSON go.
"""

import contextlib
import hashlib
import json
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tools.doctor.lines import answer_of

PORTS = 16  # below the range that systems hand out by themselves
FIRST_PORT, LAST_PORT = 20000, 32000


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
        nodes, names = int(env["SLURM_STEP_NUM_NODES"]), ()
        if nodes > 1:
            names = tuple(answer_of("scontrol", "show", "hostnames", env["SLURM_STEP_NODELIST"]).split())
        address = env.get("MASTER_ADDR") or (_address_of(names[0]) if names else "127.0.0.1")
        token = f"{env.get('SLURM_JOB_ID')}.{env.get('SLURM_STEP_ID')}"
        return Place(int(env["SLURM_NODEID"]), nodes, env["SLURM_LOCALID"] == "0", address, names, token)
    return Place()


def _address_of(node: str) -> str:
    """The address by which SLURM itself reaches a node, whose name need not resolve."""
    fields = answer_of("scontrol", "show", "node", node).split()
    return next((field.partition("=")[2] for field in fields if field.startswith("NodeAddr=")), node)


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
            with contextlib.suppress(OSError):  # a late answer must not be taken for that to the next question
                self.connection.shutdown(socket.SHUT_RDWR)
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
    server, port = None, 0
    for port in candidates(place.token):
        with contextlib.suppress(OSError):
            server = socket.create_server(("", port))
            break
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
