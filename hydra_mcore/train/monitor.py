# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""What a hybrid run should be watched by: the state of gates, decay and fusion, for each branch."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from hydra_mcore.heads import InputError
from hydra_mcore.model.gates import OutputGate
from hydra_mcore.model.gdn_heads import GatedDeltaHeads


class TrainingStopped(InputError):
    """Training met a value it must not go on with; the last complete checkpoint stays as it is."""


class BranchMonitor:
    """Means over this pipeline stage's heads, gathered by hooks while the student runs.

    Statistics: mean output gate of each branch, GDN half-life in tokens (from the mean log decay) and mean write
    gate, mean fusion scale of each branch. ``take`` gives (sum, count) pairs, the form in which Megatron averages
    over micro-batches and data-parallel ranks before console, TensorBoard and W&B.
    """

    def __init__(self, model: GPTModel, tp_group: torch.distributed.ProcessGroup) -> None:
        self.tp_group = tp_group
        self.attentions = [layer.self_attention for layer in model.decoder.layers]
        self.seen: dict[str, list[tuple[Tensor, int]]] = {"fa gate": [], "gdn gate": [], "gdn log decay": [], "gdn write gate": []}
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
        if torch.is_grad_enabled() and output.numel():
            with torch.no_grad():
                self.seen[name].append((read(output.float()).sum(), output.numel()))

    def take(self) -> dict[str, Tensor]:
        """The (sum, count) of each statistic since the last call; a statistic no head has is left out."""
        rows = {name: _total(values) for name, values in self.seen.items()}
        rows["fa scale"], rows["gdn scale"] = self._scales()
        for values in self.seen.values():
            values.clear()
        names = list(rows)
        table = torch.stack([rows[name] for name in names])
        if self.tp_group.size() > 1:
            torch.distributed.all_reduce(table, group=self.tp_group)
        means = {name: table[index] for index, name in enumerate(names) if table[index, 1] > 0}
        if "gdn log decay" in means:
            decay, count = means.pop("gdn log decay")
            means["gdn half-life"] = torch.stack([math.log(2.0) / -(decay / count), torch.ones_like(count)])
        return means

    def _scales(self) -> list[Tensor]:
        fa: list[tuple[Tensor, int]] = []
        gdn: list[tuple[Tensor, int]] = []
        for attention in self.attentions:
            if hasattr(attention.fusion, "scale"):
                scale = attention.fusion.scale.weight.detach().float()
                for values, part in ((fa, scale[: attention.num_fa]), (gdn, scale[attention.num_fa :])):
                    values.append((part.sum(), part.numel()))
        return [_total(fa), _total(gdn)]


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
