# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The network of one node: names, ports, interfaces, a collective, and the services outside."""

from __future__ import annotations

import contextlib
import netrc
import os
import shutil
import socket
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlparse

from tools.doctor_lines import GIB, Check, Line, fail, ok, one_line, warn

if TYPE_CHECKING:
    from collections.abc import Iterator

TORCHRUN_PORT = 29500
BLOCK = 1 << 20  # numbers in the array that is summed
HUB, WANDB = "https://huggingface.co", "https://api.wandb.ai"


def checks(far: bool, backend: str, outside: bool) -> list[Check]:
    """The checks of the topics network and services.

    Args:
        far: other machines take part, so a name that only this one understands is a failure.
        backend: nccl | gloo.
        outside: try to reach the services outside, too.
    """
    inside = [
        Check("network", "host name", lambda: host_name(socket.gethostname(), far)),
        Check("network", "ports", lambda: ports(launched="MASTER_PORT" in os.environ and "RANK" in os.environ)),
        Check("network", "interfaces", interfaces),
        Check("network", "all-reduce", lambda: all_reduce("all-reduce", backend, 0, 1, "", 0, 15)),
        Check("services", "W&B", lambda: wandb(Path(os.environ.get("NETRC", "~/.netrc")).expanduser())),
        Check("services", "Hugging Face", hugging_face),
    ]
    return inside + ([Check("services", "outside", reachable)] if outside else [])


def host_name(name: str, far: bool) -> Iterator[Line]:
    """The address of this node's own name, which torchrun and gloo tell the other nodes."""
    mend = f"an entry for {name} in DNS, or in /etc/hosts on all nodes; or torchrun --local-addr and GLOO_SOCKET_IFNAME"
    try:
        address = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)[0][4][0]
    except OSError as error:
        yield (fail if far else warn)("host name", f"{name} has no address ({one_line(error)})", mend)
        return
    if address.startswith("127.") or address == "::1":
        found = f"{name} is {address}, which no other machine can reach"
        yield fail("host name", found, mend) if far else ok("host name", f"{found}; one machine does not mind")
        return
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as server:
        try:
            server.bind((address, 0))
            server.listen()
            socket.create_connection(server.getsockname()[:2], timeout=5).close()
        except OSError as error:
            yield fail(
                "host name", f"{name} is {address}, which this node itself cannot reach ({one_line(error)})", mend
            )
            return
    yield ok("host name", f"{name} is {address}")


def ports(launched: bool) -> Iterator[Line]:
    """Ports to listen on: any, and the one that torchrun takes unless told otherwise.

    Args:
        launched: torchrun started this process, so that its port is in use for good reason.
    """
    with socket.socket() as any_port:
        any_port.bind(("", 0))
        any_port.listen()
        yield ok("ports", f"can listen (tried {any_port.getsockname()[1]})")
    if launched:
        return
    port = int(os.environ.get("MASTER_PORT", TORCHRUN_PORT))
    with socket.socket() as wanted:
        wanted.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            wanted.bind(("", port))
        except OSError as error:
            found, mend = (
                f"{port} cannot be had ({one_line(error)})",
                "torchrun --master-port with another one; slurm/*.sh choose a free one",
            )
            if "MASTER_PORT" in os.environ:
                yield fail("MASTER_PORT", found, mend)
            else:
                yield warn("torchrun's port", found, mend)


def interfaces() -> Iterator[Line]:
    """The interfaces that the environment tells NCCL and gloo to use."""
    here = [name for _, name in socket.if_nameindex()]
    for variable in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        value = os.environ.get(variable, "")
        if not value or value.startswith("^"):
            continue
        exact = value.startswith("=") or variable.startswith("GLOO")
        wanted = value.lstrip("=").split(",")
        if any(name == want or (name.startswith(want) and not exact) for name in here for want in wanted):
            yield ok(variable, value)
        else:
            yield fail(
                variable,
                f"{value}, but there are {', '.join(here)}",
                f"export {variable}=NAME with one of these, or unset it",
            )


