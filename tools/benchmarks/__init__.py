# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The sections of ``tools/benchmark.py``: each is measured by the module of its name, with flags from ``flags.py``."""
