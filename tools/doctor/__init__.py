# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""What this environment can and cannot run: one module of checks for each topic.

A check uses Python's standard library alone unless it says otherwise, because doctor must work where the installation
is broken.
"""
