# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Time the exact scores of all heads of random models, beside a forward pass for every head.

By definition a receiver score takes a forward pass for every head, and a sender score takes two.
``tests/support/naive_patching.py`` does that for tests, without help from the package. ``Naive`` here does the same,
with little besides the passes themselves.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hydra_mcore.config import ModelShape, teacher_card
from hydra_mcore.errors import InputError
from hydra_mcore.heads import Head, every_head
from hydra_mcore.model.build import build_model
from hydra_mcore.model.runtime import process_groups
from hydra_mcore.selection.attribution import attributed_effects
from hydra_mcore.selection.probes import ProbeBatch
from hydra_mcore.selection.receivers import answer_positions, forward_flops, receiver_effects, receiver_flops
from hydra_mcore.selection.senders import SenderRuns, sender_flops
from hydra_mcore.selection.teacher import Teacher, answer_metric
from tools.benchmarks.report import Report

TURNS = 8  # the ways to a score take turns, so that a slow moment of the machine does not fall on one of them
COLUMNS = (
    "layers x heads", "scores", "one forward, s", "all heads, s", "in forwards", "predicted", "by definition, s",
    "heads run",
    "times faster", "predicted", "largest difference",
)  # fmt: skip


def run(args: argparse.Namespace) -> Report:
    """Receiver scores, attribution and one round of sender scores of random models."""
    shapes = [
        ModelShape(
            num_layers=layers, hidden_size=args.hidden, num_heads=heads, num_kv_groups=max(1, heads // 2),
            head_dim=args.head_dim,
            ffn_hidden_size=args.ffn, vocab_size=args.vocabulary, native_length=args.length,
        )
        for layers, heads in args.models
    ]  # fmt: skip
    prompts = Prompts(args.length, args.pairs, args.answer)
    notes = (
        f"Random float32 models: width {args.hidden}, head_dim {args.head_dim}, MLPs {args.ffn}, two heads a kv group."
        f" Prompts of {args.length} tokens, {args.answer} of them the answer; pairs in the batch: {args.pairs}."
        " Predicted: by counting operations. By definition: one forward pass for every head (senders: two) and two"
        " more; the median of the heads run stands for all. Difference: between both ways, the largest, over the"
        " largest score."
    )
    found: list[list[Any]] = []
    for shape in shapes:
        found += rows(shape, prompts, args.naive_heads, args.naive_senders)
    return Report("Seconds of the scores of all heads", notes, COLUMNS, found)


@dataclass(frozen=True)
class Prompts:
    """Sizes of a batch of random pairs."""

    length: int
    pairs: int
    answer: int

    def __post_init__(self) -> None:
        if self.length // 2 <= self.answer:
            raise InputError(
                f"length {self.length}: an answer of {self.answer} tokens leaves no prompt in the second half"
            )

    def batch(self, vocab_size: int, device: torch.device) -> ProbeBatch:
        """The prompts differ from their middle on, up to the answer."""
        clean_bs = torch.randint(vocab_size, (self.pairs, self.length), generator=torch.Generator().manual_seed(6))
        corrupt_bs, changed = clean_bs.clone(), slice(self.length // 2, -self.answer)
        corrupt_bs[:, changed] = (clean_bs[:, changed] + 7) % vocab_size
        answer_bp = clean_bs[:, -self.answer :]
        distractor_bp = (answer_bp + 11) % vocab_size
        return ProbeBatch(
            "random", "random", clean_bs, corrupt_bs, self.length - self.answer, answer_bp, distractor_bp, None
        ).to(device)


def rows(shape: ModelShape, prompts: Prompts, naive_heads: int, naive_senders: int) -> Iterator[list[Any]]:
    """Rows of the table for one random model.

    Args:
        naive_heads, naive_senders: so many heads, drawn at random, are scored by definition too; the median pass stands
            for all.
    """
    with process_groups():
        teacher = _random_teacher(shape)
        batch = prompts.batch(shape.vocab_size, teacher.device)
        yield from _receivers(teacher, batch, shape, naive_heads)
        yield _senders(teacher, batch, shape, naive_senders)


def _random_teacher(shape: ModelShape) -> Teacher:
    """Weights so large that every head does something that no rounding hides."""
    with contextlib.redirect_stdout(sys.stderr):  # Megatron has something to say, the table is on stdout
        model = build_model(teacher_card(shape, "0" * 64)).eval().to(torch.cuda.current_device())
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * noise if parameter.dim() == 1 else noise / shape.hidden_size**0.5)
    return Teacher(model)


class Stopwatch:
    """Seconds of everything that was run, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)

    def time[T](self, name: str, run: Callable[..., T], *args: Any) -> T:
        torch.cuda.synchronize()
        start = time.perf_counter()
        result = run(*args)
        torch.cuda.synchronize()
        self.seconds[name].append(time.perf_counter() - start)
        return result

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])


class Naive:
    """The scores of single heads by their definition: forward passes of the whole model, with hooks."""

    @torch.no_grad()
    def __init__(self, teacher: Teacher, batch: ProbeBatch) -> None:
        self.teacher, self.batch, self.answer = teacher, batch, answer_positions(batch)
        runs = (teacher.run(ids_bs, self.answer, slice(None)) for ids_bs in (batch.clean_bs, batch.corrupt_bs))
        self.clean, self.corrupt = runs
        self.clean_b, self.corrupt_b = (self._metric(run.logits_bpw) for run in (self.clean, self.corrupt))

    def receiver(self, head: Head) -> Tensor:
        """Eq 10, [b]: the head's output of the corrupt run, the clean attention output of all later layers."""
        patched, head_idx = head

        def change(layer_idx: int, heads_sbhd: Tensor) -> Tensor:
            return (
                _with(heads_sbhd, self.corrupt.heads_sbhd[patched], [head_idx]) if layer_idx == patched else heads_sbhd
            )

        return self._effect(change, frozen=range(patched + 1, self.teacher.num_layers))

    def sender(self, receivers: Sequence[Head], head: Head) -> Tensor:
        """Path patching, [b]: passes C and D of ``hydra_mcore/selection/senders.py``."""
        sender_layer, sender = head
        recorded: dict[int, Tensor] = {}

        def record(layer_idx: int, heads_sbhd: Tensor) -> Tensor:
            recorded[layer_idx] = heads_sbhd
            clean_sbhd = self.clean.heads_sbhd[layer_idx]
            return (
                _with(clean_sbhd, self.corrupt.heads_sbhd[layer_idx], [sender])
                if layer_idx == sender_layer
                else clean_sbhd
            )

        def replace(layer_idx: int, heads_sbhd: Tensor) -> Tensor:
            return _with(heads_sbhd, recorded[layer_idx], [receiver for at, receiver in receivers if at == layer_idx])

        self._effect(record)
        return self._effect(replace)

    @torch.no_grad()
    def _effect(self, change: Callable[[int, Tensor], Tensor], frozen: range = range(0)) -> Tensor:
        """One forward pass.

        Args:
            change: layer_idx and what its heads computed [s, b, h, d] -> what they hand to the output projection.
            frozen: layers whose attention output is that of the clean run.
        """

        def hand(layer_idx: int, module: Any, args: tuple) -> tuple:
            return (change(layer_idx, args[0].unflatten(-1, (self.teacher.num_heads, -1))).flatten(2),)

        def keep(layer_idx: int, module: Any, args: tuple, output: tuple) -> tuple:
            return self.clean.attention_sbm[layer_idx].clone(), output[1]  # Megatron adds the residual to it in place

        with contextlib.ExitStack() as hooks:
            for layer_idx, layer in self.teacher.layers.items():
                hooks.enter_context(
                    layer.self_attention.linear_proj.register_forward_pre_hook(partial(hand, layer_idx))
                )
            for layer_idx in frozen:
                hooks.enter_context(
                    self.teacher.layers[layer_idx].self_attention.register_forward_hook(partial(keep, layer_idx))
                )
            patched_b = self._metric(self.teacher.forward(self.batch.clean_bs, self.answer))
        return (self.clean_b - patched_b) / (self.clean_b - self.corrupt_b)

    def _metric(self, logits_bpw: Tensor) -> Tensor:
        ids = (self.batch.answer_bp, self.batch.distractor_bp)
        return answer_metric(*(logits_bpw.gather(-1, ids_bp[..., None])[..., 0] for ids_bp in ids))


def _with(heads_sbhd: Tensor, others_sbhd: Tensor, which: list[int]) -> Tensor:
    """A copy with some heads of the others."""
    return heads_sbhd.index_copy(
        2, torch.tensor(which, dtype=torch.long, device=heads_sbhd.device), others_sbhd[:, :, which]
    )


def _receivers(teacher: Teacher, batch: ProbeBatch, shape: ModelShape, naive_heads: int) -> Iterator[list[Any]]:
    """Rows of the receivers and of attribution, which estimates receivers and senders."""
    watch, naive = Stopwatch(), Naive(teacher, batch)
    ways = {"forward": _forward, "recorded": Naive, "receivers": receiver_effects, "attribution": attributed_effects}
    for run in ways.values():
        run(teacher, batch)  # warms up
    sample = _sample(shape.num_layers, shape.num_heads, naive_heads)
    slow = {}
    for turn in range(TURNS):
        results = {name: watch.time(name, run, teacher, batch) for name, run in ways.items()}
        for head in sample[turn::TURNS]:
            slow[head] = watch.time("naive", naive.receiver, head)
    length, (pairs, answer) = batch.clean_bs.shape[1], batch.answer_bp.shape
    forward = watch.median("forward")
    seconds, predicted = (
        watch.median("receivers"),
        receiver_flops(shape, length, pairs, answer) / pairs / forward_flops(shape, length),
    )
    compared = _by_definition(watch, shape, 1, seconds, predicted, slow, results["receivers"].effects_rlhb[0])
    yield _row(shape, "receivers", forward, seconds, predicted, compared)
    yield _row(
        shape, "attribution", forward, watch.median("attribution"), _attribution_passes(shape, length), ["-"] * 5
    )


def _senders(teacher: Teacher, batch: ProbeBatch, shape: ModelShape, naive_heads: int) -> list[Any]:
    """Row of one round of senders, the sum over layers; the receivers are one head in every fourth layer, from the last
    one down.
    """
    receivers = [(layer_idx, layer_idx % shape.num_heads) for layer_idx in range(shape.num_layers - 1, 0, -4)]
    watch, naive = Stopwatch(), Naive(teacher, batch)
    runs = SenderRuns(teacher, batch, receivers)
    runs.effects(shape.num_layers - 2)  # warms up
    sample = _sample(shape.num_layers - 1, shape.num_heads, naive_heads)  # nothing is above the last layer
    slow, effects = {}, []
    watch.time("recorded", SenderRuns, teacher, batch, receivers)
    for layer_idx in range(shape.num_layers):
        watch.time("forward", _forward, teacher, batch)
        effects.append(watch.time("layer", runs.effects, layer_idx))
        for head in sample:
            if head[0] == layer_idx:
                slow[head] = watch.time("naive", naive.sender, receivers, head)
    length, pairs = batch.clean_bs.shape[1], len(batch.answer_bp)
    seconds = watch.median("recorded") + sum(watch.seconds["layer"])
    predicted = sender_flops(shape, length, pairs) / pairs / forward_flops(shape, length)
    compared = _by_definition(watch, shape, 2, seconds, predicted, slow, torch.stack(effects))
    return _row(shape, f"senders of {len(receivers)}", watch.median("forward"), seconds, predicted, compared)


def _forward(teacher: Teacher, batch: ProbeBatch) -> None:
    with torch.no_grad():
        teacher.forward(batch.clean_bs, answer_positions(batch))


def _sample(layers: int, heads: int, count: int) -> list[Head]:
    everyone = every_head(layers, heads)
    return random.Random(0).sample(everyone, min(count, len(everyone)))


def _attribution_passes(shape: ModelShape, length: int) -> float:
    """Forward passes by operation count; the gradient through residual stream and MLPs alone is left out (few
    positions).

    Two runs are recorded. The gradient takes a forward pass, one backward, which costs the same as no weight has a
    gradient except that the attention products need twice their operations, and the MLPs, which are not kept, once
    more.
    """
    tokens = length * shape.num_layers
    products = tokens * 2 * length * shape.num_heads * shape.head_dim
    mlps = tokens * 6 * shape.hidden_size * shape.ffn_hidden_size
    return 4 + (products + mlps) / forward_flops(shape, length)


def _by_definition(
    watch: Stopwatch,
    shape: ModelShape,
    passes: int,
    seconds: float,
    predicted: float,
    slow: dict[Head, Tensor],
    fast_lhb: Tensor,
) -> list[Any]:
    """The columns of the naive procedure: so many ``passes`` a head, and two to record both runs."""
    heads = shape.num_layers * shape.num_heads
    taken = watch.median("recorded") + heads * watch.median("naive")
    print(
        f"{shape.num_layers} x {shape.num_heads}: {len(slow)} heads in {sum(watch.seconds['naive']):.1f} s",
        file=sys.stderr,
    )
    difference = max(float((slow_b - fast_lhb[head]).abs().max()) for head, slow_b in slow.items()) / float(
        fast_lhb.abs().max()
    )
    faster = [f"{taken / seconds:.1f}", f"{(passes * heads + 2) / predicted:.1f}"]
    return [f"{taken:.2f}", len(slow), *faster, f"{difference:.0e}"]


def _row(
    shape: ModelShape, scores: str, forward: float, seconds: float, predicted: float, compared: list[Any]
) -> list[Any]:
    model = f"{shape.num_layers} x {shape.num_heads}"
    return [
        model,
        scores,
        f"{forward:.3f}",
        f"{seconds:.3f}",
        f"{seconds / forward:.2f}",
        f"{predicted:.2f}",
        *compared,
    ]
