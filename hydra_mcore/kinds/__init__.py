# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The kinds of heads that a layer may mix. This table is the whole list; docs/extending.md says how to add one.

Its order is that of a rank's heads, of branches, of tables and pictures. Full attention stands first: it is what the
teacher has, and what a selected head keeps.
"""

from __future__ import annotations

from hydra_mcore.kinds.full_attention import FULL_ATTENTION
from hydra_mcore.kinds.gated_delta import GATED_DELTA
from hydra_mcore.kinds.kimi_delta import KIMI_DELTA
from hydra_mcore.kinds.kind import HeadKind
from hydra_mcore.kinds.lightning import LIGHTNING

KINDS: dict[str, HeadKind] = {kind.name: kind for kind in (FULL_ATTENTION, GATED_DELTA, KIMI_DELTA, LIGHTNING)}
EXPORTED_TABLE = "convert/hf_model/kinds_hydra_head.py"  # the same table for exported models
FA = FULL_ATTENTION.name
DEFAULT_LINEAR = GATED_DELTA.name
