# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The kinds of heads that a layer of a HydraHead model may mix, in the order in which a layer computes them."""

from __future__ import annotations

from .fa_heads_hydra_head import FullAttentionHeads
from .gdn_heads_hydra_head import GatedDeltaHeads
from .heads_hydra_head import Heads
from .kda_heads_hydra_head import KimiDeltaHeads
from .lightning_heads_hydra_head import LightningHeads

KINDS = (FullAttentionHeads, GatedDeltaHeads, KimiDeltaHeads, LightningHeads)
BRANCHES: dict[str, type[Heads]] = {branch.kind: branch for branch in KINDS}
