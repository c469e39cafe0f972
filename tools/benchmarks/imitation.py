# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Measure what a linear head cannot imitate of each layer's heads, and where the error comes from.

A linear head reads values linearly. So its best values follow in closed form (``hydra_mcore/model/imitation.py``). An
idea for a better head can be judged before it is built: put its way of reading in the place of the delta rule.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from hydra_mcore.errors import InputError
from hydra_mcore.model.build import load_model
from hydra_mcore.model.imitation import Memory, Split, Task, delta_rule, fit_values, imitate
from hydra_mcore.model.runtime import process_groups
from hydra_mcore.progress import Progress
from hydra_mcore.ruler.haystack import Haystack, read_text
from hydra_mcore.ruler.material import PromptMaterial
from hydra_mcore.ruler.wording import own_wording
from hydra_mcore.selection.replaceability import ROW_LENGTH, head_inputs, rows_to_imitate
from hydra_mcore.selection.teacher import Teacher
from hydra_mcore.tokenizer import load_tokenizer
from tools.benchmarks.report import Report

HARD = 0.5  # of a head's output left by a GDN head
TAPS = 4  # of a short convolution
MIXES = (-0.5, 0.5, 1.0)  # how much of the row before a key or query may hold
SHARPNESS = (4.0, 16.0)
WINDOW, SINKS = 64, 4  # tokens
NOTES = (
    f"Share of a head's output that is left on held-out tokens, mean of a layer's heads; the last row: heads of which a"
    f" GDN head leaves more than {HARD}. All read by the teacher's queries and keys; all but the first column have the"
    f' best values. The columns behind "values" change one thing each: values of {TAPS} tokens; keys, or keys and'
    " queries, mixed with those of the token before; delta rule over the kernel (q k)^2, or exp(a (q k - 1)); the"
    " reading times what the teacher's softmax does not give to the first token; both; the last"
    f" {WINDOW} tokens by softmax; these and the first {SINKS}; these and a GDN head's reading; the teacher's"
    " exponentials without their sum."
)
Read = Callable[[Tensor], Tensor]  # values [b, s, v] -> what is read out of them [b, s, v]


def run(args: argparse.Namespace) -> Report:
    if args.length > ROW_LENGTH:
        raise InputError(f"--length {args.length}: rows have {ROW_LENGTH} tokens at most, as head selection's have")
    tokenizer = load_tokenizer(args.teacher)
    haystack = Haystack.of(tokenizer, read_text(tokenizer, args.text))
    material = PromptMaterial(tokenizer, own_wording(args.teacher), haystack)
    ids_bs = rows_to_imitate(material, args.length, args.seed)
    with process_groups(), torch.no_grad():
        card, model = load_model(args.teacher)
        layers = range(card.shape.num_layers) if args.layers is None else args.layers
        if strange := set(layers) - set(range(card.shape.num_layers)):
            raise InputError(f"--layers {min(strange)}: the model has layers 0 to {card.shape.num_layers - 1}")
        heads = dict(layer_rows(Teacher(model.eval()), ids_bs, layers))
    return report(heads)


def report(heads: dict[int, list[dict[str, float]]]) -> Report:
    """A row a layer and one for the heads that are hard."""
    every = list(itertools.chain.from_iterable(heads.values()))
    hard = [head for head in every if head["values"] > HARD]
    named = [(f"layer {layer}", of_layer) for layer, of_layer in heads.items()]
    named += [("mean", every)] + ([(f"{len(hard)} hard heads", hard)] if hard else [])
    rows = [
        [name, *(f"{statistics.mean(head[way] for head in of_layer):.2f}" for way in every[0])]
        for name, of_layer in named
    ]
    return Report("What is left of heads, by what a linear head is given", NOTES, ("", *every[0]), rows)


def layer_rows(
    teacher: Teacher, ids_bs: Tensor, layers: range | list[int]
) -> Iterator[tuple[int, list[dict[str, float]]]]:
    """For each layer and each of its heads what every way leaves."""
    hidden_sbm = teacher.run(ids_bs, slice(-1, None), slice(None), only="residual_sbm").residual_sbm
    for layer_idx in layers:
        found = head_inputs(teacher, layer_idx, hidden_sbm[layer_idx])
        raw = zip(found.q_hbsd, found.k_hbsd, strict=True)
        heads = zip(found.tasks(), raw, strict=True)
        progress = Progress(heads, desc=f"layer {layer_idx}", unit="head", total=len(found.q_hbsd), leave=False)
        yield layer_idx, [left(task, q_bsd @ k_bsd.mT, found.x_bsm) for task, (q_bsd, k_bsd) in progress]


