# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The names of what heads are scored for; light, so that a command line can list them."""

from __future__ import annotations

from hydra_mcore.selection.general import GENERAL_PROBES
from hydra_mcore.selection.needles import TASKS

RETRIEVAL, GENERAL = "retrieval", "general"  # capabilities of Eq 12
BUILT_IN = {RETRIEVAL: tuple(TASKS), GENERAL: tuple(GENERAL_PROBES)}  # and their sub-probes
