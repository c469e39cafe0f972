# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The Kimi Delta Attention heads of a layer (Kimi Linear, arXiv 2510.26692): Gated DeltaNet with finer decays."""

from __future__ import annotations

from torch import Tensor

from hydra_mcore.kinds.kimi_delta import KIMI_DELTA
from hydra_mcore.model.gdn_heads import GatedDeltaHeads, GatedDeltaRule
from hydra_mcore.model.parameters import CommonLinear, HeadLinear


class KimiDeltaRule(GatedDeltaRule):
    """The delta rule with a decay for each key channel; a class of its own for profiles."""


class KimiDeltaHeads(GatedDeltaHeads):
    """The delta rule with a decay for each key channel, on this rank's KDA heads.

    log decay = -exp(A_log) * softplus(W_up W_down x + dt), with W_down for all heads of the layer and as many rows as a
    head has channels. W_up starts at zero, so every head starts as a GDN head does, whatever W_down is.
    """

    kind, core = KIMI_DELTA.name, KimiDeltaRule

    def add_decay(self) -> None:
        """One decay a channel, through a bottleneck."""
        d = self.config.kv_channels
        self.linear_decay_down = CommonLinear(self.config, d, self.pg_collection)
        self.linear_decay = HeadLinear(self.config, self.heads, d, self.pg_collection, bias=True, width=d)

    def decay_logits(self, x_sbm: Tensor) -> Tensor:
        """W_up W_down x + dt, [s, b, h, d]."""
        low_sbd = self.linear_decay_down(x_sbm)
        logits_sbhd = self.linear_decay(low_sbd)
        if self.linear_decay.empty:  # the ranks that have heads sum the gradient of W_down with this one
            return logits_sbhd + low_sbd[:, :, None][:, :, :0]
        return logits_sbhd
