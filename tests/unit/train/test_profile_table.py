# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The table of parts, from traces written by hand: a GPU's among them, whose kernels and threads no CPU has."""

from typing import Any

import pytest

from hydra_mcore.train.profile_table import NODE, Owner, profile_table

MAIN, ENGINE = 10, 20  # threads: the step's, and the one that runs backward on a GPU
FORWARD_THREAD = 1  # autograd's own number of MAIN


def event(name: str, start: float, end: float, cat: str = "cpu_op", tid: int = MAIN, **args: Any) -> dict[str, Any]:
    return {"ph": "X", "name": name, "ts": start, "dur": end - start, "cat": cat, "tid": tid, "args": args}


def range_of(name: str, start: float, end: float) -> dict[str, Any]:
    return event(name, start, end, "user_annotation")


def launch(start: float, correlation: int, tid: int = MAIN) -> dict[str, Any]:
    return event("cudaLaunchKernel", start, start + 1, "cuda_runtime", tid, correlation=correlation)


def kernel(microseconds: float, correlation: int, name: str = "gemm", cat: str = "kernel") -> dict[str, Any]:
    return event(name, 5000, 5000 + microseconds, cat, tid=7, correlation=correlation)


def node(name: str, start: float, end: float, number: int, tid: int = MAIN) -> list[dict[str, Any]]:
    """A backward operation as the profiler writes it: the engine's call, the operation inside, the end of its arrow."""
    args = {"Sequence number": number, "Fwd thread id": FORWARD_THREAD}
    end_of_arrow = {"ph": "f", "cat": "fwdbwd", "name": "fwdbwd", "id": number, "tid": tid, "ts": start + 1}
    return [
        event(NODE + name, start, end, tid=tid, **args),
        event(name, start + 1, end - 1, tid=tid, **args),
        end_of_arrow,
    ]


def made_by(name: str, start: float, end: float, number: int) -> list[dict[str, Any]]:
    """A forward operation and the start of its arrow."""
    arrow = {"ph": "s", "cat": "fwdbwd", "name": "fwdbwd", "id": number, "tid": MAIN, "ts": start}
    return [event(name, start, end, **{"Sequence number": number, "Fwd thread id": 0}), arrow]


def microseconds(events: list[dict[str, Any]]) -> dict[tuple[str, str], float]:
    table = profile_table(events)
    return {(owner.part, owner.of_pass): seconds * 1e6 for owner, seconds in table.seconds.items()}


def test_every_moment_of_a_cpu_step_is_dealt_once() -> None:
    events = [
        range_of("part: MLP", 0, 50),  # before the step: not counted
        range_of("step: 3", 100, 1100),
        range_of("part: data", 100, 110),
        range_of("teacher: rest of the model", 120, 300),
        range_of("teacher: MLP", 150, 200),
        range_of("part: loss", 210, 220),  # the student's, called from inside the teacher
        event("c10d::allreduce_", 230, 240),
        range_of("part: communication", 240, 245),  # the wait
        range_of("part: rest of the model", 300, 500),
        range_of("part: MLP", 310, 400),
        *made_by("aten::mm", 320, 330, number=5),
        range_of("backward pass", 600, 900),
        *node("MmBackward0", 610, 700, number=5),
        range_of("part: conv", 650, 670),  # computed again inside
        event("c10d::reduce_scatter_", 680, 685),
        event(NODE + "torch::autograd::AccumulateGrad", 710, 730),
        range_of("part: communication", 715, 718),
        range_of("part: optimizer", 1000, 1050),
        event("gloo:all_reduce", 0, 5000, "user_annotation", tid=99),  # another thread waits and works for itself
    ]
    found = microseconds(events)
    assert found == pytest.approx(
        {
            ("data", "outside"): 10,
            ("rest of the model", "teacher"): 180 - 50 - 10 - 15,
            ("MLP", "teacher"): 50,
            ("loss", "forward"): 10,
            ("communication", "teacher"): 15,
            ("rest of the model", "forward"): 200 - 90,
            ("MLP", "forward"): 90,
            ("MLP", "backward"): 90 - 20 - 5,
            ("conv", "recomputed"): 20,
            ("communication", "backward"): 5 + 3,
            ("gradients", "backward"): 20 - 3,
            ("other", "backward"): 300 - 90 - 20,
            ("optimizer", "outside"): 50,
            ("other", "outside"): 10 + 100 + 100 + 50,
        }
    )
    table = profile_table(events)
    assert (table.device, table.steps) == ("cpu", 1)
    assert table.total == pytest.approx(table.wall_seconds) == pytest.approx(1e-3)


