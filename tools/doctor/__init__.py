# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""What this environment can and cannot run: one module of checks for each topic.

Only Python's standard library where a check does not say otherwise: the doctor must speak where the installation is
broken.
"""
