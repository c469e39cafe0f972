# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""What a hybrid run should be watched by: gate, scale, output size, memory and writing of every single head."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from hydra_mcore.heads import HeadMap
from hydra_mcore.kinds import FA, KINDS
from hydra_mcore.kinds.kind import Statistic
from hydra_mcore.model.fusion import Fusion
from hydra_mcore.model.hydra_attention import HydraAttention

# Of every head: its output gate's mean; the learned factor of the fusion; the root mean square of its output as the
# fusion's norm meets it. Kinds add their own.
COMMON = (Statistic("gate"), Statistic("scale"), Statistic("rms", np.sqrt))
_ALL = [*COMMON, *itertools.chain.from_iterable(kind.statistics for kind in KINDS.values())]
STATISTICS = {statistic.name: statistic for statistic in _ALL}


class HeadMonitor:
    """Sums over the tokens of every head of one model chunk, gathered by hooks while the student trains.

    ``table`` holds (sum, count) by statistic, layer and head: [statistics, layers, heads, 2], of this rank's share of
    heads and tokens, so that the sum over all ranks is the whole model's whatever the layout. Where a layer is
    recomputed its tokens count twice, and means stay the same. A learned factor counts once a micro-batch.

    Args:
        due: whether the step under way is to be gathered.
    """

    def __init__(self, model: GPTModel, due: Callable[[], bool]) -> None:
        self.model, self.due = model, due
        self.attentions: list[HydraAttention] = [layer.self_attention for layer in model.decoder.layers]
        self.place = {name: place for place, name in enumerate(STATISTICS)}
        shape = (len(STATISTICS), model.config.num_layers, model.config.num_attention_heads, 2)
        self.table = torch.zeros(shape, dtype=torch.float64, device=torch.cuda.current_device())
        for attention in self.attentions:
            attention.fusion.register_forward_hook(partial(self._fused, attention), with_kwargs=True)
            for kind, branch in attention.branches.items():
                for statistic, (module, read) in branch.watched().items():
                    module.register_forward_hook(partial(self._of_kind, attention, kind, statistic, read))

    def _fused(self, attention: HydraAttention, module: Fusion, inputs: tuple, keywords: dict, output: Tensor) -> None:
        if not (self.model.training and self.due()):
            return
        shared, owned = keywords.get("shared", False), attention.layout.ranks[attention.tp_group.rank()]
        # Here, not after the step: then other ranks may hold the new factor already and this one not
        # (overlap-param-gather).
        scale_h = getattr(getattr(module, "scale", None), "weight_shared" if shared else "weight", None)
        held = attention.layout.shared if shared else owned
        if scale_h is not None and not (shared and attention.tp_group.rank()):  # of shared ones the first rank's counts
            self._add("scale", attention, held.heads, scale_h[None, None, :, None])
        for kind, (out_sbhd, gate) in inputs[0].items():
            heads = held[kind]
            if gate is not None:
                self._add("gate", attention, heads, gate)
                if module.options.gate_order == "before_norm":
                    out_sbhd = out_sbhd * gate
            size_sbh1 = torch.linalg.vector_norm(out_sbhd, dim=-1, keepdim=True, dtype=torch.float32)
            self._add("rms", attention, heads, size_sbh1.square() / out_sbhd.shape[-1])

    def _of_kind(
        self,
        attention: HydraAttention,
        kind: str,
        statistic: str,
        read: Callable[[Tensor], Tensor],
        module: torch.nn.Module,
        inputs: tuple,
        output: Tensor,
    ) -> None:
        if output.numel() and self.model.training and self.due():
            heads = attention.layout.ranks[attention.tp_group.rank()][kind]
            self._add(statistic, attention, heads, read(output.float()))

    def _add(self, statistic: str, attention: HydraAttention, heads: tuple[int, ...], value_sbhd: Tensor) -> None:
        if value_sbhd.numel():
            sums = value_sbhd.detach().sum(dim=(0, 1, 3), dtype=torch.float32).double()
            pairs = torch.stack([sums, torch.full_like(sums, value_sbhd.numel() / len(heads))], dim=-1)
            layer = self.table[self.place[statistic], attention.layer_idx]
            layer.index_add_(0, torch.tensor(heads, device=sums.device), pairs)

    def take(self) -> Tensor:
        """``table`` so far; gathering starts anew."""
        table, self.table = self.table, torch.zeros_like(self.table)
        return table


class HeadStatistics:
    """The statistics of all heads of a model after one step; the same on every rank.

    Args:
        table: (sum, count) by statistic, layer and head, over all ranks: [statistics, layers, heads, 2].
    """

    def __init__(self, table: np.ndarray, head_map: HeadMap) -> None:
        self.table, self.head_map = table, head_map

    @classmethod
    def gather(cls, monitors: list[HeadMonitor], head_map: HeadMap) -> HeadStatistics:
        """Sum the tables of this rank's model chunks, then of all ranks; called by all of them."""
        table = torch.stack([monitor.take() for monitor in monitors]).sum(0)
        torch.distributed.all_reduce(table)
        return cls(table.cpu().numpy(), head_map)

    def by_head(self) -> dict[str, np.ndarray]:
        """Statistic -> its value of every head, [layers, heads]; NaN where a head has no such thing."""
        return {name: _value(name, pairs_lh) for name, pairs_lh in zip(STATISTICS, self.table, strict=True)}

    def by_layer(self) -> dict[str, float]:
        """Means over the heads of one kind, of each layer and of the whole model: "KIND half-life/layer 03", "fa
        gate/all".

        The mean half-life is that of the mean decay, the mean size that of the mean square. "KIND to fa rms" is the
        ratio of another kind's size to that of FA heads (paper Fig 5), in layers that have both.
        """
        found: dict[str, float] = {}
        for kind in KINDS:
            mine_lh = np.zeros(self.table.shape[1:3], dtype=bool)
            for head in self.head_map.heads_of(kind):
                mine_lh[head] = True
            for name, pairs_lh in zip(STATISTICS, self.table, strict=True):
                pairs_l = np.where(mine_lh[..., None], pairs_lh, 0.0).sum(axis=1)
                if pairs_l[:, 1].any():
                    found[f"{kind} {name}/all"] = float(_value(name, pairs_l.sum(axis=0)))
                for layer_idx, value in enumerate(_value(name, pairs_l)):
                    if not np.isnan(value):
                        found[f"{kind} {name}/{layer_name(layer_idx)}"] = float(value)
        return found | self._sizes_beside_fa(found)

    def _sizes_beside_fa(self, found: dict[str, float]) -> dict[str, float]:
        ratios = {}
        for layer_idx, layer in enumerate(self.head_map.layers):
            for kind in (kind for kind in layer if kind != FA):
                mine, fa = (found.get(f"{name} rms/{layer_name(layer_idx)}") for name in (kind, FA))
                if mine and fa:
                    ratios[f"{kind} to {FA} rms/{layer_name(layer_idx)}"] = mine / fa
        return ratios


def layer_name(layer_idx: int) -> str:
    """ "layer 03": W&B and TensorBoard sort by name."""
    return f"layer {layer_idx:02d}"


def _value(statistic: str, pairs: np.ndarray) -> np.ndarray:
    """What (sum, count) pairs along the last axis mean; NaN where nothing was counted."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return STATISTICS[statistic].of_mean(pairs[..., 0] / pairs[..., 1])
