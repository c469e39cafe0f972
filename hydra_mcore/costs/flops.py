# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Floating-point operations of a training step, worked out without running it.

Counted are matrix products (two operations a multiply-add), the triangular solves of the chunked delta rule and the
short convolution, forward and backward. Left out are elementwise work (norms, rotary, softmax, activations, the
optimizer), what is computed twice (recomputed layers, q k^T again in an attention kernel's backward) and what several
ranks compute alike (keys and values of split kv groups, states under context parallelism). So the figure does not
depend on the
layout: it is the numerator of a model-FLOPs utilisation.

A row is taken as one document; packed documents make causal attention cheaper. ``tests/unit/test_flops.py`` counts the
products that real models run.
"""

from __future__ import annotations

from dataclasses import dataclass

from hydra_mcore.config import HydraOptions, ModelCard, ModelShape, teacher_card
from hydra_mcore.heads import HeadLayout, LayerHeads
from hydra_mcore.ops.chunked_delta_rule import chunked_delta_rule
from hydra_mcore.stages import STAGES

CHUNK = chunked_delta_rule.__kwdefaults__["chunk_size"]  # flash-linear-attention's kernel cuts into as many rows


@dataclass(frozen=True)
class Flops:
    """Operations of a forward pass and of its backward pass."""

    forward: float
    backward: float

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.forward + other.forward, self.backward + other.backward)

    def __rmul__(self, times: float) -> Flops:
        return Flops(times * self.forward, times * self.backward)

    @property
    def total(self) -> float:
        return self.forward + self.backward


NOTHING = Flops(0.0, 0.0)


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
        per_token = sum(blocks, NOTHING).total
    else:
        per_token = model_flops(card, sequence_length).total
    if row.needs_teacher:
        teacher = teacher_card(card.shape, fingerprint="")
        per_token += model_flops(teacher, sequence_length, with_output=row.needs_teacher_logits).forward
    return per_token * sequence_length * sequences


def model_flops(card: ModelCard, length: int, with_output: bool = True) -> Flops:
    """A whole model, for each token of rows of ``length``; the embedding is a look-up and costs nothing."""
    shape = card.shape
    attention = sum((attention_block(shape, card.options, heads, length) for heads in card.head_map.layers), NOTHING)
    mlp = _product(shape.hidden_size, 3 * shape.ffn_hidden_size)  # gate, up and down
    output = _product(shape.hidden_size, shape.vocab_size) if with_output else NOTHING
    return attention + shape.num_layers * mlp + output


def attention_block(
    shape: ModelShape, options: HydraOptions, heads: LayerHeads, length: int, input_gradient: bool = True
) -> Flops:
    """A layer's attention block, for each token: all its heads, its kv groups and its fusion.

    Args:
        input_gradient: whether a gradient flows on to the layer's input (not in align).
    """
    layout = HeadLayout(heads, shape.num_kv_groups)
    groups = {role: len({layout.group_of(h) for h in owned}) for role, owned in (("fa", heads.fa), ("gdn", heads.gdn))}
    kv_groups = 0
    if options.qkv == "shared":
        kv_groups = len({layout.group_of(h) for h in heads.fa + heads.gdn})
    elif options.gdn_kv == "per_group":
        kv_groups = groups["fa"] + groups["gdn"]
    else:
        kv_groups = groups["fa"]
    total = kv_groups * keys_values(shape, input_gradient)
    total += len(heads.fa) * fa_head(shape, options, length, input_gradient)
    total += len(heads.gdn) * gdn_head(shape, options, length, input_gradient)
    if options.fusion == "competition":
        total += _product(shape.hidden_size, shape.num_heads, input_gradient)
    return total


def fa_head(shape: ModelShape, options: HydraOptions, length: int, input_gradient: bool = True) -> Flops:
    """One FA head, for each token, without the keys and values that it shares with its kv group (``keys_values``)."""
    projections = _head_projections(shape, options.fa_gate, input_gradient)
    return projections + causal_attention(shape.head_dim, length)


def gdn_head(shape: ModelShape, options: HydraOptions, length: int, input_gradient: bool = True) -> Flops:
    """One GDN head, for each token, with its own keys and values where ``gdn_kv`` is per_head."""
    total = _head_projections(shape, options.gdn_gate, input_gradient)
    total += _product(shape.hidden_size, 2, input_gradient)  # decay and write gate
    if options.gdn_kv == "per_head":
        total += keys_values(shape, input_gradient)
    return total + short_convolution(shape.head_dim, options.gdn_conv_kernel) + delta_rule(shape.head_dim, length)


def keys_values(shape: ModelShape, input_gradient: bool = True) -> Flops:
    """The key and value projections of one kv group, or of one head with its own."""
    return _product(shape.hidden_size, 2 * shape.head_dim, input_gradient)


def causal_attention(head_dim: int, length: int) -> Flops:
    """q k^T and its product with v of one head, for each token of a row, which sees (length + 1) / 2 keys on
    average.
    """
    keys = (length + 1) / 2
    return 2 * _product(head_dim, keys)


def delta_rule(head_dim: int, length: int) -> Flops:
    """The chunked delta rule of one head, for each token (ops/chunked_delta_rule.py), keys and values of one size d.

    Of r rows of a chunk: queries and keys times keys (2 r r d), both read the state (2 r d d), an inverse (r r r) and
        scores
    are applied to what is written (2 r r d), which goes into the state (r d d). What backward makes anew is not
    counted. A last chunk is filled up with padding.
    """
    chunks = -(-length // CHUNK)
    products = 4 * _product(CHUNK * CHUNK, head_dim) + 3 * _product(CHUNK * head_dim, head_dim)
    return (chunks / length) * (products + Flops(float(CHUNK**3), 0.0))


def short_convolution(head_dim: int, taps: int) -> Flops:
    """The short convolution on q, k and v of one GDN head, for each token."""
    return _product(3 * head_dim, taps)


def _head_projections(shape: ModelShape, gate: str, input_gradient: bool) -> Flops:
    """Query, gate and output projection of one head."""
    gate_rows = {"none": 0, "headwise": 1, "elementwise": shape.head_dim}[gate]
    into = _product(shape.hidden_size, shape.head_dim + gate_rows, input_gradient)
    return into + _product(shape.head_dim, shape.hidden_size)


def _product(inputs: float, outputs: float, input_gradient: bool = True) -> Flops:
    """One row through a matrix, and the gradients of the matrix and, unless it has none, of the row."""
    forward = 2.0 * inputs * outputs
    return Flops(forward, 2 * forward if input_gradient else forward)
