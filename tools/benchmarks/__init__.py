# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The sections of ``tools/benchmark.py``: their flags in ``flags.py``, what each measures in a module of its name."""
