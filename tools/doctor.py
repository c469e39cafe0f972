#!/usr/bin/env python3
# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""What this environment can and cannot run, and the mend: packages, GPUs, limits, network, run folder, SLURM."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hydra_mcore.commands import one_line_errors
from tools import doctor_files, doctor_machine, doctor_network, doctor_nodes, doctor_packages, doctor_slurm
from tools.doctor_lines import Check, Line, examine, one_line

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    Entry = tuple[str, Line]  # topic, line

TOPICS = ("packages", "GPU", "machine", "network", "files", "SLURM", "services", "nodes")
COLOURS = {"ok": "32", "warn": "33", "fail": "31"}

EXAMPLES = """\
Every line says ok, warn (it works, worse than it could) or fail, what was found, and below it what to do. Nothing is
changed and nothing waits forever. The exit status is 0 if nothing fails, 1 if something does, 2 for arguments that
cannot be used.

examples:
  this machine, and the folder that runs will be kept in
      python tools/doctor.py --run-dir runs
  all nodes of a job, with what must hold between them; the first node prints for all
      srun --nodes 4 --ntasks-per-node 1 python tools/doctor.py --run-dir /shared/runs
  the same without SLURM, on each node
      torchrun --nnodes 4 --nproc-per-node 1 --rdzv-backend c10d --rdzv-endpoint FIRST:29500 tools/doctor.py \\
          --run-dir /shared/runs
  only some topics, for machines; --network also tries the services outside
      python tools/doctor.py --only files SLURM --json doctor.json
"""


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="doctor", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "--run-dir",
        type=Path,
        default=Path(),
        metavar="DIR",
        help="folder that runs are kept in (default: the current one)",
    )
    p.add_argument("--json", type=Path, metavar="FILE", help="write all lines there too")
    p.add_argument("--network", action="store_true", help="also try to reach Hugging Face and W&B")
    p.add_argument(
        "--only",
        nargs="+",
        choices=TOPICS,
        metavar="TOPIC",
        default=TOPICS,
        help=f"one or more of: {', '.join(TOPICS)}",
    )
    p.add_argument(
        "--limit", type=float, default=20.0, metavar="S", help="seconds that one check may take (default %(default)g)"
    )
    return p


@one_line_errors("doctor")
def main(argv: list[str] | None = None) -> None:
    p = parser()
    args = p.parse_args(argv)
    if args.limit <= 0:
        p.error("--limit must be above 0")
    if args.json and (args.json.is_dir() or not os.access(args.json.absolute().parent, os.W_OK)):
        p.error(f"--json {args.json}: not a file that can be written")
    try:
        place = doctor_nodes.find_place(os.environ)
    except (OSError, KeyError, ValueError) as error:
        p.error(
            f"this process was started on several nodes, but its place among them is unclear ({one_line(error)}); start"
            " it on one"
        )
    if place.speaks:
        args.run_dir = args.run_dir.absolute()
        sys.exit(first(args, place) if place.node == 0 else other(args, place))


def first(args: argparse.Namespace, place: doctor_nodes.Place) -> int:
    """On the first node: check, ask the others, print; returns the exit status."""
    found, problem = gpus_here()
    entries = examined(chosen(args, place, found, problem), args.limit)
    if place.num_nodes > 1:
        entries = from_all(entries, args, place, backend(found))
    entries = list(show(entries))
    counts = Counter(line.verdict for _, line in entries)
    last = summary(entries, found, place.num_nodes)
    print(f"\n{counts['ok']} ok, {counts['warn']} warn, {counts['fail']} fail\n{last}")
    if args.json:
        write(args.json, {"summary": last, "counts": dict(counts), "nodes": place.num_nodes, "lines": entries})
    return int(counts["fail"] > 0)


def from_all(
    own: Iterator[Entry], args: argparse.Namespace, place: doctor_nodes.Place, network: str
) -> Iterator[Entry]:
    """The report of all nodes, and what holds between them."""
    peers, port = doctor_nodes.meet(place, args.limit)
    arrivals = doctor_nodes.arrivals(peers, place, port, args.limit)
    for peer in peers.values():
        peer.send({"ask": "report"})
    by_node = {0: list(own), **{node: list(doctor_nodes.reported(peer, args.limit)) for node, peer in peers.items()}}
    yield from merged(by_node, place)
    yield "nodes", arrivals
    if "nodes" in args.only:
        between = doctor_nodes.between(peers, place, args.run_dir, by_node, network, args.limit)
        yield from examined(between, 3 * args.limit)  # other nodes take their time in between


