# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""How many parameters a rank holds, by part, worked out without building anything.

``tests/distributed/test_sizes.py`` compares with models that are built.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from hydra_mcore.config import ModelCard
from hydra_mcore.heads import HeadLayout, HeadRole

ATTENTION_PARTS = ("FA heads", "GDN heads", "output projection", "gates", "convolution", "fusion")  # what align trains
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
    d, owned, shared = shape.head_dim, layout.ranks[tp_rank], len(layout.shared_fa)
    num_fa, num_gdn = len(owned.fa) + shared, len(owned.gdn)
    row = shape.hidden_size + shape.qkv_bias  # of a query, key or value projection
    gate_rows = {"none": 0, "headwise": 1, "elementwise": d}
    gate_row = shape.hidden_size + 1
    if layout.layer.fa:
        groups = 0 if options.qkv == "shared" else _held_groups(layout, owned.fa + layout.shared_fa, HeadRole.FA)
        found["FA heads"] = (num_fa * d + groups * 2 * d) * row + shape.qk_norm * 2 * d
        found["gates"] += num_fa * gate_rows[options.fa_gate] * gate_row
    if layout.layer.gdn:
        kv = num_gdn
        if options.gdn_kv == "per_group":
            kv = 0 if options.qkv == "shared" else _held_groups(layout, owned.gdn, HeadRole.GDN)
        decay_and_write = num_gdn * (2 * gate_row + 1)
        found["GDN heads"] = (num_gdn * d + kv * 2 * d) * row + decay_and_write + (options.gdn_qk_norm == "rms") * 2 * d
        found["gates"] += num_gdn * gate_rows[options.gdn_gate] * gate_row
        found["convolution"] = num_gdn * 3 * d * options.gdn_conv_kernel
    if options.qkv == "shared":  # of both branches; counted where the teacher had it
        found["FA heads"] += _held_groups(layout, owned.heads + layout.shared_fa) * 2 * d * row
    if options.fusion != "none" and options.fusion_norm_weight == "branch":
        found["fusion"] += d * (bool(layout.layer.fa) + bool(layout.layer.gdn))
    if options.fusion in ("scale", "competition"):
        found["fusion"] += num_fa + num_gdn
    if options.fusion == "competition":
        found["fusion"] += layout.num_heads * shape.hidden_size
    found["output projection"] = shape.hidden_size * d * (num_fa + num_gdn)
    return found


def _held_groups(layout: HeadLayout, heads: tuple[int, ...], role: HeadRole | None = None) -> int:
    """Kv groups whose rows a rank holds: those of its own heads, and every group that is split over ranks
    (GroupLinear).
    """
    return len({layout.group_of(h) for h in heads} | set(layout.split_groups(role)))
