# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Say what this environment can and cannot run, and the fix: packages, GPUs, limits, network, run folder, SLURM."""

import argparse
import os
import socket
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from hydra_mcore.commands import one_line_errors
from hydra_mcore.files import write_json
from tools.doctor import files, machine, meeting, network, nodes, packages, slurm
from tools.doctor.lines import Check, examine, one_line
from tools.doctor.meeting import Place
from tools.doctor.nodes import Entry

TOPICS = ("packages", "GPU", "machine", "network", "files", "SLURM", "services", "nodes")
COLOURS = {"ok": "32", "warn": "33", "fail": "31"}

EXAMPLES = """\
Every line says ok, warn or fail, and what was found. The fix is below it. warn means that something works worse than it
could. doctor changes nothing and never waits forever. The exit status is 0 if nothing fails, 1 if something fails, and
2 for arguments that cannot be used.

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
    add = p.add_argument
    run_dir_help = "folder that runs are kept in (default: the current one)"
    add("--run-dir", type=Path, default=Path(), metavar="DIR", help=run_dir_help)
    add("--json", type=Path, metavar="FILE", help="also write all lines to this file")
    add("--network", action="store_true", help="also try to reach Hugging Face and W&B")
    topics_help = f"check these topics alone: {', '.join(TOPICS)}"
    add("--only", nargs="+", choices=TOPICS, metavar="TOPIC", default=TOPICS, help=topics_help)
    limit_help = "seconds that one check may take (default %(default)g)"
    add("--limit", type=float, default=60.0, metavar="S", help=limit_help)
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
        place = meeting.find_place(os.environ)
    except (OSError, KeyError, ValueError) as error:
        unclear = f"this process was started on several nodes, but its place among them is unclear ({one_line(error)})"
        p.error(f"{unclear}; start it on one")
    if place.speaks:
        args.run_dir = args.run_dir.absolute()
        sys.exit(first(args, place) if place.node == 0 else other(args, place))


def first(args: argparse.Namespace, place: Place) -> int:
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
        lines = list(map(as_json, entries))
        report = {"summary": last, "counts": dict(counts), "nodes": place.num_nodes, "lines": lines}
        write_json(args.json, report, indent=2)
    return int(counts["fail"] > 0)


def from_all(own: Iterator[Entry], args: argparse.Namespace, place: Place, collective: str) -> Iterator[Entry]:
    """The report of all nodes, and what holds between them."""
    peers, port = meeting.meet(place, args.limit)
    arrivals = nodes.arrivals(peers, place, port, args.limit)
    for peer in peers.values():
        peer.send({"ask": "report"})
    by_node = {0: list(own), **{node: list(nodes.reported(peer, args.limit)) for node, peer in peers.items()}}
    yield from merged(by_node, place)
    yield "nodes", arrivals
    if "nodes" in args.only:
        between = nodes.between(peers, place, args.run_dir, by_node, collective, args.limit)
        yield from examined(between, 3 * args.limit)  # other nodes take their time in between


def other(args: argparse.Namespace, place: Place) -> int:
    """On another node: answer the first one; returns the exit status."""
    peer = meeting.join(place, args.limit)
    if peer is None:
        print(f"doctor: {place.name(place.node)} cannot reach the first node at {place.address}", file=sys.stderr)
        return 1
    checks = chosen(args, place, *gpus_here())
    nodes.answer(peer, place, args.run_dir, lambda: examined(checks, args.limit), args.limit)
    return 0


def gpus_here() -> tuple[list[machine.Gpu], str]:
    """The GPUs of this node, and what keeps nvidia-smi from telling."""
    try:
        return machine.gpus(), ""
    except (OSError, ValueError, TypeError) as error:
        return [], one_line(error)


def backend(found: Sequence[machine.Gpu]) -> str:
    return "nccl" if found else "gloo"


def chosen(args: argparse.Namespace, place: Place, found: list[machine.Gpu], problem: str) -> list[Check]:
    """All that is looked at on one node, in the order of the report."""
    capability, run_dir = found[0].capability if found else "", args.run_dir
    checks = [
        Check("packages", "packages", packages.requirements),
        Check("packages", packages.TE, partial(packages.transformer_engine, bool(found))),
        Check("packages", "Apex", partial(packages.apex, bool(found))),
        Check("packages", "Megatron-Core", packages.megatron),
        Check("packages", packages.FLA, partial(packages.flash_linear_attention, bool(found))),
        Check("packages", "Triton", partial(packages.triton, capability)),
        Check("GPU", "driver", partial(machine.driver, found, problem)),
        Check("GPU", "torch", partial(machine.torch_on, found)),
        Check("machine", "CPUs", machine.cpus),
        Check("machine", "memory", machine.memory),
        Check("machine", "/dev/shm", machine.shared_memory),
        Check("machine", "limits", machine.limits),
        Check("network", "host name", lambda: network.host_name(socket.gethostname(), place.far)),
        Check("network", "interfaces", network.interfaces),
        Check("network", "all-reduce", partial(network.all_reduce, backend(found), 0, 1, "", 0, 15)),
        Check("files", "run folder", partial(files.run_folder, run_dir)),
        *(Check("files", step.__name__, partial(step, run_dir)) for step in files.STEPS if files.usable(run_dir)),
        Check("SLURM", "SLURM", slurm.slurm),
        Check("services", "W&B", network.wandb),
        Check("services", "Hugging Face", network.hugging_face),
        *([Check("services", "outside", network.reachable)] if args.network else []),
    ]
    return [check for check in checks if check.topic in args.only]


def examined(checks: Iterable[Check], limit_s: float) -> Iterator[Entry]:
    for check in checks:
        for line in examine(check, limit_s):
            yield check.topic, line


def merged(by_node: dict[int, list[Entry]], place: Place) -> list[Entry]:
    """One report of all nodes: a line that is ok everywhere as the first has it, any other with the nodes that do."""
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
        verdict = f"\x1b[{COLOURS[line.verdict]}m{verdict}\x1b[0m" if colour else verdict
        print(f"  {verdict} {line.what:<24} {line.found}", flush=True)
        if line.fix:
            print(f"{'':32}-> {line.fix}", flush=True)
        yield entry


def summary(entries: Sequence[Entry], found: Sequence[machine.Gpu], num_nodes: int) -> str:
    """What this environment can run, in one line."""
    where = f" on each of {num_nodes} nodes" if num_nodes > 1 else ""
    if found:
        lacking = [line.what for _, line in entries if line.verdict == "warn" and line.what in packages.FAST]
        slowly = f", slowly without {' and '.join(lacking)}" if lacking else ""
        able = f"{machine.named(found)}{where}: all stages{slowly}"
    else:
        able = f"CPU only{where}: the tiny example and the tests; no GPU"
    failed = dict.fromkeys(line.what for _, line in entries if line.verdict == "fail")
    return f"fix first: {', '.join(failed)}; then {able}" if failed else able


def as_json(entry: Entry) -> dict[str, Any]:
    """A line as --json has it, where its fix goes by the name that it always had."""
    topic, line = entry
    return {"topic": topic, "verdict": line.verdict, "what": line.what, "found": line.found, "mend": line.fix}


if __name__ == "__main__":
    main()
