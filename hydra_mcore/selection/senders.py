# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The exact effect of heads that act through other heads: path patching, one step back (paper section 2 point 4).

The paper gives one sentence; the definition is that of Wang et al. (arXiv:2211.00593, appendix B), whose first step Eq
10 is too. For a sender u and a set of receivers:

    C. clean run in which u's output is that of the corrupt run, at all positions, and all other attention heads keep
       their clean outputs; MLPs run. Record what the receivers would hand on, given the stream that so reaches them.
    D. clean run in which the receivers hand on what C recorded; everything after them runs as it does.

The effect is (m(x) - m(D)) / (m(x) - m(x')). Both runs go up through the layers side by side, all senders of a layer as
one batch. Nothing changes before the first token in which the prompts differ, so the streams hold only the tokens from
there on. C ends at the last receiver, D begins at the first one above u.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor

from hydra_mcore.config import ModelShape
from hydra_mcore.heads import Head
from hydra_mcore.selection.probes import ProbeBatch
from hydra_mcore.selection.receivers import answer_positions, forward_flops
from hydra_mcore.selection.teacher import TOKENS_A_BATCH, Teacher, Trace


class SenderRuns:
    """Clean and corrupt run of a batch of pairs, from which the senders of any layer can be measured.

    Args:
        receivers: (layer_idx, head_idx) of the heads that senders are measured by.
    """

    @torch.no_grad()
    def __init__(self, teacher: Teacher, batch: ProbeBatch, receivers: Collection[Head]) -> None:
        self.teacher, self.batch = teacher, batch
        self.receivers = {
            layer: sorted(h for at, h in receivers if at == layer) for layer in sorted({at for at, _ in receivers})
        }
        self.changed = int((batch.clean_bs != batch.corrupt_bs).any(0).nonzero()[0])
        everything, answer = slice(None), answer_positions(batch)
        self.clean: Trace = teacher.run(batch.clean_bs, answer, everything)
        self.corrupt: Trace = teacher.run(batch.corrupt_bs, answer, everything, only="heads_sbhd")

    @torch.no_grad()
    def effects(self, layer_idx: int) -> Tensor | None:
        """Effect of each head of a layer on each pair: float64 [h, b]; None except on the last pipeline stage.

        Heads with no receiver above them have none, exactly.
        """
        teacher, pairs = self.teacher, len(self.batch.answer_bp)
        if layer_idx >= max(self.receivers, default=-1):
            return (
                torch.zeros(teacher.num_heads, pairs, dtype=torch.float64, device=teacher.device)
                if teacher.last
                else None
            )
        at_once = max(1, TOKENS_A_BATCH // self.batch.clean_bs.numel())
        parts = []
        for start in range(0, teacher.num_heads, at_once):
            parts.append(self._patched_metric(layer_idx, range(start, min(start + at_once, teacher.num_heads))))
        if not teacher.last:
            return None
        clean_b, corrupt_b = (teacher.final_metric(run.final_pbm, self.batch)[0] for run in (self.clean, self.corrupt))
        return (clean_b - torch.cat(parts)) / (clean_b - corrupt_b)

    def _patched_metric(self, sender_layer: int, senders: range) -> Tensor | None:
        """m(D) for some heads of a layer: [senders, b]."""
        teacher = self.teacher
        low, high = min(teacher.layers), max(teacher.layers)
        if high < sender_layer:  # nothing is changed yet on this stage
            return None
        frozen, replaced = self._streams_in(sender_layer, senders, low) if low > sender_layer else (None, None)
        for layer_idx in range(max(low, sender_layer), high + 1):
            if layer_idx == sender_layer:
                change_sbhd = self.corrupt.heads_sbhd[layer_idx] - self.clean.heads_sbhd[layer_idx]
                change_snm = teacher.written(layer_idx, change_sbhd[self.changed :], senders).flatten(1, 2)
                clean_sbm = (self.clean.residual_sbm[layer_idx] + self.clean.attention_sbm[layer_idx])[self.changed :]
                frozen = teacher.mlp(layer_idx, self._rows_of(clean_sbm, change_snm) + change_snm)
            else:
                frozen, replaced = self._layer(layer_idx, frozen, replaced)
        teacher.send(torch.cat([stream for stream in (frozen, replaced) if stream is not None], dim=1))
        if not teacher.last:
            return None
        positions = answer_positions(self.batch)
        return teacher.metric(replaced[positions.start - self.changed : positions.stop - self.changed], self.batch)

    def _streams_in(self, sender_layer: int, senders: range, low: int) -> tuple[Tensor | None, Tensor | None]:
        """The frozen and the replaced stream as the pipeline stage before sent them; the receivers decide which of them
        exist.
        """
        has_frozen = low <= max(self.receivers)
        has_replaced = any(sender_layer < layer_idx < low for layer_idx in self.receivers)
        length, rows = self.batch.clean_bs.shape[1] - self.changed, len(senders) * len(self.batch.answer_bp)
        streams = list(self.teacher.receive(length, rows * (has_frozen + has_replaced)).split(rows, dim=1))
        return streams.pop(0) if has_frozen else None, streams.pop(0) if has_replaced else None

    def _layer(
        self, layer_idx: int, frozen: Tensor | None, replaced: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Both streams through one layer above the senders; ``replaced`` begins at the first layer that has
        receivers.
        """
        teacher, heads = self.teacher, self.receivers.get(layer_idx, [])
        own = [place for place, head_idx in enumerate(teacher.own_heads(layer_idx)) if head_idx in heads]
        places, recorded = torch.tensor(own, dtype=torch.long, device=teacher.device), []

        def record(heads_sbhd: Tensor) -> Tensor:
            recorded.append(heads_sbhd.index_select(2, places))
            return heads_sbhd

        def replace(heads_sbhd: Tensor) -> Tensor:
            return heads_sbhd.index_copy(2, places, recorded[0]) if recorded else heads_sbhd

        if heads:
            self._attend(layer_idx, frozen, record)
            if replaced is None:
                replaced = self._rows_of(self.clean.residual_sbm[layer_idx][self.changed :], frozen)
        if replaced is not None:
            replaced = teacher.mlp(layer_idx, replaced + self._attend(layer_idx, replaced, replace))
        if layer_idx >= max(self.receivers):
            return None, replaced
        clean_snm = self._rows_of(self.clean.attention_sbm[layer_idx][self.changed :], frozen)
        return teacher.mlp(layer_idx, frozen + clean_snm), replaced

    def _attend(self, layer_idx: int, x_snm: Tensor, edit: Callable[[Tensor], Tensor]) -> Tensor:
        """Attention of the tokens from ``changed`` on, over the clean tokens before them too."""
        before_snm = self._rows_of(self.clean.residual_sbm[layer_idx][: self.changed], x_snm)
        return self.teacher.attend(layer_idx, torch.cat([before_snm, x_snm]), edit)[self.changed :]

    def _rows_of(self, clean_sbm: Tensor, like_snm: Tensor) -> Tensor:
        """Clean values once for every sender, the pairs innermost as in ``like_snm``."""
        return clean_sbm.repeat(1, like_snm.shape[1] // clean_sbm.shape[1], 1)


def sender_flops(shape: ModelShape, length: int, pairs: int) -> float:
    """Floating-point operations of one round with receivers up to the last layer, where prompts differ from their
    middle on.

    Two runs; then for each head, through the layers above it, half the MLPs in C and in D (the tokens from the middle
    on),
    and the attention in D, which runs over whole prompts: together one forward pass through those layers.
    """
    above = shape.num_heads * (shape.num_layers - 1) / 2  # heads, each times the share of the layers above it
    return pairs * (2 + above) * forward_flops(shape, length)