def all_reduce(
    what: str, backend: str, rank: int, size: int, address: str, port: int, limit_s: float
) -> Iterator[Line]:
    """Sum an array over ``size`` processes.

    Args:
        what: the name of the line.
        backend: nccl | gloo.
        rank, size: of this process among the processes.
        address, port: where rank 0 listens; unused for one process.
        limit_s: seconds after which torch gives up.
    """
    import datetime

    try:
        import torch
        import torch.distributed as dist
    except Exception:
        return  # said under GPU
    device = "cuda" if backend == "nccl" else "cpu"
    limit = datetime.timedelta(seconds=limit_s)
    mend = (
        "NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME chooses the interface; no firewall between nodes; NCCL_DEBUG=INFO"
        " says more"
    )
    try:
        store = dist.TCPStore(address, port, size, rank == 0, timeout=limit) if size > 1 else dist.HashStore()
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
        numbers = torch.full((BLOCK,), rank + 1.0, device=device)
        dist.all_reduce(numbers)
        start = time.monotonic()
        dist.all_reduce(numbers)
        total = float(numbers[-1])  # waits for the GPU
        seconds = time.monotonic() - start
    except Exception as error:
        yield fail(what, f"{backend}: {one_line(error)}", mend)
        return
    if total != size * size * (size + 1) / 2:
        yield fail(what, f"{backend}: wrong sum", mend)
    else:
        yield ok(what, f"{backend}, {size} process{'es' if size > 1 else ''}: {BLOCK * 4 / seconds / 1e9:.2f} GB/s")


def wandb(key_file: Path) -> Iterator[Line]:
    mode = os.environ.get("WANDB_MODE")
    host = urlparse(os.environ.get("WANDB_BASE_URL", WANDB)).hostname
    if mode in ("offline", "disabled", "dryrun"):
        yield ok("W&B", f"WANDB_MODE={mode}" + ("" if mode == "disabled" else ": send runs later with wandb sync"))
        return
    key = "WANDB_API_KEY" in os.environ
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        key = key or netrc.netrc(str(key_file)).authenticators(host or "") is not None
    if key:
        yield ok("W&B", f"a key for {host}")
    else:
        yield warn(
            "W&B",
            f"no key for {host}: runs stay on disk",
            "wandb login; or export WANDB_MODE=offline and wandb sync later",
        )


def hugging_face() -> Iterator[Line]:
    """The cache of downloads, which fills homes and their quotas."""
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    place = next(parent for parent in (home, *home.parents) if parent.exists())
    offline = (
        "; HF_HUB_OFFLINE is set" if os.environ.get("HF_HUB_OFFLINE") in ("1", "true", "True", "YES", "ON") else ""
    )
    free = shutil.disk_usage(place).free
    if not os.access(place, os.W_OK):
        yield warn("Hugging Face", f"{home} cannot be written to", "export HF_HOME=DIR with a folder of yours")
    elif free < 5 * GIB:
        yield warn("Hugging Face", f"{home}: {free / GIB:.1f} GiB free", "export HF_HOME=DIR on a larger disk")
    else:
        yield ok("Hugging Face", f"{home}: {free / GIB:.0f} GiB free{offline}")


def reachable() -> Iterator[Line]:
    """Whether models and data sets can be fetched and W&B be reached from here."""
    offline = {
        "HF_ENDPOINT": (HUB, "fetch models and data elsewhere, then export HF_HUB_OFFLINE=1"),
        "WANDB_BASE_URL": (WANDB, "export WANDB_MODE=offline, then wandb sync from a node that has a network"),
    }
    for variable, (default, mend) in offline.items():
        url = os.environ.get(variable, default)
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=8).close()
        except urllib.error.HTTPError:
            pass  # it answered
        except (OSError, ValueError) as error:
            yield warn(url, f"cannot be reached ({one_line(error)})", mend)
            continue
        yield ok(url, "reached")
