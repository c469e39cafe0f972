# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""The mechanics: kernels and communication that know tensors, never models."""
