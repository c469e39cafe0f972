# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""What evaluating a model needs of one rank's memory, worked out without running it.

There are no gradients, so a layer's tensors go when it returns. Beside the weights the peak is the fullest of these
moments, T being the tokens of this rank's part, L those of whole rows, p the bytes of a value, d of a head's size, F of
the MLP's width:

    a layer attends       keys and values of its kv groups, of the part and, gathered, of the row (2d a token and group
    each);
                          those of the row by FA head (2d); queries with what rotary or norm makes of them, or
                          attention's result
    a layer's GDN heads   the short convolution (16d a token and head), or inside the delta rule, beside the FA heads'
    result an MLP                five values for each of its width
    logits are made       ``batch_sizes.LOGITS_AT_ONCE`` of them at most, whatever the length

All but the last stand beside three hidden states (the stage's input, the layer's, and that normed; four in the MLP) and
the rotary angles of the row. Generation also keeps every FA layer's keys and values of this rank's part, and of every
GDN head its state; a decoding step reads the keys and values by head in float32. The fusion of heads is never the
fullest moment.

Not counted: the CUDA context, NCCL's buffers, the allocator's waste (tools/plan.py sets a part of the memory aside).
``tests/distributed/test_evaluation_memory.py`` measures forward passes on a CPU; the formula stays within 10%. On a GPU
(``fused``) RMSNorm, attention's masks and the delta rule take less; those terms are estimates from the kernels' design.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from hydra_mcore.config import ModelCard
from hydra_mcore.costs.batch_sizes import LOGITS_AT_ONCE
from hydra_mcore.costs.flops import CHUNK
from hydra_mcore.costs.parameters import rank_parameters
from hydra_mcore.heads import HeadLayout
from hydra_mcore.ops.chunked_delta_rule import segment_tokens

FLOAT = 4  # bytes of what is computed in float32 whatever the model's type


