# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Weights in and out: Hugging Face directories to checkpoints, teacher weights to students."""
