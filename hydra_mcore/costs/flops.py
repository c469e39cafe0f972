# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Floating-point operations of a training step, worked out without running it.

Counted are matrix products (two operations a multiply-add), the triangular solves of the chunked delta rule and the
short convolution, forward and backward. Left out are elementwise work (norms, rotary, softmax, activations, the
optimizer), what is computed twice (recomputed layers, q k^T again in an attention kernel's backward) and what several
ranks compute alike (keys and values of split kv groups, states under context parallelism). So the figure does not
depend on the
layout: it is the numerator of a model-FLOPs utilisation.

A row is taken as one document; packed documents make causal attention cheaper. ``tests/unit/costs/test_flops.py``
counts the products that real models run.
"""

from __future__ import annotations

from hydra_mcore.config import HydraOptions, ModelCard, ModelShape, teacher_card
from hydra_mcore.heads import HeadLayout, HeadsByKind
from hydra_mcore.kinds import KINDS
from hydra_mcore.kinds.kind import NO_FLOPS, Flops, HeadKind, product
from hydra_mcore.stages import STAGES


def step_flops(card: ModelCard, stage: str, sequence_length: int, sequences: int) -> float:
    """Operations of one optimizer step over all ranks.

    align: the teacher's forward pass without its output layer; every student attention block forward and backward, its
    input without a gradient. distill: the teacher's forward pass and the student's forward and backward, both with
        output
    layers. extend: the student's forward and backward.

    Args:
        card: the student's.
        stage: align, distill or extend.
        sequence_length: tokens of a row.
        sequences: rows of the whole step (global-batch-size).
    """
    row = STAGES[stage]
    if row.fits_layers:
        blocks = (
            attention_block(card.shape, card.options, heads, sequence_length, input_gradient=False)
            for heads in card.head_map.layers
        )
        per_token = sum(blocks, NO_FLOPS).total
    else:
        per_token = model_flops(card, sequence_length).total
    if row.needs_teacher:
        teacher = teacher_card(card.shape, fingerprint="")
        per_token += model_flops(teacher, sequence_length, with_output=row.needs_teacher_logits).forward
    return per_token * sequence_length * sequences


def model_flops(card: ModelCard, length: int, with_output: bool = True) -> Flops:
    """A whole model, for each token of rows of ``length``; the embedding is a look-up and costs nothing."""
    shape = card.shape
    attention = sum((attention_block(shape, card.options, heads, length) for heads in card.head_map.layers), NO_FLOPS)
    mlp = product(shape.hidden_size, 3 * shape.ffn_hidden_size)  # gate, up and down
    output = product(shape.hidden_size, shape.vocab_size) if with_output else NO_FLOPS
    return attention + shape.num_layers * mlp + output


def attention_block(
    shape: ModelShape, options: HydraOptions, heads: HeadsByKind, length: int, input_gradient: bool = True
) -> Flops:
    """A layer's attention block, for each token: all its heads, its kv groups and its fusion.

    Args:
        input_gradient: whether a gradient flows on to the layer's input (not in align).
    """
    layout, total = HeadLayout(heads, shape.num_kv_groups), NO_FLOPS
    if options.qkv == "shared":
        groups = len(layout.groups_of(heads.heads))
        total += groups * product(shape.hidden_size, 2 * shape.head_dim, input_gradient)
    for name, owned in heads.items():
        kind = KINDS[name]
        total += len(owned) * one_head(kind, shape, options, length, input_gradient)
        total += len(layout.groups_of(owned)) * _projections(kind, shape, options, "group", input_gradient)
        total += _projections(kind, shape, options, "layer", input_gradient)
    if options.fusion == "competition":
        total += product(shape.hidden_size, shape.num_heads, input_gradient)
    return total


def one_head(
    kind: HeadKind, shape: ModelShape, options: HydraOptions, length: int, input_gradient: bool = True
) -> Flops:
    """The FLOPs of one head of a kind for a token, without the keys and values that it shares with its kv group."""
    total = _projections(kind, shape, options, "head", input_gradient) + product(shape.head_dim, shape.hidden_size)
    return total + _convolutions(kind, shape, options) + kind.core_flops(shape, options, length)


def _projections(kind: HeadKind, shape: ModelShape, options: HydraOptions, per: str, input_gradient: bool) -> Flops:
    """The FLOPs of the matrix products on the layer's input, or on what another matrix made of it. ``per`` says whether
    they count for each head, for each kv group, or for all heads of a kind.
    """
    total = NO_FLOPS
    for parameter in kind.parameters(shape, options):
        if parameter.per == per and len(parameter.block) == 2:
            rows, width = parameter.block
            total += product(width, rows, input_gradient or width != shape.hidden_size)
    return total


def _convolutions(kind: HeadKind, shape: ModelShape, options: HydraOptions) -> Flops:
    """The depthwise convolutions of one head."""
    blocks = [parameter.block for parameter in kind.parameters(shape, options)]
    return sum((product(block[0], block[2]) for block in blocks if len(block) == 3), NO_FLOPS)
