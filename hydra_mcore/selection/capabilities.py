# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The names of what heads are scored for; light, so that a command line can list them."""

from __future__ import annotations

from hydra_mcore.selection.general import GENERAL_PROBES

RETRIEVAL, GENERAL = "retrieval", "general"  # capabilities of Eq 12
BUILT_IN = {  # and their sub-probes, of which the needle tasks are RULER's as ``ruler/`` makes them
    RETRIEVAL: ("niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2"),
    GENERAL: tuple(GENERAL_PROBES),
}