def left(task: Task, products_bss: Tensor, x_bsm: Tensor) -> dict[str, float]:
    """What every way leaves of one head.

    Args:
        products_bss: of the teacher's queries and keys, not scaled.
    """
    split = Split.of(len(x_bsm))
    first = imitate("gdn", task, x_bsm, split)
    memory, found = first.memory, {"inherited values": first.inherited, "values": first.residual}
    logits_bss = products_bss / math.sqrt(task.q_bsd.shape[-1])
    shifted_bsx = torch.cat([F.pad(x_bsm, (0, 0, tap, 0))[:, : x_bsm.shape[1]] for tap in range(TAPS)], dim=-1)
    for way, (given_bsx, candidates) in ways(memory, task, logits_bss, x_bsm, shifted_bsx).items():
        best = []
        for reads in candidates:
            features_bsx = torch.cat([read(given_bsx) for read in reads], dim=-1)
            best.append(fit_values(memory, features_bsx, reads[0](task.v_bsd), task.out_bsd, split))
        found[way] = min(best, key=lambda fit: fit[0])[1].residual
    return found


def ways(
    memory: Memory, task: Task, logits_bss: Tensor, x_bsm: Tensor, shifted_bsx: Tensor
) -> dict[str, tuple[Tensor, list[list[Read]]]]:
    """Name -> what values are made of, and candidates of which the best counts; what the reads of one candidate give
    adds up.
    """
    q, k = task.q_bsd, task.k_bsd
    qk_bss, kk_bss = q @ k.mT, k @ k.mT
    weights_bss = softmax(logits_bss)
    gate_bs1 = 1 - weights_bss[:, :, :1]

    def rule(q_bsd: Tensor, k_bsd: Tensor) -> Read:
        return lambda values_bsv: delta_rule(memory, q_bsd, k_bsd, values_bsv)

    def kernel(of: Callable[[Tensor], Tensor]) -> Read:
        return lambda values_bsv: kernel_delta_rule(memory, of(qk_bss), of(kk_bss), values_bsv)

    def gated(read: Read) -> Read:
        return lambda values_bsv: gate_bs1 * read(values_bsv)

    def weighted(by_bss: Tensor) -> Read:
        return lambda values_bsv: by_bss @ values_bsv

    mixed = [(mixed_with_last(q, mix), mixed_with_last(k, mix)) for mix in MIXES]
    sharp = [kernel(lambda t, a=a: torch.exp(a * (t - 1))) for a in SHARPNESS]
    window, with_sinks = weighted(softmax(logits_bss, WINDOW)), weighted(softmax(logits_bss, WINDOW, SINKS))
    bare_bss = torch.exp(logits_bss - logits_bss.tril().amax()).tril()
    found = {
        "convolved k, q": [[rule(q, k1)] for _, k1 in mixed] + [[rule(q1, k1)] for q1, k1 in mixed],
        "(q k)^2": [[kernel(torch.square)]],
        "exp(q k)": [[read] for read in sharp],
        "sink gate": [[gated(rule(q, k))]],
        "exp, sink gate": [[gated(read)] for read in sharp],
        "window": [[window]],
        "and sinks": [[with_sinks]],
        "and GDN": [[with_sinks, rule(q, k)]],
        "no sum": [[weighted(bare_bss)]],
    }
    return {"values of 4": (shifted_bsx, [[rule(q, k)]])} | {way: (x_bsm, reads) for way, reads in found.items()}


def kernel_delta_rule(memory: Memory, qk_bss: Tensor, kk_bss: Tensor, values_bsv: Tensor) -> Tensor:
    """The delta rule with constant gates where keys and queries meet through a kernel: [b, s, v].

    Args:
        qk_bss, kk_bss: the kernel of each query and each key with each key.
    """
    steps_s = torch.arange(qk_bss.shape[-1], dtype=torch.float64, device=qk_bss.device)
    decay_ss = torch.exp2((steps_s - steps_s[:, None]).clamp(max=0) / memory.half_life).to(qk_bss)
    lower_bss = memory.write * (kk_bss * decay_ss).tril(-1)
    written_bsv = torch.linalg.solve_triangular(lower_bss, memory.write * values_bsv, upper=False, unitriangular=True)
    return (qk_bss * decay_ss).tril() @ written_bsv


def softmax(logits_bss: Tensor, window: int | None = None, sinks: int = 0) -> Tensor:
    """Causal attention weights over the last ``window`` tokens and the first ``sinks``; over all without a window."""
    s = logits_bss.shape[-1]
    seen_ss = torch.ones(s, s, dtype=torch.bool, device=logits_bss.device).tril()
    if window is not None:
        near_ss = seen_ss.triu(1 - window)
        near_ss[:, :sinks] = True
        seen_ss &= near_ss
    return logits_bss.masked_fill(~seen_ss, -math.inf).softmax(dim=-1)


def mixed_with_last(x_bsd: Tensor, mix: float) -> Tensor:
    """Every token's vector and so much of the one before, at unit length."""
    return F.normalize(x_bsd + mix * F.pad(x_bsd, (0, 0, 1, 0))[:, :-1], dim=-1)
