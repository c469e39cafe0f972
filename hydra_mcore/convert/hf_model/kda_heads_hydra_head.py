# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The Kimi Delta Attention heads of a layer of an exported HydraHead model (arXiv 2510.26692)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .gdn_heads_hydra_head import GatedDeltaHeads
from .heads_hydra_head import precise


class KimiDeltaHeads(GatedDeltaHeads):
    """Gated DeltaNet's heads with a decay for each key channel.

    log decay = -exp(A_log) * softplus(W_up W_down x + dt), W_down for all heads.
    """

    kind = "kda"

    def add_decay(self, heads: int) -> None:
        d = self.config.head_dim
        self.decay_down_proj = nn.Linear(self.config.hidden_size, d, bias=False)
        self.decay_proj = nn.Linear(d, heads * d)

    def log_decay(self, x_bsm: Tensor) -> Tensor:
        """[b, s, h, d]."""
        logits_bshd = self.decay_proj(self.decay_down_proj(x_bsm)).unflatten(-1, (-1, self.config.head_dim))
        return -precise(self.A_log).exp()[:, None] * F.softplus(precise(logits_bshd))
