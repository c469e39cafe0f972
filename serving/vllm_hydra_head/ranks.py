# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Tensor parallelism: which heads of each layer a rank computes, and which part of each tensor it holds.

Ranks add up their shares of a layer's output, so any head may be any rank's. vLLM allots the same memory to all ranks;
therefore the kv groups that full attention reads are dealt out as evenly as they can be, and a rank that has fewer than
another gets groups of zeros beside them. Linear heads then even out the number of heads.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_hydra_head.export.configuration_hydra_head import HydraHeadConfig
from vllm_hydra_head.export.kinds_hydra_head import BRANCHES

OF_ALL_HEADS = ("q_norm", "k_norm", "decay_down_proj")  # of a kind's tensors, those that its heads share


def deal(config: HydraHeadConfig, ranks: int) -> list[HydraHeadConfig]:
    """The model as each rank has it: its own heads of each layer, by index in the layer, and its part of the MLP."""
    layers = [_deal_layer(config, by_kind, ranks) for by_kind in config.heads]
    views = [copy.copy(config) for _ in range(ranks)]
    for rank, view in enumerate(views):
        view.heads = [layer[rank] for layer in layers]
        view.intermediate_size = (config.intermediate_size + rank) // ranks
    return views


def _deal_layer(config: HydraHeadConfig, by_kind: dict[str, list[int]], ranks: int) -> list[dict[str, list[int]]]:
    own: list[dict[str, list[int]]] = [{} for _ in range(ranks)]
    pieces = [0] * ranks

    def count(rank: int) -> int:
        return sum(len(heads) for heads in own[rank].values())

    for piece in sorted(_pieces(config, by_kind.get("fa", []), ranks), key=len, reverse=True):
        rank = min(range(ranks), key=lambda rank: (pieces[rank], count(rank)))
        own[rank]["fa"] = sorted(own[rank].get("fa", []) + piece)
        pieces[rank] += 1
    for kind, heads in by_kind.items():
        for head in heads if kind != "fa" else ():
            own[min(range(ranks), key=count)].setdefault(kind, []).append(head)
    return own


def _pieces(config: HydraHeadConfig, fa_heads: list[int], ranks: int) -> list[list[int]]:
    """The FA heads of each kv group; the largest groups are halved, if that takes no more memory on any rank."""
    by_group = itertools.groupby(fa_heads, key=lambda head: config.heads_per_group([head]).index(1))
    pieces = [list(heads) for _, heads in by_group]
    while len(pieces) % ranks and len(largest := max(pieces, key=len)) > 1:
        pieces.remove(largest)
        pieces += [largest[: len(largest) // 2], largest[len(largest) // 2 :]]
    return pieces


def own_part(
    name: str, values: Tensor, config: HydraHeadConfig, views: Sequence[HydraHeadConfig], rank: int
) -> Tensor | None:
    """A rank's part of an export's tensor; None where it has no heads of that kind in the layer.

    Args:
        views: what ``deal`` gives for ``config``.
    """
    if len(views) == 1:
        return values
    if ".mlp." in name:
        before = sum(view.intermediate_size for view in views[:rank])
        return values.narrow(1 if ".down_proj." in name else 0, before, views[rank].intermediate_size)
    if not (found := re.search(r"layers\.(\d+)\.self_attn\.(.+)", name)):
        return values
    all_heads, own_heads = (each.heads[int(found[1])] for each in (config, views[rank]))
    module, _, tensor = found[2].partition(".")
    kind = module.removesuffix("_norm")
    if kind in BRANCHES and kind not in own_heads:
        return None
    if module in ("o_proj", "scale"):
        units, own = (sorted(itertools.chain.from_iterable(heads.values())) for heads in (all_heads, own_heads))
    elif module not in BRANCHES or tensor.startswith(OF_ALL_HEADS):
        return values
    else:
        units, own = all_heads[kind], own_heads[kind]
        if tensor.startswith(("k_proj", "v_proj")) and getattr(config, f"{kind}_kv", "per_group") == "per_group":
            units, own = (_groups(config, heads) for heads in (units, own))
    dim = 1 if module == "o_proj" else 0
    places = torch.tensor([units.index(unit) for unit in own], device=values.device)
    return values.unflatten(dim, (len(units), -1)).index_select(dim, places).flatten(dim, dim + 1)


def _groups(config: HydraHeadConfig, heads: list[int]) -> list[int]:
    """The kv groups that some of these heads read."""
    return [group for group, count in enumerate(config.heads_per_group(heads)) if count]
