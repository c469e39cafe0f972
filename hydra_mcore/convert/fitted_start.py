# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""A student that starts fitted: what can be solved in closed form is solved before the first training step.

Each layer is fitted on the teacher's own input, as in align, in three steps: every linear head takes the memory and the
value projection with which it imitates the teacher's head best (``model/imitation.py``); fusion scales make every
head's output as large as its imitation is good; and the output projection is regressed on all heads of the layer
together, held near the inherited one. [ours]
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from hydra_mcore.model.hydra_attention import HydraAttention, head_outputs
from hydra_mcore.model.imitation import READS, Memory, Split, Task, imitate, ridge_fit, share, values_input
from hydra_mcore.model.parameters import HeadLinear
from hydra_mcore.ops.chunks import state_dtype
from hydra_mcore.progress import Progress
from hydra_mcore.sequence import SequencePart

MemoryTables = Mapping[str, Sequence[Sequence[Memory]]]  # kind of linear heads -> layer -> head in HF order


class LayerFit(NamedTuple):
    """Squared error of a layer's attention output, as a share of the teacher's, on rows that no fit saw."""

    inherited: float
    fitted: float


def said(fits: list[LayerFit]) -> str:
    """One line that tells the user the error of the inherited and of the fitted start."""
    inherited, fitted = (sum(column) / len(fits) for column in zip(*fits, strict=True))
    worst = max(range(len(fits)), key=lambda layer: fits[layer].fitted)
    return (
        f"error of a layer's attention output on held-out tokens: {inherited:.3f} inherited, {fitted:.3f} fitted (mean"
        f" of {len(fits)} layers; worst: layer {worst}, {fits[worst].fitted:.3f})"
    )


class _Layer(NamedTuple):
    """What the attention of one teacher layer took and gave."""

    x_sbm: Tensor
    rotary: Tensor
    heads_sbhd: Tensor  # before the output projection, in HF order
    out_sbm: Tensor


@torch.no_grad()
def fit_start(
    teacher: GPTModel, student: GPTModel, tokens_bs: Tensor, memories: MemoryTables | None = None
) -> list[LayerFit]:
    """Fit a student that has just inherited, both whole (TP 1, PP 1); one result a layer.

    Args:
        tokens_bs: token ids, four rows at least.
        memories: what to start heads with; all memories of a kind are tried for heads that are not in it.
    """
    split, fits, students = Split.of(len(tokens_bs)), [], enumerate(student.decoder.layers)
    with Progress(total=len(student.decoder.layers), desc="fit", unit="layer") as progress:

        def fit(layer: _Layer) -> None:
            layer_idx, own = next(students)
            known = {kind: table[layer_idx] for kind, table in (memories or {}).items()}
            fits.append(_fit_layer(own.self_attention, layer, split, known))
            progress.update()

        _watch(teacher, tokens_bs, fit)
    return fits


def _watch(teacher: GPTModel, tokens_bs: Tensor, found: Callable[[_Layer], None]) -> None:
    """Run the teacher and hand on its layers one by one, so that only one is kept."""

    def after(
        heads: list[Tensor], module: HydraAttention, args: tuple, keywords: dict[str, Any], output: tuple
    ) -> None:
        heads_sbhd = heads.pop().unflatten(-1, (module.layout.num_heads, -1))
        found(_Layer(args[0], keywords["rotary_pos_emb"], heads_sbhd, output[0]))

    tokens_bs = tokens_bs.to(next(teacher.parameters()).device)
    with contextlib.ExitStack() as hooks:
        for layer in teacher.decoder.layers:
            heads = hooks.enter_context(head_outputs(layer.self_attention))
            hook = partial(after, heads)
            hooks.enter_context(layer.self_attention.register_forward_hook(hook, with_kwargs=True))
        # Of the logits, which nobody reads, one row is made.
        hooks.enter_context(teacher.output_layer.register_forward_pre_hook(lambda _, args: (args[0][-1:], *args[1:])))
        teacher(tokens_bs, torch.arange(tokens_bs.shape[1], device=tokens_bs.device).expand_as(tokens_bs), None)


def _fit_layer(student: HydraAttention, layer: _Layer, split: Split, known: Mapping[str, Sequence[Memory]]) -> LayerFit:
    inherited = _error(student, layer, split)
    for kind in student.branches:
        if kind in READS:
            _fit_heads(student, kind, layer, split, known.get(kind))
    _fit_scales(student, layer, split)
    _fit_projection(student, layer, split)
    return LayerFit(inherited, _error(student, layer, split))


def _fit_heads(student: HydraAttention, kind: str, layer: _Layer, split: Split, known: Sequence[Memory] | None) -> None:
    """Memories and values of a layer's heads of a kind; none where heads share their values.

    A head takes the ``known`` memory where it can start with it.
    """
    branch = student.branches[kind]
    if not isinstance(branch.linear_kv, HeadLinear):
        return
    x_bsm = values_input(layer.x_sbm.transpose(0, 1), student.config.add_qkv_bias)
    parts = branch.queries_keys_values(layer.x_sbm, SequencePart(len(layer.x_sbm)), layer.rotary)
    q_hbsd, k_hbsd, v_hbsd = (_precise(t.permute(2, 1, 0, 3)) for t in parts)
    for place, head_idx in enumerate(student.layout.layer[kind]):
        out_bsd = _precise(layer.heads_sbhd[:, :, head_idx].transpose(0, 1))
        task = Task(q_hbsd[place], k_hbsd[place], v_hbsd[place], out_bsd)
        memories = branch.memories(place)
        if known is not None and known[head_idx] in memories:
            memories = [known[head_idx]]
        branch.start_as(place, imitate(kind, task, x_bsm, split, memories))


def _fit_scales(student: HydraAttention, layer: _Layer, split: Split) -> None:
    """Every head's factor that brings it nearest to the teacher's head, none where fusion has no scales."""
    if not hasattr(student.fusion, "scale"):
        return
    found_sbhd = _mixed(student, layer)[0].unflatten(-1, (student.layout.num_heads, -1))[:, split.fit]
    wanted_sbhd = layer.heads_sbhd[:, split.fit, list(student.layout.layer.heads)]
    products_h, squares_h = ((found_sbhd * t).double().sum(dim=(0, 1, 3)) for t in (wanted_sbhd, found_sbhd))
    student.fusion.scale.weight.mul_((products_h / squares_h.clamp(min=1e-30)).to(student.fusion.scale.weight.dtype))


def _fit_projection(student: HydraAttention, layer: _Layer, split: Split) -> None:
    heads_sbx, out_sbm = _mixed(student, layer)
    missing_bsm = _precise((layer.out_sbm - out_sbm).transpose(0, 1))
    _, _, change_xm = ridge_fit(_precise(heads_sbx.transpose(0, 1)), missing_bsm, split)
    student.linear_proj.weight.add_(change_xm.T)


def _error(student: HydraAttention, layer: _Layer, split: Split) -> float:
    out_sbm = _mixed(student, layer)[1]
    return share((layer.out_sbm - out_sbm)[:, split.report], layer.out_sbm[:, split.report])


def _mixed(student: HydraAttention, layer: _Layer) -> tuple[Tensor, Tensor]:
    """What enters the student's output projection, and what leaves it."""
    with head_outputs(student) as heads:
        out_sbm = student(layer.x_sbm, rotary_pos_emb=layer.rotary)[0]
    return heads[0], out_sbm


def _precise(x: Tensor) -> Tensor:
    return x.to(state_dtype(x))
