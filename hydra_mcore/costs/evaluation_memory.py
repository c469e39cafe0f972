# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""What evaluating a model needs of one rank's memory, worked out without running it.

There are no gradients, so a layer's tensors go when it returns. Beside the weights the peak is the fullest of these
moments, T being the tokens of this rank's part, L those of whole rows, p the bytes of a value, d of a head's size, F of
the MLP's width:

    a layer attends       keys and values of its kv groups, of the part and, gathered, of the row (2d a token and group
                          each); beside them queries with what rotary or norm makes of them, or keys and values of the
                          row by FA head (2d) and attention's result
    recurrent heads       the short convolution (9d a token and head), or inside the recurrence, beside the
                          results of the kinds before
    an MLP                five values for each of its width
    logits are made       ``batch_sizes.LOGITS_AT_ONCE`` of them at most, whatever the length

All but the last stand beside three hidden states (the stage's input, the layer's, and that normed; four in the MLP) and
the rotary angles of the row. Generation also keeps every FA layer's keys and values of this rank's part, and of every
recurrent head its state; a decoding step reads the keys and values by head in float32. The fusion of heads is never the
fullest moment.

Not counted: the CUDA context, NCCL's buffers, the allocator's waste (tools/plan.py sets a part of the memory aside).
``tests/distributed/test_evaluation_memory.py`` measures forward passes on a CPU; the formula stays within 10%. On a GPU
(``fused``) RMSNorm, attention's masks and the delta rule take less; those terms are estimates from the kernels' design.
"""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass

from hydra_mcore.config import ModelCard
from hydra_mcore.costs.batch_sizes import LOGITS_AT_ONCE
from hydra_mcore.costs.parameters import rank_parameters
from hydra_mcore.heads import HeadLayout
from hydra_mcore.kinds import KINDS
from hydra_mcore.kinds.kind import FLOAT, HeadCount, gate_width


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
        """The number of tokens of this rank's part, summed over all rows."""
        return self.rows * self.length / self.cp_size


@dataclass(frozen=True)
class EvaluationMemory:
    """Bytes of one rank at the fullest moment, by part: ``kept`` is what generation remembers of the prompt."""

    weights: float
    kept: float
    forward: float

    @property
    def total(self) -> float:
        return sum(dataclasses.astuple(self))


def fullest_rank(card: ModelCard, run: Forward) -> EvaluationMemory:
    """The memory of the rank that needs most."""
    ranks = itertools.product(range(run.pp_size), range(run.tp_size))
    return max((rank_memory(card, run, *rank) for rank in ranks), key=lambda memory: memory.total)


def rank_memory(card: ModelCard, run: Forward, pp_rank: int = 0, tp_rank: int = 0) -> EvaluationMemory:
    """The memory of one pipeline- and tensor-parallel rank; context-parallel ones differ by what is generated at
    most.
    """
    per_stage = card.shape.num_layers // run.pp_size
    layers, last = range(pp_rank * per_stage, (pp_rank + 1) * per_stage), pp_rank == run.pp_size - 1
    place = {"tp_size": run.tp_size, "tp_rank": tp_rank}
    weights = run.value_bytes * rank_parameters(card, layers, embedding=pp_rank == 0, output=last, **place).total()
    heads = [_counts(card, layer_idx, run.tp_size, tp_rank) for layer_idx in layers]
    token_ids = run.rows * run.length * 3 * 8 + run.tokens * 2 * 8  # ids, what is found, positions
    moments, kept = [(0.0, _logits(card, run) if last else 0.0)], 0.0
    for layer in heads:
        if run.room:
            kept += _kept(card, layer, run)
        moments.append((kept, max(_heads(card, layer, run), _mlp(card, run))))
    if run.room:
        moments.append((kept, max(_decoding(card, layer, run) for layer in heads)))
    kept, forward = max(moments, key=sum)
    return EvaluationMemory(weights, kept, token_ids + forward)


Counts = dict[str, HeadCount]  # of the heads of each kind that a rank owns in a layer


def _counts(card: ModelCard, layer_idx: int, tp_size: int, tp_rank: int) -> Counts:
    layout = HeadLayout(card.head_map.layers[layer_idx], card.shape.num_kv_groups, tp_size, layer_idx)
    return {kind: layout.count(kind, tp_rank) for kind in layout.layer}


def _around(card: ModelCard, run: Forward, hidden: int) -> float:
    """So many hidden states and the rotary angles, of the row and, where it is another, of the part."""
    angles = run.length + (run.length / run.cp_size if run.cp_size > 1 else 0)
    return hidden * run.tokens * run.value_bytes * card.shape.hidden_size + angles * FLOAT * card.shape.head_dim


def _heads(card: ModelCard, counts: Counts, run: Forward) -> float:
    """The kinds of heads of a layer, one after the other; results wait, with their gates, until all are there."""
    d, p, waiting, fullest = card.shape.head_dim, run.value_bytes, 0.0, 0.0
    for name, count in counts.items():
        kind = KINDS[name]
        if count.own:
            fullest = max(fullest, waiting + kind.working(card.shape, card.options, run, count))
        waiting += run.tokens * count.own * p * (d + gate_width(kind.gate(card.options), d))
    return _around(card, run, hidden=3) + fullest


def _mlp(card: ModelCard, run: Forward) -> float:
    return _around(card, run, hidden=4) + run.tokens * 5 * run.value_bytes * card.shape.ffn_hidden_size / run.tp_size


def _logits(card: ModelCard, run: Forward) -> float:
    """Logits of one chunk of tokens, with their float32 copy or the chunk before."""
    p, rows = run.value_bytes, card.shape.vocab_size // run.tp_size
    every = run.tokens * rows
    chunk = min(max(LOGITS_AT_ONCE, run.rows * rows), every)
    beside = max(FLOAT * chunk if p < FLOAT else 0, p * min(chunk, every - chunk))
    return run.tokens * p * card.shape.hidden_size + p * chunk + beside


def _kept(card: ModelCard, counts: Counts, run: Forward) -> float:
    """Caches of a layer, of the last context-parallel rank, which has the room for what is generated."""
    tokens = run.tokens + run.rows * run.room
    return sum(
        KINDS[kind].cached(card.shape, card.options, count, tokens, run.rows, run.value_bytes)
        for kind, count in counts.items()
    )


def _decoding(card: ModelCard, counts: Counts, run: Forward) -> float:
    tokens = run.tokens + run.rows * run.room
    return sum(KINDS[kind].decoding(card.shape, run, count, tokens) for kind, count in counts.items())