def test_gpu_time_counts_where_it_was_launched() -> None:
    events = [
        launch(50, 99),  # before the step
        range_of("step: 3", 100, 1100),
        range_of("part: FA attention", 200, 300),
        *made_by("aten::attention", 210, 250, number=8),
        launch(215, 1),
        *node("AttentionBackward0", 400, 500, number=8, tid=ENGINE),
        launch(410, 2, tid=ENGINE),
        event(NODE + "torch::autograd::AccumulateGrad", 510, 530, tid=ENGINE),
        launch(515, 3, tid=ENGINE),
        launch(600, 4),
        *(kernel(*of) for of in ((30, 1), (70, 2), (5, 3), (1000, 99), (9, 1234))),
        kernel(40, 2, "ncclDevKernel_ReduceScatter"),
        kernel(6, 4, "Memcpy HtoD", "gpu_memcpy"),
    ]
    assert microseconds(events) == pytest.approx(
        {
            ("FA attention", "forward"): 30,
            ("FA attention", "backward"): 70,
            ("communication", "backward"): 40,
            ("gradients", "backward"): 5,
            ("other", "outside"): 6,
        }
    )
    table = profile_table(events)
    assert table.device == "gpu" and table.wall_seconds == pytest.approx(1e-3)
    assert sum(map(table.share, {owner.part for owner in table.seconds})) == pytest.approx(1)


def test_checkpointed_layers_run_backward_inside_backward() -> None:
    """Megatron's recompute is one operation whose backward computes the layer again and differentiates it."""
    events = [
        range_of("step: 1", 0, 1000),
        range_of("part: rest of the model", 0, 100),
        *made_by("CheckpointFunction", 10, 90, number=1),
        range_of("part: MLP", 20, 80),
        range_of("backward pass", 200, 900),
        *node("CheckpointFunctionBackward", 200, 900, number=1),
        range_of("part: MLP", 300, 400),
        *made_by("aten::mm", 310, 320, number=2),
        range_of("backward pass", 500, 800),
        *node("MmBackward0", 510, 710, number=2),
    ]
    found = microseconds(events)
    assert (found["MLP", "recomputed"], found["MLP", "backward"]) == pytest.approx((100, 200))
    assert found["rest of the model", "backward"] == pytest.approx(700 - 100 - 200)


def test_markdown_shows_the_sum_and_leaves_out_what_took_no_time() -> None:
    table = profile_table(
        [range_of("step: 1", 0, 1000), range_of("part: MLP", 0, 250), range_of("step: 2", 1000, 3000)]
    )
    assert table.of("MLP") == pytest.approx(250e-6) and table.seconds[Owner("MLP", "forward")] == table.of(
        "MLP", "forward"
    )
    lines = table.to_markdown().splitlines()
    assert lines[0] == "Milliseconds of CPU time a step, over 2 steps of 1.50 ms."
    assert lines[2] == "| part | forward | outside | all | share |"
    assert lines[4:] == [
        "| MLP | 0.12 | 0.00 | 0.12 | 8.3% |",
        "| other | 0.00 | 1.38 | 1.38 | 91.7% |",
        "| all | 0.12 | 1.38 | 1.50 | 100.0% |",
    ]
    parts = table.to_dict()["parts"]
    assert sum(sum(passes.values()) for passes in parts.values()) == pytest.approx(3e-3)
