# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Where the repository's own files lie, however deep the test that asks."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
TINY_TEACHER = ROOT / "examples" / "tiny" / "teacher"
