#!/usr/bin/env python3
# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Say what this environment can and cannot run. The checks are in tools/doctor/."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if __name__ == "__main__":
    if sys.version_info < (3, 12):  # noqa: UP036 (an older one can read this file, but not the rest)
        sys.exit(
            "doctor: this Python is too old, 3.12 is needed: make env finds one; then .venv/bin/python tools/doctor.py"
        )
    from tools.doctor.__main__ import main

    main()
