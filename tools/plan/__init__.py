# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""``tools/plan.py``: memory, time and cost of a recipe by the formulas of ``hydra_mcore/costs``."""