def other(args: argparse.Namespace, place: doctor_nodes.Place) -> int:
    """On another node: answer the first one; returns the exit status."""
    peer = doctor_nodes.join(place, args.limit)
    if peer is None:
        print(f"doctor: {place.name(place.node)} cannot reach the first node at {place.address}", file=sys.stderr)
        return 1
    checks = chosen(args, place, *gpus_here())
    doctor_nodes.answer(peer, place, args.run_dir, lambda: examined(checks, args.limit), args.limit)
    return 0


def gpus_here() -> tuple[list[doctor_machine.Gpu], str]:
    """The GPUs of this node, and what keeps nvidia-smi from telling."""
    try:
        return doctor_machine.gpus(), ""
    except (OSError, ValueError) as error:
        return [], one_line(error)


def backend(found: Sequence[doctor_machine.Gpu]) -> str:
    return "nccl" if found else "gloo"


def chosen(
    args: argparse.Namespace, place: doctor_nodes.Place, found: list[doctor_machine.Gpu], problem: str
) -> list[Check]:
    """The checks of one node, in the order of their topics."""
    checks = [
        *doctor_packages.checks(bool(found), found[0].capability if found else ""),
        *doctor_machine.checks(found, problem),
        *doctor_network.checks(place.far, backend(found), args.network),
        *doctor_files.checks(args.run_dir),
        *doctor_slurm.checks(),
    ]
    return sorted((check for check in checks if check.topic in args.only), key=lambda check: TOPICS.index(check.topic))


def examined(checks: Iterable[Check], limit_s: float) -> Iterator[Entry]:
    for check in checks:
        for line in examine(check, limit_s):
            yield check.topic, line


def merged(by_node: dict[int, list[Entry]], place: doctor_nodes.Place) -> list[Entry]:
    """One report of all nodes: a line that is ok everywhere as the first node has it, any other with the nodes that
    have it.
    """
    good: dict[tuple[str, str], Entry] = {}
    nodes_of: dict[Entry, list[str]] = {}
    for node, entries in by_node.items():
        for topic, line in entries:
            if line.verdict == "ok":
                good.setdefault((topic, line.what), (topic, line))
            else:
                nodes_of.setdefault((topic, line), []).append(place.name(node))
    bad = {(topic, line.what) for topic, line in nodes_of}
    lines = [entry for key, entry in good.items() if key not in bad]
    for (topic, line), names in nodes_of.items():
        who = "all nodes" if len(names) == len(by_node) else ", ".join(names[:8]) + (" ..." if len(names) > 8 else "")
        lines.append((topic, replace(line, found=f"{who}: {line.found}")))
    return sorted(lines, key=lambda entry: TOPICS.index(entry[0]))


def show(entries: Iterable[Entry]) -> Iterator[Entry]:
    """Print lines under their topics as they come, and hand them on."""
    topic = None
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    for entry in entries:
        if entry[0] != topic:
            topic = entry[0]
            print(f"\n{topic}")
        line = entry[1]
        verdict = f"{line.verdict:<4}"
        print(
            f"  \x1b[{COLOURS[line.verdict]}m{verdict}\x1b[0m" if colour else f"  {verdict}",
            f"{line.what:<24} {line.found}",
            flush=True,
        )
        if line.mend:
            print(f"{'':32}-> {line.mend}", flush=True)
        yield entry


def summary(entries: Sequence[Entry], found: Sequence[doctor_machine.Gpu], num_nodes: int) -> str:
    """What this environment can run, in one line."""
    where = f" on each of {num_nodes} nodes" if num_nodes > 1 else ""
    if found:
        lacking = [line.what for _, line in entries if line.verdict == "warn" and line.what in doctor_packages.FAST]
        able = f"{doctor_machine.named(found)}{where}: all stages" + (
            f", slowly without {' and '.join(lacking)}" if lacking else ""
        )
    else:
        able = f"CPU only{where}: the tiny example and the tests; no GPU"
    failed = dict.fromkeys(line.what for _, line in entries if line.verdict == "fail")
    return f"mend first: {', '.join(failed)}; then {able}" if failed else able


def write(path: Path, report: dict[str, Any]) -> None:
    lines = [{"topic": topic, **asdict(line)} for topic, line in report["lines"]]
    beside = path.with_name(path.name + ".part")
    beside.write_text(json.dumps({**report, "lines": lines}, indent=2) + "\n", encoding="utf-8")
    os.replace(beside, path)


if __name__ == "__main__":
    main()
