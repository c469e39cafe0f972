# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""What a hybrid run should be watched by: the state of gates, decay and fusion, for each branch."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from hydra_mcore.heads import InputError
from hydra_mcore.model.gates import OutputGate
from hydra_mcore.model.gdn_heads import GatedDeltaHeads


class TrainingStopped(InputError):
    """Training met a value it must not go on with; the last complete checkpoint stays as it is."""


# Gathered while the student runs; the scales are read off its parameters.
STATISTICS = ("fa gate", "gdn gate", "gdn log decay", "gdn write gate", "fa scale", "gdn scale")


class BranchMonitor:
    """Sums over the heads of one model chunk, gathered by hooks while the student runs.

    Statistics: output gate of each branch, GDN log decay and write gate, fusion scale of each branch.
    """

    def __init__(self, model: GPTModel) -> None:
        self.model, self.tp_group = model, model.pg_collection.tp
        self.attentions = [layer.self_attention for layer in model.decoder.layers]
        self.seen: dict[str, list[tuple[Tensor, int]]] = {name: [] for name in STATISTICS}
        for attention in self.attentions:
            for branch in ("fa", "gdn"):
                heads = getattr(attention, branch, None)
                if isinstance(getattr(heads, "gate", None), OutputGate):
                    heads.gate.register_forward_hook(partial(self._record, f"{branch} gate", lambda out: out))
            if hasattr(attention, "gdn"):
                gdn = attention.gdn
                gdn.linear_decay.register_forward_hook(partial(self._record, "gdn log decay", partial(_log_decay, gdn)))
                gdn.linear_write.register_forward_hook(partial(self._record, "gdn write gate", partial(_write_gate, gdn)))

    def _record(self, name: str, read: Callable[[Tensor], Tensor], module: torch.nn.Module, inputs: tuple, output: Tensor) -> None:
        if self.model.training and output.numel():  # where a layer is recomputed, twice the same: means do not change
            with torch.no_grad():
                self.seen[name].append((read(output.float()).sum(), output.numel()))

    def take(self) -> Tensor:
        """(sum, count) of each of ``STATISTICS`` since the last call, over the tensor-parallel ranks: [statistics, 2]."""
        self._read_scales()
        table = torch.stack([_total(values) for values in self.seen.values()])
        for values in self.seen.values():
            values.clear()
        if self.tp_group.size() > 1:
            torch.distributed.all_reduce(table, group=self.tp_group)
        return table

    def _read_scales(self) -> None:
        for attention in self.attentions:
            for name, parameter in getattr(attention.fusion, "scale", torch.nn.Module()).named_parameters():
                scale = parameter.detach().float()
                shared = name.endswith("_shared")
                if shared and self.tp_group.rank():
                    continue  # every rank holds them; one counts
                num_fa = len(scale) if shared else attention.num_fa
                for statistic, part in (("fa scale", scale[:num_fa]), ("gdn scale", scale[num_fa:])):
                    self.seen[statistic].append((part.sum(), part.numel()))


def merged(
    monitors: list[BranchMonitor], align_losses: dict[int, Tensor], num_align_layers: int, groups: ProcessGroupCollection
) -> dict[str, Tensor]:
    """(sum, count) of every statistic and align loss, over all stages of the pipeline and all data.

    In the form that Megatron sums over micro-batches for console, TensorBoard and W&B. A statistic no head has is left
    out; the mean log decay becomes a half-life in tokens (after the sum over ranks: a mean of half-lives is another number).

    Args:
        align_losses: layer_idx -> (sum, count) on this stage; ``num_align_layers`` is 0 in stages without them.
    """
    empty = torch.zeros(2, device=torch.cuda.current_device())
    layers = [align_losses.get(layer_idx, empty) for layer_idx in range(num_align_layers)]
    table = torch.cat([sum(monitor.take() for monitor in monitors), *(pair[None] for pair in layers)])
    for group in (groups.pp, groups.dp_cp):
        if group.size() > 1:
            torch.distributed.all_reduce(table, group=group)
    names = [*STATISTICS, *(f"align layer {layer_idx}" for layer_idx in range(num_align_layers))]
    means = {name: pair for name, pair in zip(names, table, strict=True) if pair[1] > 0}
    if "gdn log decay" in means:
        decay, count = means.pop("gdn log decay")
        means["gdn half-life"] = torch.stack([math.log(2.0) / -(decay / count), torch.ones_like(count)])
    if num_align_layers:
        losses = table[len(STATISTICS) :]
        means["align loss"] = torch.stack([losses[:, 0].sum(), losses[0, 1]])
    return means


def _total(values: list[tuple[Tensor, int]]) -> Tensor:
    if not values:
        return torch.zeros(2, device=torch.cuda.current_device())
    total = torch.stack([value for value, _ in values]).sum()
    return torch.stack([total, total.new_tensor(float(sum(count for _, count in values)))])


def _log_decay(gdn: GatedDeltaHeads, logits: Tensor) -> Tensor:
    return -torch.nn.functional.softplus(logits.squeeze(-1)) * gdn.A_log.weight.float().exp()


def _write_gate(gdn: GatedDeltaHeads, logits: Tensor) -> Tensor:
    return gdn.options.gdn_write_max * torch.sigmoid(logits)


def nonfinite(step: int, where: str) -> TrainingStopped:
    """The error for a loss that is NaN or infinite, naming the step (1-based) and where it was seen."""
    return TrainingStopped(
        f"step {step}: {where} is not finite; the last complete checkpoint is kept, lower the learning rate or look at the data"
    )


def first_nonfinite_layer(model: GPTModel, forward: Callable[[], object]) -> str:
    """Run ``forward`` once more and name the first layer whose output is not finite."""
    found: list[str] = []

    def look(name: str, module: torch.nn.Module, inputs: tuple, output: object) -> None:
        tensors = output if isinstance(output, tuple) else (output,)
        if not found and any(isinstance(t, Tensor) and not bool(torch.isfinite(t).all()) for t in tensors):
            found.append(name)

    modules = [(f"layer {layer.layer_number - 1}", layer) for layer in model.decoder.layers]
    if model.pre_process:
        modules.insert(0, ("the embedding", model.embedding))
    hooks = [module.register_forward_hook(partial(look, name)) for name, module in modules]
    try:
        with torch.no_grad():
            forward()
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else "the output layer"
