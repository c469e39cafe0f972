# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""A teacher and a head map become a student: every value that the student can take over, it takes over.

Whole heads move, never single rows: head h of a group reads K/V group floor(h / heads per group), so a head that has
keys and values of its own gets a copy of exactly that group's rows (HALO Eq 13). Everything the teacher does not have
(output gates, decay and write gates, short convolutions, fusion norms) keeps the start that its constructor gave it.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from hydra_mcore.config import ConfigError, HydraOptions, ModelCard
from hydra_mcore.convert.fitted_start import MemoryTables, fit_start, said
from hydra_mcore.convert.output_folder import HEAD_MAP_NAME, check_target, new_folder
from hydra_mcore.convert.tokenizer_files import TOKENIZER_DIR
from hydra_mcore.errors import InputError
from hydra_mcore.heads import HeadMap
from hydra_mcore.kinds import FA, KINDS
from hydra_mcore.model.build import build_model, load_model
from hydra_mcore.model.checkpoints import save_weights
from hydra_mcore.model.hydra_attention import HydraAttention
from hydra_mcore.model.imitation import FEWEST_ROWS
from hydra_mcore.progress import Progress
from hydra_mcore.shape import ModelShape

SCALED_FUSIONS = ("scale", "competition")


def hybridize(
    teacher_dir: str | Path,
    head_map: HeadMap,
    options: HydraOptions,
    student_dir: str | Path,
    calibration_tokens_bs: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    start: str = "inherited",
    memories: MemoryTables | None = None,
) -> ModelCard:
    """Write the student's checkpoint, its head map and the tokenizer; needs process groups of TP 1 and PP 1.

    Args:
        calibration_tokens_bs: token ids that the fusion scales are set by, without which these stay 1, or that a fitted
            start is fitted on.
        start: "inherited", or "fitted" (``fit_start``).
        memories: for a fitted start, as in ``fit_start``.

    Raises:
        InputError: the teacher is no imported checkpoint, the head map is for another model, the tokens do not fit
            the model or are too few to fit on, or the target already holds a checkpoint.
    """
    check_target(student_dir)
    card = ModelCard.load(teacher_dir)
    if card.head_map.num_fa != card.shape.num_layers * card.shape.num_heads or card.options != HydraOptions.teacher():
        raise ConfigError(
            f"{teacher_dir}: a {card.stage} checkpoint, not a teacher's; give the folder that convert.py import wrote"
        )
    card.check_head_map(head_map)
    fitted = start == "fitted"
    if calibration_tokens_bs is not None:
        _check_tokens(calibration_tokens_bs, card)
    if fitted and (calibration_tokens_bs is None or len(calibration_tokens_bs) < FEWEST_ROWS):
        raise InputError(f"a fitted start needs {FEWEST_ROWS} sequences of text; give a longer --text")
    _, teacher = load_model(teacher_dir, dtype)
    student_card = dataclasses.replace(card, head_map=head_map, options=options, stage="student")
    student = build_model(student_card, dtype=dtype)
    scaled = calibration_tokens_bs is not None and options.fusion in SCALED_FUSIONS
    inherit(teacher, student, card.shape, head_output_rms(teacher, calibration_tokens_bs) if scaled else None)
    if fitted:
        print(said(fit_start(teacher, student, calibration_tokens_bs, memories)))
    with new_folder(student_dir, sum(parameter.nbytes for parameter in student.parameters())) as folder:
        if (tokenizer := Path(teacher_dir) / TOKENIZER_DIR).is_dir():
            shutil.copytree(tokenizer, folder / TOKENIZER_DIR)
        head_map.save(folder / HEAD_MAP_NAME)
        save_weights([student], student_card, folder)
    return student_card


def _check_tokens(tokens_bs: Tensor, card: ModelCard) -> None:
    if not tokens_bs.numel():
        raise InputError("calibration: no tokens given")
    length, largest = tokens_bs.shape[1], int(tokens_bs.max())
    if length > card.shape.native_length:
        raise InputError(
            f"calibration sequences of {length} tokens exceed the teacher's native length {card.shape.native_length}"
        )
    if largest >= card.shape.vocab_size:
        raise InputError(
            f"calibration token {largest} is outside the vocabulary of {card.shape.vocab_size}; another model's"
            " tokenizer?"
        )