@dataclass(frozen=True, kw_only=True)
class Forward:
    """What memory depends on beside the model: prompts and layout.

    Args:
        length: tokens of a row over all context-parallel ranks; ``rows`` of them go through the model at once.
        room: tokens that each row may be continued by, 0 where nothing is generated.
        fused: a GPU's kernels.
    """

    length: int
    rows: int = 1
    room: int = 0
    value_bytes: int = 2
    tp_size: int = 1
    pp_size: int = 1
    cp_size: int = 1
    fused: bool = True

    @property
    def tokens(self) -> float:
        """Of this rank's part, over all rows."""
        return self.rows * self.length / self.cp_size


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at the fullest moment, by part: ``kept`` is what generation remembers of the prompt."""

    weights: float
    kept: float
    forward: float

    @property
    def total(self) -> float:
        return sum(dataclasses.astuple(self))


def fullest_rank(card: ModelCard, run: Forward) -> Memory:
    """The memory of the rank that needs most."""
    ranks = ((pp_rank, tp_rank) for pp_rank in range(run.pp_size) for tp_rank in range(run.tp_size))
    return max((rank_memory(card, run, *rank) for rank in ranks), key=lambda memory: memory.total)


def rank_memory(card: ModelCard, run: Forward, pp_rank: int = 0, tp_rank: int = 0) -> Memory:
    """The memory of one pipeline- and tensor-parallel rank; context-parallel ones differ by what is generated at
    most.
    """
    per_stage = card.shape.num_layers // run.pp_size
    layers, last = range(pp_rank * per_stage, (pp_rank + 1) * per_stage), pp_rank == run.pp_size - 1
    place = {"tp_size": run.tp_size, "tp_rank": tp_rank}
    weights = run.value_bytes * rank_parameters(card, layers, embedding=pp_rank == 0, output=last, **place).total()
    heads = [_Heads.of(card, layer_idx, run.tp_size, tp_rank) for layer_idx in layers]
    token_ids = run.rows * run.length * 3 * 8 + run.tokens * 2 * 8  # ids, what is found, positions
    moments, kept = [(0.0, _logits(card, run) if last else 0.0)], 0.0
    for layer in heads:
        if run.room:
            kept += _kept(card, layer, run)
        moments.append((kept, max(_attention(card, layer, run), _gdn(card, layer, run), _mlp(card, run))))
    if run.room:
        moments.append((kept, max(_decoding(card, layer, run) for layer in heads)))
    kept, forward = max(moments, key=sum)
    return Memory(weights, kept, token_ids + forward)


@dataclass(frozen=True)
class _Heads:
    """How many FA heads, kv groups of FA heads and GDN heads of a layer a rank owns."""

    fa: int
    groups: int
    gdn: int

    @classmethod
    def of(cls, card: ModelCard, layer_idx: int, tp_size: int, tp_rank: int) -> _Heads:
        layout = HeadLayout(card.head_map.layers[layer_idx], card.shape.num_kv_groups, tp_size, layer_idx)
        owned = layout.ranks[tp_rank]
        return cls(len(owned.fa), len({layout.group_of(head) for head in owned.fa}), len(owned.gdn))


def _around(card: ModelCard, run: Forward, hidden: int) -> float:
    """So many hidden states and the rotary angles, of the row and, where it is another, of the part."""
    angles = run.length + (run.length / run.cp_size if run.cp_size > 1 else 0)
    return hidden * run.tokens * run.value_bytes * card.shape.hidden_size + angles * FLOAT * card.shape.head_dim


def _norm(run: Forward) -> int:
    """Bytes a value while RMSNorm works, its input and result included."""
    if run.fused:
        return 2 * run.value_bytes
    return 3 * FLOAT + (run.value_bytes if run.value_bytes < FLOAT else 0)


def _attention(card: ModelCard, heads: _Heads, run: Forward) -> float:
    if not heads.fa:
        return 0.0
    d, p, row = card.shape.head_dim, run.value_bytes, run.rows * run.length
    rope, gated = card.options.fa_position == "rope", card.options.fa_gate != "none"
    keys_values = 2 * d * p * (heads.groups * (run.tokens + row) + heads.fa * row)
    queries = (
        d * heads.fa * max(_norm(run) if card.shape.qk_norm else 0, 4 * p if rope else 0, 3 * p if gated else 2 * p)
    )
    queries += 2 * d * p if rope else 0  # cosines and sines
    swapped = run.cp_size > 1
    masks = 0.0
    if swapped and not run.fused:  # of half a part's queries: as booleans and as what is added to the scores
        masks = run.tokens / run.rows / 2 * run.length * (1 + p)
    attended = (
        heads.fa * d * p * run.tokens * (1 + swapped + (1 if masks else 2) + _gate_width(card.options.fa_gate, d))
        + masks
    )
    return _around(card, run, hidden=3) + keys_values + max(run.tokens * queries, attended)


def _gate_width(gate: str, d: int) -> float:
    """Of an output gate, in values of a head."""
    return {"none": 0.0, "headwise": 1 / d, "elementwise": 1.0}[gate]


def _gdn(card: ModelCard, heads: _Heads, run: Forward) -> float:
    if not heads.gdn:
        return 0.0
    d, p, options = card.shape.head_dim, run.value_bytes, card.options
    branch = heads.fa * d * p * (1 + _gate_width(options.fa_gate, d))  # the FA heads' result waits
    mixing = 16 * d * p if options.gdn_conv_kernel else 6 * d * p
    rotary = 9 * d * p
    normalised = 6 * d * p + 2 * FLOAT * d
    if run.fused:
        # q, k and the tensor that holds v; v alone; the kernel's w, u, new values, outputs; its states, C x C matrices
        rule = 10 * d * p + p * d * d / CHUNK + CHUNK * (FLOAT + p) + 3 * FLOAT
    else:
        # q, k, the tensor that holds v, the result; in float32 what is made of so many tokens at a time. In the search
        # for the state before a part, values and results are twice as wide.
        wider = 3 if run.cp_size > 1 else 0
        together = min(1.0, segment_tokens(heads.gdn * run.rows, d) * run.cp_size / run.length)
        rule = (6 + wider) * d * p + together * FLOAT * ((10 + wider) * d + 4 * CHUNK)
    return _around(card, run, hidden=3) + run.tokens * (branch + heads.gdn * max(mixing, rotary, normalised, rule))


def _mlp(card: ModelCard, run: Forward) -> float:
    return _around(card, run, hidden=4) + run.tokens * 5 * run.value_bytes * card.shape.ffn_hidden_size / run.tp_size


def _logits(card: ModelCard, run: Forward) -> float:
    """Logits of one chunk of tokens, with their float32 copy or the chunk before."""
    p, rows = run.value_bytes, card.shape.vocab_size // run.tp_size
    every = run.tokens * rows
    chunk = min(max(LOGITS_AT_ONCE, run.rows * rows), every)
    beside = max(FLOAT * chunk if p < FLOAT else 0, p * min(chunk, every - chunk))
    return run.tokens * p * card.shape.hidden_size + p * chunk + beside


def _kept(card: ModelCard, heads: _Heads, run: Forward) -> float:
    """Of a layer: keys and values, states, the convolution's last inputs; for the last context-parallel rank, which has
    the room.
    """
    d, p, taps = card.shape.head_dim, run.value_bytes, max(0, card.options.gdn_conv_kernel - 1)
    keys_values = 2 * heads.groups * d * p * (run.tokens + run.rows * run.room)
    return keys_values + run.rows * heads.gdn * (FLOAT * d * d + 3 * d * taps * p)


def _decoding(card: ModelCard, heads: _Heads, run: Forward) -> float:
    """Keys and values by head: in float32, and one of them as it is kept."""
    d, p = card.shape.head_dim, run.value_bytes
    tokens = run.tokens + run.rows * run.room
    return heads.fa * tokens * d * (2 * FLOAT + p)
