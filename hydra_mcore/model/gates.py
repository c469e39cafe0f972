# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Output gates of heads (Qiu et al., arXiv 2505.06708), started near a constant."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from hydra_mcore.model.parameters import HeadLinear

ACTIVATIONS = {"sigmoid": torch.sigmoid, "silu": F.silu}


class OutputGate(MegatronModule):
    """act(W x + b) for each head, one value per channel or per head: x_sbm -> [s, b, h, v] or [s, b, h, 1].

    W ~ N(0, 1e-3) and b = 1 (paper section 3.2): nearly the same constant everywhere, which the per-head norm
    behind it removes, so a converted head starts as it was.
    """

    def __init__(self, config: TransformerConfig, heads: Sequence[int], total: int, granularity: str, activation: str) -> None:
        super().__init__(config)
        rows = config.kv_channels if granularity == "elementwise" else 1
        self.linear = HeadLinear(config, heads, total, rows, bias=True)
        self.activation = ACTIVATIONS[activation]
        if not self.linear.empty:
            torch.nn.init.normal_(self.linear.weight, std=1e-3)
            torch.nn.init.ones_(self.linear.bias)

    def forward(self, x_sbm: Tensor) -> Tensor:
        return self.activation(self.linear(x_sbm))
