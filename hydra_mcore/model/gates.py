# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Output gates of heads (Qiu et al., arXiv 2505.06708), started near a constant."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from hydra_mcore.kinds.kind import gate_width
from hydra_mcore.model.attention_plan import HeadSet
from hydra_mcore.model.parameters import HeadLinear

ACTIVATIONS = {"sigmoid": torch.sigmoid, "silu": F.silu}


class OutputGate(MegatronModule):
    """act(W x + b) for each head, one value per channel or per head: x_sbm -> [s, b, h, v] or [s, b, h, 1].

    W ~ N(0, 1e-3) and b = 1 (paper section 3.2): nearly the same constant everywhere, which the per-head norm
    behind it removes, so a converted head starts as it was.
    """

    def __init__(
        self,
        config: TransformerConfig,
        heads: HeadSet,
        granularity: str,
        activation: str,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        super().__init__(config)
        rows = gate_width(granularity, config.kv_channels)
        self.linear = HeadLinear(config, heads, rows, pg_collection, bias=True)
        self.activation = ACTIVATIONS[activation]
        for name, parameter in self.linear.named_parameters():
            if name.startswith("weight"):
                torch.nn.init.normal_(parameter, std=1e-3)
            else:
                torch.nn.init.ones_(parameter)

    def forward(self, x_sbm: Tensor, shared: bool = False) -> Tensor:
        return self.activation(self.linear(x_sbm, shared))
