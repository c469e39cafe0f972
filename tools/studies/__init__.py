# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Grids of variants: what a study's file says, the commands that it stands for, running them, and its tables."""
