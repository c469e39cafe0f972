# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Where the time of a training step went, part by part, read from the trace that torch's profiler wrote.

Every moment belongs to the innermost range or backward operation around it. A backward operation belongs to the part
whose forward operation made it: the trace links the two (its "fwdbwd" flows, from autograd's sequence numbers). So a
step's time is dealt out once, and the parts add up to it.

On a CPU time is that of the thread that runs the step, waiting and Python included. On a GPU it is that of kernels and
copies, each counted where it was launched.
"""

from __future__ import annotations

import gzip
import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

from hydra_mcore.kinds import KINDS


def core_name(kind: str) -> str:
    """The part that is a kind's core: "FA attention"."""
    return f"{KINDS[kind].label} {KINDS[kind].core}"


def _of_kinds() -> Iterable[str]:
    """The core of each kind, and the rest of its branch: norms, rotary, gates of decay and writing."""
    for kind in KINDS:
        yield core_name(kind)
        yield f"{KINDS[kind].label} rest"


PARTS = (
    *_of_kinds(),
    "conv",  # the short convolution of recurrent heads
    "fusion",
    "projections",  # q, k, v, the output gates', the output projection
    "MLP",
    "norms",  # around attention and MLP, and the last one
    "embedding",
    "loss",  # of tokens, the output layer included, or of layers
    "communication",  # between ranks, and the wait for them
    "rest of the model",  # residual sums, copies between parts, rotary angles
    "gradients",  # their sums
    "optimizer",
    "data",  # fetching a micro-batch
    "other",  # autograd between its operations, what the engine does around the passes
)
PASSES = ("teacher", "forward", "recomputed", "backward", "outside")
OUTSIDE = ("data", "optimizer")  # in neither pass, as what no range encloses
RANGE, TEACHER, STEP, BACKWARD = "part: ", "teacher: ", "step: ", "backward pass"  # names of ranges, or how they begin
NODE = "autograd::engine::evaluate_function: "


class Owner(NamedTuple):
    """Whom a moment belongs to."""

    part: str
    of_pass: str


NOBODY = Owner("other", "outside")


@dataclass(frozen=True)
class ProfileTable:
    """Seconds by part and pass (``PARTS``, ``PASSES``) over some steps, that of ``device`` ("cpu" or "gpu").

    ``wall_seconds`` is how long the steps took; on a CPU the sum of all parts, on a GPU more where it idles and less
    where streams run side by side.
    """

    device: str
    steps: int
    wall_seconds: float
    seconds: dict[Owner, float]

    @property
    def total(self) -> float:
        """Seconds of all parts."""
        return sum(self.seconds.values())

    def of(self, part: str, *passes: str) -> float:
        """Seconds of one part, in some passes or in all."""
        return sum(self.seconds.get(Owner(part, of_pass), 0.0) for of_pass in passes or PASSES)

    def share(self, part: str) -> float:
        """The part's share of the total, from 0 to 1."""
        return self.of(part) / self.total if self.total else 0.0

    def to_dict(self) -> dict[str, Any]:
        """For JSON; seconds are over all steps."""
        parts = {part: {of_pass: self.of(part, of_pass) for of_pass in PASSES} for part in PARTS}
        return {"device": self.device, "steps": self.steps, "wall_seconds": self.wall_seconds, "parts": parts}

    def cells(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Columns and rows: milliseconds a step, a line a part and a column a pass, without those that took no time."""
        passes = [of_pass for of_pass in PASSES if any(owner.of_pass == of_pass for owner in self.seconds)]
        milliseconds = 1000 / max(self.steps, 1)
        rows = []
        for part in (part for part in PARTS if any(owner.part == part for owner in self.seconds)):
            values = [self.of(part, of_pass) for of_pass in passes] + [self.of(part)]
            rows.append((part, *(f"{milliseconds * value:.2f}" for value in values), f"{self.share(part):.1%}"))
        sums = [sum(self.of(part, of_pass) for part in PARTS) for of_pass in passes] + [self.total]
        rows.append(("all", *(f"{milliseconds * value:.2f}" for value in sums), "100.0%"))
        return ("part", *passes, "all", "share"), rows

    def to_markdown(self) -> str:
        """The cells as a table, with what they are."""
        columns, rows = self.cells()
        seconds = self.wall_seconds / max(self.steps, 1)
        head = f"Milliseconds of {self.device.upper()} time a step, over {self.steps} steps of {1000 * seconds:.2f} ms."
        lines = (columns, ("---", *["---:"] * (len(columns) - 1)), *rows)
        return "\n".join([head, "", *(f"| {' | '.join(line)} |" for line in lines)]) + "\n"


def read_table(trace: Path) -> ProfileTable:
    """The table of a trace file (.json or .json.gz) that holds our ranges (``hydra_mcore.train.profile``)."""
    with gzip.open(trace, "rt") if trace.suffix == ".gz" else trace.open() as file:
        return profile_table(json.load(file)["traceEvents"])


def profile_table(events: Iterable[dict[str, Any]]) -> ProfileTable:
    """The table of a Chrome trace's events; times in microseconds, as they stand there."""
    timed = [event for event in events if event.get("ph") == "X" and "tid" in event]
    reading = _Reading(_origins(events))
    for event in sorted(timed, key=lambda event: (event["ts"], -event.get("dur", 0.0))):
        reading.read(event)
    reading.finish()
    kernels = [event for event in timed if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    if not kernels:
        return ProfileTable("cpu", reading.steps, reading.wall_seconds, dict(reading.seconds))
    seconds: dict[Owner, float] = defaultdict(float)
    for kernel in kernels:
        owner = reading.launched.get(kernel["args"].get("correlation"))
        if owner is not None:
            part = "communication" if kernel["name"].startswith("nccl") else owner.part
            seconds[Owner(part, owner.of_pass)] += kernel["dur"] / 1e6
    return ProfileTable("gpu", reading.steps, reading.wall_seconds, dict(seconds))


class _Reading:
    """One walk over all events in the order of their start, with a stack of open owners for each thread.

    Args:
        origins: where the forward operation of a backward one stands (`_origins`).
    """

    def __init__(self, origins: dict[tuple[int, int], tuple[Any, float]]) -> None:
        self.origins = origins
        self.origin_places = set(origins.values())
        self.owners: dict[tuple[Any, float], Owner] = {}  # of forward operations, by thread and start
        self.launched: dict[int, Owner] = {}  # by a kernel's correlation number
        self.open: dict[Any, list[tuple[float, Owner]]] = defaultdict(
            list
        )  # by thread: (end, owner), the innermost last
        self.seconds: dict[Owner, float] = defaultdict(float)
        self.steps, self.wall_seconds = 0, 0.0
        self.step_thread: Any = None
        self.now = 0.0

    def read(self, event: dict[str, Any]) -> None:
        thread, start, name = event["tid"], event["ts"], event["name"]
        self._close(thread, start)
        stack = self.open[thread]
        around = stack[-1][1] if stack else None
        if name.startswith(STEP):
            self.steps, self.wall_seconds = self.steps + 1, self.wall_seconds + event["dur"] / 1e6
            self.step_thread, self.now = thread, start
        if event.get("cat") in ("cuda_runtime", "cuda_driver") and around is not None:
            self.launched[event["args"].get("correlation")] = around
        elif (owner := self._owner(event, around)) is not None:
            self._credit(thread, start)
            stack.append((start + event["dur"], owner))
            around = owner
        if (thread, start) in self.origin_places:
            self.owners[thread, start] = around or NOBODY

    def finish(self) -> None:
        for thread in self.open:
            self._close(thread, float("inf"))

    def _owner(self, event: dict[str, Any], around: Owner | None) -> Owner | None:
        """The part and pass that own the time inside an event; None if the owner stays that of the event around it."""
        name = event["name"]
        if name.startswith(STEP):
            return NOBODY
        if name.startswith(NODE):
            return Owner(self._part_of_node(event), "backward")
        if around is None:
            return None  # outside the steps, or a thread that runs no part of them
        if name == BACKWARD:
            return Owner(around.part if around.of_pass == "backward" else "other", "backward")
        if name.startswith("c10d::"):
            return Owner("communication", around.of_pass)
        if name.startswith(TEACHER):
            return Owner(name.removeprefix(TEACHER), "teacher")
        if not name.startswith(RANGE):
            return None
        part = name.removeprefix(RANGE)
        if part in OUTSIDE:
            return Owner(part, "outside")
        if part == "communication":
            return Owner(part, around.of_pass)
        return Owner(part, "recomputed" if around.of_pass in ("backward", "recomputed") else "forward")

    def _part_of_node(self, event: dict[str, Any]) -> str:
        if event["name"].endswith("AccumulateGrad"):
            return "gradients"
        origin = self.origins.get(_node_key(event))
        return self.owners.get(origin, NOBODY).part

    def _close(self, thread: Any, now: float) -> None:
        stack = self.open[thread]
        while stack and stack[-1][0] <= now:
            self._credit(thread, stack[-1][0])
            stack.pop()

    def _credit(self, thread: Any, now: float) -> None:
        """What has passed since the last change of owner goes to the one that was."""
        if thread == self.step_thread and now > self.now:
            if self.open[thread]:
                self.seconds[self.open[thread][-1][1]] += (now - self.now) / 1e6
            self.now = now


def _node_key(event: dict[str, Any]) -> tuple[int, int] | None:
    """What names a backward operation: the thread of its forward operation, by autograd's count, and its number
    there.
    """
    numbers = event.get("args", {})
    return (numbers["Fwd thread id"], numbers["Sequence number"]) if numbers.get("Fwd thread id") else None


def _origins(events: Iterable[dict[str, Any]]) -> dict[tuple[int, int], tuple[Any, float]]:
    """Thread and start of the forward operation of every backward one, from the arrows between them."""
    starts, ends = (
        {event["id"]: _place(event) for event in events if event.get("cat") == "fwdbwd" and event["ph"] == ph}
        for ph in "sf"
    )
    origin_of_place = {ends[number]: place for number, place in starts.items() if number in ends}
    keyed = (
        (_node_key(event), origin_of_place.get(_place(event)))
        for event in events
        if event.get("ph") == "X" and "tid" in event
    )
    return {key: origin for key, origin in keyed if key is not None and origin is not None}


_place = itemgetter("tid", "ts")
