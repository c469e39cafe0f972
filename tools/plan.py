#!/usr/bin/env python3
# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Plan a run's memory, time and cost: ``python tools/plan.py`` does what ``python -m tools.plan`` does."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.plan.__main__ import main

if __name__ == "__main__":
    main()
