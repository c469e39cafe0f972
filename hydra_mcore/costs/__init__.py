# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""What a model costs, worked out without building it: parameters, operations, bytes sent, bytes held."""
