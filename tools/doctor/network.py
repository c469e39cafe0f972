# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The network of one node: names, ports, interfaces, a collective, and the services outside."""

import contextlib
import datetime
import netrc
import os
import shutil
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlparse

from tools.doctor.lines import GIB, Line, fail, ok, one_line, warn

BLOCK = 1 << 20  # numbers in the array that is summed
HUB, WANDB = "https://huggingface.co", "https://api.wandb.ai"


def host_name(name: str, far: bool) -> Iterator[Line]:
    """The address of this node's own name, which torchrun and gloo tell the other nodes."""
    fix = f"an entry for {name} in DNS, or in /etc/hosts on all nodes; or torchrun --local-addr and GLOO_SOCKET_IFNAME"
    try:
        address = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)[0][4][0]
    except OSError as error:
        yield (fail if far else warn)("host name", f"{name} has no address ({one_line(error)})", fix)
        return
    if address.startswith("127.") or address == "::1":
        found = f"{name} is {address}, which no other machine can reach"
        yield fail("host name", found, fix) if far else ok("host name", f"{found}; one machine does not mind")
        return
    try:
        with socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET) as server:
            socket.create_connection(server.getsockname()[:2], timeout=5).close()
    except OSError as error:
        found = f"{name} is {address}, which this node itself cannot reach ({one_line(error)})"
        yield fail("host name", found, fix)
    else:
        yield ok("host name", f"{name} is {address}")


def interfaces() -> Iterator[Line]:
    """The interfaces that the environment tells NCCL and gloo to use."""
    here = [name for _, name in socket.if_nameindex()]
    for variable in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        value = os.environ.get(variable, "")
        if not value or value.startswith("^"):
            continue
        exact = value.startswith("=") or variable.startswith("GLOO")
        wanted = tuple(value.lstrip("=").split(","))
        if any(name in wanted or (name.startswith(wanted) and not exact) for name in here):
            yield ok(variable, value)
        else:
            fix = f"export {variable}=NAME with one of these, or unset it"
            yield fail(variable, f"{value}, but there are {', '.join(here)}", fix)


def all_reduce(backend: str, rank: int, size: int, address: str, port: int, limit_s: float) -> Iterator[Line]:
    """Sum an array over ``size`` processes.

    Args:
        backend: nccl | gloo.
        rank, size: of this process among the processes.
        address, port: where rank 0 listens; unused for one process.
        limit_s: seconds after which torch gives up.
    """
    try:
        import torch
        import torch.distributed as dist
    except Exception:
        return  # said under GPU
    device, limit = "cuda" if backend == "nccl" else "cpu", datetime.timedelta(seconds=limit_s)
    try:
        store = dist.TCPStore(address, port, size, rank == 0, timeout=limit) if size > 1 else dist.HashStore()
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
        numbers = torch.full((BLOCK,), rank + 1.0, device=device)
        dist.all_reduce(numbers)
        start = time.monotonic()
        dist.all_reduce(numbers)
        total = float(numbers[-1])  # waits for the GPU
        seconds = time.monotonic() - start
        if total != size * size * (size + 1) / 2:
            raise ArithmeticError("wrong sum")
    except Exception as error:
        fix = "NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME; no firewall between nodes; NCCL_DEBUG=INFO says more"
        yield fail("all-reduce", f"{backend}: {one_line(error)}", fix)
    else:
        processes = f"{size} process{'es' if size > 1 else ''}"
        yield ok("all-reduce", f"{backend}, {processes}: {BLOCK * 4 / seconds / 1e9:.2f} GB/s")


def wandb() -> Iterator[Line]:
    mode = os.environ.get("WANDB_MODE")
    host = urlparse(os.environ.get("WANDB_BASE_URL", WANDB)).hostname
    if mode in ("offline", "disabled", "dryrun"):
        yield ok("W&B", f"WANDB_MODE={mode}" + ("" if mode == "disabled" else ": send runs later with wandb sync"))
        return
    key = "WANDB_API_KEY" in os.environ
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        key = key or netrc.netrc(os.environ.get("NETRC")).authenticators(host or "") is not None
    if key:
        yield ok("W&B", f"a key for {host}")
    else:
        fix = "wandb login; or export WANDB_MODE=offline and wandb sync later"
        yield warn("W&B", f"no key for {host}: runs stay on disk", fix)


def hugging_face() -> Iterator[Line]:
    """The cache of downloads, which fills homes and their quotas."""
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    place = next(parent for parent in (home, *home.parents) if parent.exists())
    free = shutil.disk_usage(place).free
    if not os.access(place, os.W_OK):
        yield warn("Hugging Face", f"{home} cannot be written to", "export HF_HOME=DIR with a folder of yours")
    elif free < 5 * GIB:
        yield warn("Hugging Face", f"{home}: {free / GIB:.1f} GiB free", "export HF_HOME=DIR on a larger disk")
    else:
        yield ok("Hugging Face", f"{home}: {free / GIB:.0f} GiB free")


def reachable() -> Iterator[Line]:
    """Whether models and data sets can be fetched and W&B be reached from here."""
    offline = {
        "HF_ENDPOINT": (HUB, "fetch models and data elsewhere, then export HF_HUB_OFFLINE=1"),
        "WANDB_BASE_URL": (WANDB, "export WANDB_MODE=offline, then wandb sync from a node that has a network"),
    }
    for variable, (default, fix) in offline.items():
        url = os.environ.get(variable, default)
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=8).close()
        except urllib.error.HTTPError:
            pass  # it answered
        except (OSError, ValueError) as error:
            yield warn(url, f"cannot be reached ({one_line(error)})", fix)
            continue
        yield ok(url, "reached")
