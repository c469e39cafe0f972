# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The three stages of the transfer on Megatron's own training loop."""
