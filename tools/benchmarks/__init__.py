# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The sections of ``tools/benchmark.py``: each a module with HELP, EXAMPLES, ``add_options`` and ``run``, light to
import.
"""
