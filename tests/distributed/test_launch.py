# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The launcher itself: results, failures, time-outs and real communication."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.support.launch import RankError, model_parallel, run_ranks


def test_results_come_back_by_rank() -> None:
    assert run_ranks(lambda rank, base, factor=1: base + factor * rank, 3, 10, factor=2) == [10, 12, 14]


def test_a_clean_exit_counts_as_none() -> None:
    assert run_ranks(lambda rank: sys.exit(0), 2) == [None, None]


def test_an_exception_names_the_rank_and_stops_its_peers() -> None:
    def worker(rank: int) -> None:
        print(f"rank {rank} was here")
        if rank == 1:
            raise ValueError("bad luck")
        time.sleep(60)

    start = time.monotonic()
    with pytest.raises(RankError, match=r"(?s)rank 1 failed.*ValueError: bad luck.*rank 0 was here"):
        run_ranks(worker, 2)
    assert time.monotonic() - start < 20


def test_a_killed_rank_is_reported() -> None:
    with pytest.raises(RankError, match="rank 0 died of SIGKILL"):
        run_ranks(lambda rank: os.kill(os.getpid(), 9), 1)


@pytest.mark.parametrize("ending", ["time-out", "return", "exception"])
def test_no_process_is_left(ending: str, tmp_path: Path) -> None:
    def worker(rank: int) -> None:
        child = subprocess.Popen(["sleep", "60"])
        (tmp_path / str(rank)).write_text(f"{os.getpid()} {child.pid}")
        if ending == "time-out":
            time.sleep(60)
        assert ending != "exception"

    if ending == "return":
        run_ranks(worker, 2)
    else:
        message = {
            "time-out": r"(?s)time-out: ranks \[0, 1\].*test_launch\.py.* in worker",
            "exception": "AssertionError",
        }
        with pytest.raises(RankError, match=message[ending]):
            run_ranks(worker, 2, timeout=2.0)
    pids = [pid for path in tmp_path.iterdir() for pid in path.read_text().split()]
    assert len(pids) in ((2, 4) if ending == "exception" else (4,))
    deadline = time.monotonic() + 5  # a killed grandchild may be listed until init collects it
    while time.monotonic() < deadline and any(map(_runs, pids)):
        time.sleep(0.05)
    assert not any(map(_runs, pids))


def test_ranks_die_with_the_process_that_started_them(tmp_path: Path) -> None:
    def worker(rank: int) -> None:
        (tmp_path / "pid").write_text(str(os.getpid()))
        time.sleep(60)

    parent = os.fork()
    if parent == 0:
        run_ranks(worker, 1)
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        time.sleep(0.01)
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and _runs((tmp_path / "pid").read_text()):
        time.sleep(0.05)
    assert not _runs((tmp_path / "pid").read_text())


def _runs(pid: str) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_collectives_and_groups() -> None:
    from megatron.core import parallel_state

    def worker(rank: int) -> list[float]:
        results = []
        for tp in (2, 1):  # twice: a rank may initialise again
            with model_parallel(tp=tp):
                value = torch.tensor([float(rank + 1)])
                dist.all_reduce(value, group=parallel_state.get_tensor_model_parallel_group())
                results.append(value.item())
        return results

    assert run_ranks(worker, 2) == [[3.0, 1.0], [3.0, 2.0]]


def test_a_collective_that_waits_for_a_dead_rank_does_not_hang() -> None:
    def worker(rank: int) -> None:
        with model_parallel():
            if rank == 1:
                raise RuntimeError("gone")
            dist.barrier()

    with pytest.raises(RankError, match="RuntimeError: gone"):
        run_ranks(worker, 2, timeout=30.0)


def test_ranks_run_after_this_process_had_groups_of_its_own() -> None:
    from megatron.core import parallel_state

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    try:
        with pytest.raises(RuntimeError, match="destroy the process groups"):
            run_ranks(lambda rank: rank, 1)
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()

    def worker(rank: int) -> int:
        with model_parallel():
            return dist.get_world_size()

    assert run_ranks(worker, 1, timeout=30.0) == [1]
