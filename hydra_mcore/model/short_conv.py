# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The short convolution in front of recurrent heads, one for each of their channels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from hydra_mcore.model.attention_plan import HeadSet
from hydra_mcore.model.cache import left_behind
from hydra_mcore.model.parameters import PerHead
from hydra_mcore.ops import fla_kernels
from hydra_mcore.ops.context_parallel import from_previous
from hydra_mcore.ops.rows import positions
from hydra_mcore.ops.short_convolution import short_convolution
from hydra_mcore.sequence import SequencePart


class ShortConv(PerHead):
    """Causal depthwise convolution over a few tokens, the identity at the start: [s, b, h, channels] -> same."""

    def __init__(
        self,
        config: TransformerConfig,
        heads: HeadSet,
        channels: int,
        taps: int,
        activation: str,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        super().__init__(config, heads, (channels, taps), pg_collection)
        self.activation, self.cp_group = activation, pg_collection.cp
        if not self.empty:
            with torch.no_grad():
                self.weight.zero_()
                self.weight[:, -1] = 1.0

    def forward(self, x_sbhc: Tensor, part: SequencePart, states: dict[str, Tensor] | None = None) -> Tensor:
        """No token sees another document; the first ones of a part see the last ones of the previous rank's.

        ``states`` has the last inputs before the part as "taps", and gets those of this part.

        Raises:
            ValueError: a part is shorter than what its successor needs to see of it.
        """
        if self.empty:
            return x_sbhc
        length, before = x_sbhc.shape[0], self.block[1] - 1
        if part.cp_size > 1 and length < before:
            raise ValueError(
                f"a context-parallel part of {length} tokens is shorter than the {before} the short convolution looks"
                " back"
            )
        fused = fla_kernels.serve(x_sbhc)
        if part.past:
            padded = torch.cat([states["taps"], x_sbhc])
        elif part.cp_size > 1 and before:
            padded = torch.cat([from_previous(x_sbhc[length - before :], self.cp_group), x_sbhc])
        elif states is not None or not fused:
            padded = F.pad(x_sbhc, (0, 0, 0, 0, 0, 0, before, 0))
        else:
            padded = x_sbhc  # the kernel sees zeros before the first token by itself
        if states is not None:
            states["taps"] = left_behind(padded[length:], part, self.cp_group)
        if fused:
            return self._fused(padded, part)[len(padded) - length :]
        weight_hct = self.weight.unflatten(0, (len(self.heads.ordinals), self.block[0]))
        out = short_convolution(padded, weight_hct, positions(part, x_sbhc.device) if part.packed else None)
        return F.silu(out) if self.activation == "silu" else out

    def _fused(self, padded_sbhc: Tensor, part: SequencePart) -> Tensor:
        """The convolution and its activation in one kernel of flash-linear-attention; it computes the padding too."""
        bounds = None
        if part.packed:  # a document may begin in the padding, among the previous rank's tokens, or at its end
            shift = len(padded_sbhc) - part.num_tokens - part.start
            bounds = (
                0,
                *(bound + shift for bound in part.documents if 0 < bound + shift < len(padded_sbhc)),
                len(padded_sbhc),
            )
        return fla_kernels.short_conv(
            padded_sbhc, self.weight, bounds, None if self.activation == "none" else self.activation
        )