@torch.no_grad()
def inherit(teacher: GPTModel, student: GPTModel, shape: ModelShape, head_scale: Tensor | None = None) -> None:
    """Copy the teacher's values into a student of the same shape, both whole (TP 1, PP 1).

    Args:
        head_scale: starts of the fusion scales, [layers, heads] in HF order (``head_output_rms``); None leaves them 1.

    Raises:
        ValueError: a model is not whole.
    """
    theirs = dict(teacher.named_parameters())
    for name, parameter in student.named_parameters():
        if ".self_attention." not in name:
            parameter.copy_(theirs[name])
    for layer_idx, (theirs_layer, our_layer) in enumerate(
        zip(teacher.decoder.layers, student.decoder.layers, strict=True)
    ):
        scale_h = None if head_scale is None else head_scale[layer_idx]
        inherit_attention(theirs_layer.self_attention, our_layer.self_attention, shape, scale_h)


@torch.no_grad()
def inherit_attention(
    teacher: HydraAttention, student: HydraAttention, shape: ModelShape, scale_h: Tensor | None = None
) -> None:
    """One layer of ``inherit``: rows (and biases) of q, k and v to their heads, columns of o_proj to the student's head
    order.
    """
    if max(teacher.layout.tp_size, student.layout.tp_size) > 1 or set(teacher.layout.layer) != {FA}:
        raise ValueError("inherit takes a whole all-FA teacher and a whole student: tensor parallel size 1")
    layout, theirs = student.layout, dict(teacher.fa.named_parameters())
    if student.linear_kv is not None:
        for name, ours in student.linear_kv.named_parameters():
            _inherit_blocks(theirs[f"linear_kv.{name}"], ours, layout.num_kv_groups, student.linear_kv.living)
    for kind, branch in student.branches.items():
        heads, groups = layout.layer[kind], layout.groups_of(layout.layer[kind])
        group_of_head = [layout.group_of(head_idx) for head_idx in heads]
        own = dict(branch.named_parameters())
        for parameter in KINDS[kind].parameters(shape, branch.options):
            if not parameter.inherited or parameter.stored not in theirs:  # a teacher may have no norms
                continue
            values, ours = theirs[parameter.stored], own[parameter.stored]
            if parameter.per == "layer":
                ours.copy_(values)
            elif parameter.stored.startswith("linear_kv."):
                blocks = group_of_head if parameter.per == "head" else groups
                _inherit_blocks(values, ours, layout.num_kv_groups, blocks)
            else:
                _inherit_blocks(values, ours, layout.num_heads, heads)
    heads = list(layout.layer.heads)
    columns_mhd = teacher.linear_proj.weight.unflatten(1, (layout.num_heads, -1))
    student.linear_proj.weight.copy_(columns_mhd[:, heads].flatten(1))
    if scale_h is not None and student.fusion.options.fusion in SCALED_FUSIONS:
        student.fusion.scale.weight.copy_(scale_h[heads])


def _inherit_blocks(theirs: Tensor, ours: Tensor, total: int, blocks: Sequence[int]) -> None:
    """Some of the ``total`` equal blocks of a projection's rows or biases; at TP 1 no group is split."""
    ours.copy_(theirs.unflatten(0, (total, -1))[list(blocks)].flatten(0, 1))


@torch.no_grad()
def head_output_rms(teacher: GPTModel, tokens_bs: Tensor) -> Tensor:
    """Root mean square of every head's output (what o_proj reads) over batch, positions and channels.

    Returns:
        [layers, heads] in HF order, float32. The inherited o_proj expects heads of this size, and the fusion norm
        takes a head's size away, so it is where the fusion scales start [ours; paper.md 1.4].
    """
    tokens_bs = tokens_bs.to(next(teacher.parameters()).device)
    attentions = [layer.self_attention for layer in teacher.decoder.layers]
    squares = torch.zeros(len(attentions), attentions[0].layout.num_heads, dtype=torch.float64, device=tokens_bs.device)

    def add_squares(layer_idx: int, out_sbx: Tensor) -> None:
        out_sbhd = out_sbx.unflatten(-1, (squares.shape[1], -1))
        squares[layer_idx] += out_sbhd.double().square().mean(dim=-1).sum(dim=(0, 1))

    hooks = [
        attention.linear_proj.register_forward_pre_hook(
            lambda _, args, layer_idx=layer_idx: add_squares(layer_idx, args[0])
        )
        for layer_idx, attention in enumerate(attentions)
    ]
    try:
        position_s = torch.arange(tokens_bs.shape[1], device=tokens_bs.device)
        for row_s in Progress(tokens_bs, desc="calibrate", unit="sequence"):
            teacher(row_s[None], position_s[None], None)
    finally:
        for hook in hooks:
            hook.remove()
    return (squares / tokens_bs.numel()).sqrt().float()
