# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""How many parameters a rank holds, by part, worked out without building anything.

``tests/distributed/test_sizes.py`` compares with models that are built.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from hydra_mcore.config import ModelCard
from hydra_mcore.heads import HeadLayout
from hydra_mcore.kinds import FA, KINDS

ATTENTION_PARTS = (  # what align trains
    *(f"{kind.label} heads" for kind in KINDS.values()),
    *("output projection", "gates", "convolution", "fusion"),
)
PARTS = (*ATTENTION_PARTS, "MLP", "layer norms", "embedding", "output layer")


def rank_parameters(
    card: ModelCard,
    layers: Iterable[int],
    *,
    embedding: bool = True,
    output: bool = True,
    tp_size: int = 1,
    tp_rank: int = 0,
    fa_balance: str = "heads",
) -> Counter[str]:
    """Parameters of one tensor- and pipeline-parallel rank: part of ``PARTS`` -> number.

    Args:
        layers: the layer_idx of the layers that this pipeline stage holds.
        embedding, output: whether the stage is the first, the last. With tied embeddings, a last stage that is not the
            first holds the embedding's copy as its output layer.
    """
    shape, found = card.shape, Counter(dict.fromkeys(PARTS, 0))
    for layer_idx in layers:
        layout = HeadLayout(card.head_map.layers[layer_idx], shape.num_kv_groups, tp_size, layer_idx, fa_balance)
        found.update(_attention(card, layout, tp_rank))
        found["MLP"] += 3 * shape.hidden_size * (shape.ffn_hidden_size // tp_size)
        found["layer norms"] += 2 * shape.hidden_size
    rows = shape.vocab_size // tp_size * shape.hidden_size
    if embedding:
        found["embedding"] = rows
    if output:
        found["layer norms"] += shape.hidden_size
        found["output layer"] = 0 if embedding and shape.tied_embeddings else rows
    return found


def _attention(card: ModelCard, layout: HeadLayout, tp_rank: int) -> Counter[str]:
    """One layer's attention block on one tensor-parallel rank (model/hydra_attention.py and what it is made of)."""
    shape, options, found = card.shape, card.options, Counter()
    held = len(layout.ranks[tp_rank].heads + layout.shared.heads)
    for kind in map(KINDS.get, layout.layer):
        blocks = {
            "head": layout.count(kind.name, tp_rank).held,
            "group": _held_groups(layout, tp_rank, kind.name),
            "layer": 1,
        }
        for parameter in kind.parameters(shape, options):
            found[parameter.section or f"{kind.label} heads"] += blocks[parameter.per] * parameter.num_values
    if options.qkv == "shared":  # by all kinds; counted where the teacher had it
        row = shape.hidden_size + shape.qkv_bias
        found[f"{KINDS[FA].label} heads"] += _held_groups(layout, tp_rank) * 2 * shape.head_dim * row
    if options.fusion != "none" and options.fusion_norm_weight == "branch":
        found["fusion"] += shape.head_dim * len(layout.layer)
    if options.fusion in ("scale", "competition"):
        found["fusion"] += held
    if options.fusion == "competition":
        found["fusion"] += layout.num_heads * shape.hidden_size
    found["output projection"] = shape.hidden_size * shape.head_dim * held
    return found


def _held_groups(layout: HeadLayout, tp_rank: int, kind: str | None = None) -> int:
    """Kv groups whose rows a rank holds: those of its own heads, and every group that is split over ranks
    (GroupLinear).
    """
    own, shared = (
        by_kind.heads if kind is None else by_kind[kind] for by_kind in (layout.ranks[tp_rank], layout.shared)
    )
    return len({*layout.groups_of(own + shared), *layout.split_groups(kind)})
