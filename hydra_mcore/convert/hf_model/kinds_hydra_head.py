# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The kinds of heads that a layer of a HydraHead model may mix, in the order in which a layer computes them."""

from __future__ import annotations

from .chunked_delta_rule import chunked_delta_rule  # noqa: F401  transformers 5.0 copies what a file imports, no more
from .fa_heads_hydra_head import FullAttentionHeads
from .gdn_heads_hydra_head import GatedDeltaHeads
from .heads_hydra_head import Heads

BRANCHES: dict[str, type[Heads]] = {branch.kind: branch for branch in (FullAttentionHeads, GatedDeltaHeads)}
