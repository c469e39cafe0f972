# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Profile a window of training steps (``--profile``): a trace to look at, and a table by part.

The parts are ranges of torch's profiler around modules and functions, put on for the window and taken off behind it: a
step that is not profiled pays nothing, and the code that is measured does not know of it.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import schedules
from megatron.core.transformer.mlp import MLP
from megatron.core.utils import unwrap_model
from megatron.training import training
from torch.profiler import ProfilerActivity, record_function

from hydra_mcore.files import replacing, write_json, write_text
from hydra_mcore.kinds import KINDS
from hydra_mcore.model.branch import branch_class
from hydra_mcore.model.fusion import Fusion
from hydra_mcore.model.hydra_attention import HydraAttention, OutputProjection, SharedKeysValues
from hydra_mcore.model.parameters import GroupLinear, HeadLinear, RMSNorm
from hydra_mcore.model.short_conv import ShortConv
from hydra_mcore.train import align, step
from hydra_mcore.train.profile_table import BACKWARD, RANGE, STEP, TEACHER, ProfileTable, core_name, read_table
from hydra_mcore.train.step import TransferStep

FOLDER = "profile"
BRANCHES = {kind: branch_class(kind) for kind in KINDS}
PART_OF_MODULE: dict[type, str] = {
    **{branch: f"{KINDS[kind].label} rest" for kind, branch in BRANCHES.items()},
    **{branch.core: core_name(kind) for kind, branch in BRANCHES.items() if not isinstance(branch.core, str)},
    ShortConv: "conv",
    Fusion: "fusion",
    HeadLinear: "projections",
    GroupLinear: "projections",
    SharedKeysValues: "projections",
    OutputProjection: "projections",
    MLP: "MLP",
    LanguageModelEmbedding: "embedding",
    HydraAttention: "rest of the model",
    GPTModel: "rest of the model",
}
# What is no module, as its caller finds it: (owner, attribute, name of the range).
CALLS: tuple[tuple[Any, str, str], ...] = (
    *(
        (sys.modules[branch.__module__], branch.core, RANGE + core_name(kind))
        for kind, branch in BRANCHES.items()
        if isinstance(branch.core, str)
    ),
    (step, "token_loss", RANGE + "loss"),
    (align, "align_loss", RANGE + "loss"),
    (align.GradientAtOnce, "apply", RANGE + "rest of the model"),  # stands inside the teacher, but is the student's
    (torch.autograd, "backward", BACKWARD),
    (torch.autograd, "grad", BACKWARD),
    (schedules, "custom_backward", BACKWARD),  # Megatron's own way into autograd's engine
    (torch.distributed.Work, "wait", RANGE + "communication"),  # the calls themselves are operations: c10d::...
)


def profiled(
    call: Callable[[], object], models: Iterable[torch.nn.Module], teachers: Iterable[torch.nn.Module] = ()
) -> ProfileTable:
    """Run ``call()`` once and say where its time went; warm up before.

    Args:
        models: whose modules are told apart by part; any module that holds parts of our layers.
        teachers: likewise; their time is listed as the teacher's.
    """
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        with recording(trace, models, teachers), record_function(f"{STEP}1"):
            call()
        return read_table(trace)


@contextlib.contextmanager
def recording(
    trace: Path,
    models: Iterable[torch.nn.Module],
    teachers: Iterable[torch.nn.Module] = (),
    calls: Iterable[tuple[Any, str, str]] = (),
) -> Iterator[None]:
    """Write what runs inside to the Chrome trace ``trace`` (.json or .json.gz), with the ranges of all parts.

    Each step is to be marked by a range named ``STEP`` + its number. Nothing is written when an error passes through.

    Args:
        calls: more ranges: (owner, attribute, name).
    """
    with_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * with_gpu
    with contextlib.ExitStack() as ranges:
        for owner, attribute, name in (*CALLS, *calls):
            ranges.enter_context(_ranged(owner, attribute, name))
        for prefix, roots in ((RANGE, models), (TEACHER, teachers)):
            for module, part in itertools.chain.from_iterable(map(_parts, roots)):
                ranges.enter_context(_ranged(module, "forward", prefix + part))
        with torch.profiler.profile(activities=activities) as profiler:
            yield
            if with_gpu:
                torch.cuda.synchronize()
    with replacing(trace) as beside, tempfile.TemporaryDirectory(dir=trace.parent) as folder:
        written = Path(folder) / trace.name  # torch compresses by the name's end
        profiler.export_chrome_trace(str(written))
        written.replace(beside)


def _parts(root: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, str]]:
    """Every module of a model that is a part; norms inside the heads and the fusion belong to these."""
    for name, module in root.named_modules():
        if (part := PART_OF_MODULE.get(type(module))) is not None:
            yield module, part
        elif isinstance(module, RMSNorm) and name.endswith("layernorm"):
            yield module, "norms"


@contextlib.contextmanager
def _ranged(owner: Any, attribute: str, name: str) -> Iterator[None]:
    """While open, every call of ``owner.attribute`` is a range of that name."""
    stock, own = getattr(owner, attribute), vars(owner).get(attribute)

    @functools.wraps(stock)
    def call(*args: Any, **keywords: Any) -> Any:
        with record_function(name):
            return stock(*args, **keywords)

    setattr(owner, attribute, call)
    try:
        yield
    finally:
        if own is None:  # it came from the class
            delattr(owner, attribute)
        else:
            setattr(owner, attribute, own)


@contextlib.contextmanager
def profiled_steps(args: argparse.Namespace, step: TransferStep) -> Iterator[None]:
    """While open, Megatron's training loop is profiled as ``--profile`` asks: on some ranks, for a window of steps.

    The flags are Megatron's: ``--profile-step-start`` 2 and ``--profile-step-end`` 4 are steps 3 and 4. Megatron's own
    profiler is switched off, except where the process was started by nsys, which finds what it knows.
    """
    wanted = args.profile and "NSYS_PROFILING_SESSION_ID" not in os.environ
    args.profile = args.profile and not wanted
    if not wanted or args.rank not in args.profile_ranks:
        yield
        return
    stock, first, last = training.train_step, args.profile_step_start + 1, args.profile_step_end
    trace = Path(args.save) / FOLDER / f"trace-rank{args.rank}.json.gz"
    window = contextlib.ExitStack()

    def train_step(
        forward: Any, data: Any, models: list[torch.nn.Module], optimizer: Any, *rest: Any, **keywords: Any
    ) -> Any:
        number = keywords["iteration"] + 1
        if (late := args.iteration >= first) and number == args.iteration + 1:
            print(f" nothing is profiled: step {first} was before this start of the run", flush=True)
        if late or not first <= number <= last:
            return stock(forward, data, models, optimizer, *rest, **keywords)
        if number == first:
            calls = [(step, "fetch", RANGE + "data"), (optimizer, "step", RANGE + "optimizer")]
            window.enter_context(recording(trace, unwrap_model(models), step.teachers.values(), calls))
        with record_function(f"{STEP}{number}"):
            outcome = stock(forward, data, models, optimizer, *rest, **keywords)
        if number == last:
            window.close()
            _report(trace, args.rank)
        return outcome

    training.train_step = train_step
    try:
        with window:
            yield
    finally:
        training.train_step = stock


def _report(trace: Path, rank: int) -> None:
    """The table beside the trace, and on the console."""
    table = read_table(trace)
    write_json(trace.with_name(f"parts-rank{rank}.json"), table.to_dict())
    text = table.to_markdown()
    write_text(trace.with_name(f"parts-rank{rank}.md"), text)
    print(f"\nprofile of rank {rank} ({trace}):\n{text}", flush=True)
